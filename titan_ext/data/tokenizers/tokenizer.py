"""From what a config calls a tokenizer to what torchtitan builds."""

from functools import lru_cache
from itertools import chain
from pathlib import Path

from torchtitan.components.tokenizer import BaseTokenizer

from titan_ext.data.corpora.signature import HEAD_BYTES, is_lfs_pointer
from titan_ext.data.tokenizers.byte_tokenizer import ByteTokenizer
from titan_ext.data.tokenizers.folder_tokenizer import BPE_FILES, FILES, TOKENIZER_FILE, FolderTokenizer, files_of
from titan_ext.data.tokenizers.marks import MARK_FILES
from titan_ext.data.tokenizers.traits import BYTE, row_count
from titan_ext.data.tokenizers.trimmed import TrimmedTokenizer
from titan_ext.data.tokenizers.vocabulary import Vocabulary
from titan_ext.error_text import reason
from titan_ext.errors import UserError

_ALLOWED = f"'{BYTE}', or a folder holding {TOKENIZER_FILE}"
_READ = (*chain(*FILES), *MARK_FILES)
# What the makers of tokenizers leave that is not read here, and what it is.
_FOREIGN = {
    "tokenizer.model": "SentencePiece or tiktoken",
    "spiece.model": "SentencePiece",
    "sentencepiece.bpe.model": "SentencePiece",
    "*.spm": "SentencePiece",
    "*.model": "SentencePiece",
    "tekken.json": "Mistral's tekken",
    "*.tiktoken": "tiktoken",
    "vocab.json": f"a vocabulary without {BPE_FILES[1]}",
}


def resolve_tokenizer(spec: str, vocabulary: str = "") -> tuple[BaseTokenizer.Config, str]:
    """The tokenizer's config, and the folder of its files for ``hf_assets_path`` (empty for "byte").

    Args:
        spec: "byte", a folder holding tokenizer.json (or vocab.json and merges.txt, or vocab.txt), or the path of
            such a file.
        vocabulary: File of a ``Vocabulary`` to trim it to; empty for the whole tokenizer.

    Raises:
        UserError: nothing is there, or it is not a tokenizer, or the vocabulary is not one of it.
    """
    base, folder = _loaded(spec)
    whole = ByteTokenizer.Config() if spec == BYTE else FolderTokenizer.Config()
    if not vocabulary:
        return whole, folder
    path = str(Path(vocabulary).expanduser())
    Vocabulary.load(path).check(base, path)
    return TrimmedTokenizer.Config(base=whole, vocabulary_path=path), folder


def vocabulary_size(spec: str, vocabulary: str = "") -> int:
    """Rows that an embedding for this tokenizer needs: its highest token plus one.

    Args:
        spec: As in ``resolve_tokenizer``.
        vocabulary: As there.

    Raises:
        UserError: as ``resolve_tokenizer``.
    """
    return row_count(build_tokenizer(spec, vocabulary) if vocabulary else _loaded(spec)[0])


def tokenizer_notes(spec: str) -> list[str]:
    """What a user should know of a tokenizer: what in its folder was set aside, found elsewhere, or is missing.

    Raises:
        UserError: as ``resolve_tokenizer``.
    """
    return list(getattr(_loaded(spec)[0], "notes", ()))


def build_tokenizer(spec: str, vocabulary: str = "") -> BaseTokenizer:
    """The tokenizer itself.

    Args:
        spec: As in ``resolve_tokenizer``.
        vocabulary: As there.

    Raises:
        UserError: as ``resolve_tokenizer``.
    """
    config, folder = resolve_tokenizer(spec, vocabulary)
    return config.build(tokenizer_path=folder)


def _loaded(spec: str) -> tuple[BaseTokenizer, str]:
    if spec == BYTE:
        return ByteTokenizer(), ""
    folder = _folder(spec)
    changed = tuple((folder / name).stat().st_mtime_ns if (folder / name).is_file() else 0 for name in _READ)
    return _load(folder, changed), str(folder)


def _folder(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not spec or not path.exists():
        hint = f"; did you mean '{BYTE}'?" if spec.lower().startswith(BYTE) else ""
        raise UserError(f"tokenizer = {spec!r}: no such folder; allowed: {_ALLOWED}{hint}")
    folder = path if path.is_dir() else path.parent
    held = [names for names in FILES if all((folder / name).is_file() for name in names)]
    if held and (path.is_dir() or path.name in held[0]):
        return folder
    _refuse_foreign(spec, path)
    if path.is_dir():
        raise UserError(
            f"tokenizer = {spec!r}: the folder has no {TOKENIZER_FILE}; 'titan-ext data tokenizer' makes one"
        )
    raise UserError(f"tokenizer = {spec!r}: not a {TOKENIZER_FILE}; allowed: {_ALLOWED}")


def _refuse_foreign(spec: str, path: Path) -> None:
    """Raises UserError, with the way to convert it, for a tokenizer of a kind that is not read."""
    for pattern, what in _FOREIGN.items():
        names = sorted(found.name for found in path.glob(pattern)) if path.is_dir() else [path.name]
        if names and Path(names[0]).match(pattern):
            folder = path if path.is_dir() else path.parent
            convert = f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('OUT')"
            raise UserError(
                f"tokenizer = {spec!r}: has no {TOKENIZER_FILE}, and {names[0]} ({what}) is not read; convert it: "
                f'python -c "from transformers import AutoTokenizer; {convert}", or take the {TOKENIZER_FILE} of the '
                "model's Hugging Face repository"
            )


@lru_cache(maxsize=8)
def _load(folder: Path, changed: tuple[int, ...]) -> FolderTokenizer:
    # The times are part of the key only: a tokenizer that was trained again is read again.
    del changed
    try:
        for name in _READ:
            _refuse_pointer(folder / name)
        return FolderTokenizer.Config().build(tokenizer_path=str(folder))
    except UserError as error:
        raise UserError(f"tokenizer = {str(folder)!r}: {error}") from error
    except BaseException as error:  # the tokenizers library raises bare Exception; its Rust may panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        read = " and ".join(files_of(folder))
        raise UserError(f"tokenizer = {str(folder)!r}: cannot read its {read}: {reason(error)}") from error


def _refuse_pointer(path: Path) -> None:
    if not path.is_file():
        return
    with open(path, "rb") as file:
        if is_lfs_pointer(file.read(HEAD_BYTES)):
            raise UserError(
                f"{path.name} is a Git LFS pointer, not the file itself; run 'git lfs pull' where it was cloned"
            )
