"""Documents that are JSON: lines of JSONL, objects of a JSON file."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from titan_ext.data.corpora.files import CorpusFile
from titan_ext.data.corpora.signature import HEAD_BYTES, is_lfs_pointer
from titan_ext.data.corpora.unpacked import blocks
from titan_ext.errors import BadRecord, UserError

# Strings are passed over whole, so that a bracket within one counts for nothing.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\]]', re.DOTALL)
_SHOWN_KEYS = 12


def text_of_record(raw: bytes, key: str, where: str) -> str:
    """The text under a key of a JSON object; empty for a blank line and for null.

    Args:
        raw: the object.
        key: of its text.
        where: which document it is, for the message.

    Raises:
        BadRecord: it is not JSON, no object, lacks the key, or holds no string there.
    """
    if not raw.strip():
        return ""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where}: not a line of JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadRecord(f"{where}: a JSON object is needed, got a {type(record).__name__}")
    if key not in record:
        raise BadRecord(f"{where}: no key {key!r} (text_key); its keys are {_some(record)}")
    text = record[key]
    if text is not None and not isinstance(text, str):
        raise BadRecord(f"{where}: {key!r} (text_key) holds a {type(text).__name__}, not text")
    return _without_lone_surrogates(text or "")


def scan_json(data: Any, path: Path) -> np.ndarray:
    """Byte ranges ``[records, 2]`` (int64) of the objects of an array, or of objects one behind the other.

    Args:
        data: the file, as anything that ``re`` searches.
        path: for messages.

    Raises:
        UserError: it holds something else, or is cut short.
    """
    level = 1 if re.match(rb"(?:\xef\xbb\xbf)?\s*\[", data) else 0
    found: list[tuple[int, int]] = []
    depth, start = 0, 0
    for token in _TOKEN.finditer(data):
        bracket = token[0]
        if bracket in (b"{", b"["):
            if depth == level:
                start = token.start()
            depth += 1
        elif bracket in (b"}", b"]"):
            depth -= 1
            if depth == level:
                found.append((start, token.end()))
    if depth:
        raise UserError(f"data: {str(path)!r}: not whole JSON: brackets do not match; it may be cut short")
    _check_gaps(data, found, level, path)
    return np.array(found, np.int64).reshape(-1, 2)


def shows_key(file: CorpusFile, key: str) -> bool:
    """Whether the first record of a file of JSON or CSV has the key of the text, or is not there to tell."""
    if isinstance(file.path, Path):
        head = next(blocks(file), b"")
    elif file.compression:
        return True  # the beginning of a remote file does not tell
    else:
        head = file.path.read_bytes()
    if is_lfs_pointer(head):
        return True
    text = head.decode("utf-8", "replace").lstrip("\ufeff")
    if file.format == "csv":
        return key in re.split('[,;\t"]', text.split("\n", 1)[0].strip())
    try:
        record, _ = json.JSONDecoder().raw_decode(text.lstrip("[ \t\r\n"))
    except (ValueError, RecursionError):
        # A record that is longer than what was looked at.
        return re.search(rf"{re.escape(json.dumps(key))}\s*:", text) is not None and len(head) >= HEAD_BYTES
    return isinstance(record, dict) and key in record


def _check_gaps(data: Any, found: list[tuple[int, int]], level: int, path: Path) -> None:
    """Make sure that there is nothing but the records: no text or number is passed over."""
    before = [0, *(stop for _, stop in found)]
    after = [*(start for start, _ in found), len(data)]
    for place, (start, stop) in enumerate(zip(before, after, strict=True)):
        gap = bytes(data[start:stop]).removeprefix(b"\xef\xbb\xbf").strip()
        gap = gap.removeprefix(b"[").strip() if level and place == 0 else gap
        gap = gap.removesuffix(b"]").strip() if level and place == len(found) else gap
        if gap and not (level and gap == b"," and 0 < place < len(found)):
            shown = gap.lstrip(b", ")[:40].decode(errors="replace")
            raise UserError(
                f"data: {str(path)!r}: JSON objects are needed, one behind the other or in an array, got {shown!r}"
            )


def _some(record: dict[str, Any]) -> str:
    keys = sorted(record)
    return f"{keys[:_SHOWN_KEYS]}" + (f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else "")


def _without_lone_surrogates(text: str) -> str:
    """JSON can escape half a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
