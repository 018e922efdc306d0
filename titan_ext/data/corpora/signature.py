"""What the bytes of a file give away: its encoding, and that it is something else than its name says."""

import codecs

HEAD_BYTES = 4096
"""Enough of a file to look at."""

_LFS_POINTER = b"version https://git-lfs"
# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MAGIC = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"PK\x03\x04": "a ZIP archive",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"%PDF-": "PDF",
    b"{\\rtf": "RTF",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x7fELF": "a program",
}
_DOCUMENTS = (b"%PDF-", b"{\\rtf")
"""What begins with text, and is none."""


def encoding_of(head: bytes) -> str:
    """``utf-16`` or ``utf-32`` where the byte order mark says so, else ``utf-8``."""
    return next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")


def is_lfs_pointer(head: bytes) -> bool:
    """Whether this is what Git leaves in a file's place where Git LFS has not fetched it."""
    return head.startswith(_LFS_POINTER)


def decode(raw: bytes, start: int = 0) -> str:
    """The text of bytes in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Args:
        raw: whole characters.
        start: where they stand in their file, for the message.

    Raises:
        ValueError: they are something else; says what, where and what to do.
    """
    if is_lfs_pointer(raw):
        raise ValueError("a Git LFS pointer, not the file itself; run 'git lfs pull' where it was cloned")
    encoding = encoding_of(raw)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(_not_text(raw, encoding, start, error.start)) from None
    if "\0" in text:
        raise ValueError(_not_text(raw, encoding, start, 0))
    return text.removeprefix("\ufeff")


def head_problem(head: bytes) -> str | None:
    """What is wrong with a file whose first ``HEAD_BYTES`` these are, if it is to hold text; None for nothing."""
    whole = len(head) < HEAD_BYTES
    decoder = codecs.getincrementaldecoder(encoding_of(head))()
    try:
        # Within the head the last character may be cut in two.
        decoder.decode(head, final=whole)
    except UnicodeDecodeError as error:
        return _not_text(head, encoding_of(head), 0, error.start)
    try:
        decode(head[: len(head) - len(decoder.getstate()[0])])
    except ValueError as error:
        return str(error)
    if kind := next((_MAGIC[magic] for magic in _DOCUMENTS if head.startswith(magic)), None):
        return f"it looks like {kind}, which is not read; convert it to text"
    return None


def _not_text(raw: bytes, encoding: str, start: int, place: int) -> str:
    """What is wrong with bytes that hold NUL, or cannot be decoded at a place."""
    nul = raw.find(b"\0") if encoding == "utf-8" else -1
    wrong = f"byte {start + nul} is NUL" if nul >= 0 else f"byte {start + place} is 0x{raw[place]:02x}"
    kind = next((name for magic, name in _MAGIC.items() if raw.startswith(magic)), None)
    if kind is not None:
        return f"not {encoding.upper()} text: {wrong}; it looks like {kind}"
    guess, name = ("UTF-16 without a byte order mark", "UTF-16LE") if nul >= 0 else ("Latin-1", "LATIN1")
    return f"not {encoding.upper()} text: {wrong}; if it is {guess}, convert it (iconv -f {name} -t UTF-8)"
