"""From what a config calls a tokenizer to what torchtitan builds."""

from functools import lru_cache
from pathlib import Path

from titan_ext.data.tokenizers.byte_tokenizer import ByteTokenizer
from titan_ext.data.tokenizers.traits import BYTE, TOKENIZER_FILE, row_count
from titan_ext.data.tokenizers.trimmed import TrimmedTokenizer
from titan_ext.data.tokenizers.vocabulary import Vocabulary
from titan_ext.error_text import reason
from titan_ext.errors import UserError
from titan_ext.trainer.cpu import prepare

prepare()

from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer  # noqa: E402

_ALLOWED = f"'{BYTE}', or a folder holding {TOKENIZER_FILE}"


def resolve_tokenizer(spec: str, vocabulary: str = "") -> tuple[BaseTokenizer.Config, str]:
    """The tokenizer's config, and the folder of its files for ``hf_assets_path`` (empty for "byte").

    Args:
        spec: "byte", a folder holding tokenizer.json, or the path of a tokenizer.json.
        vocabulary: File of a ``Vocabulary`` to trim it to; empty for the whole tokenizer.

    Raises:
        UserError: nothing is there, or it is not a tokenizer, or the vocabulary is not one of it.
    """
    base, folder = _loaded(spec)
    whole = ByteTokenizer.Config() if spec == BYTE else HuggingFaceTokenizer.Config()
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
    return _load(folder, (folder / TOKENIZER_FILE).stat().st_mtime_ns), str(folder)


def _folder(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not spec or not path.exists():
        hint = f"; did you mean '{BYTE}'?" if spec.lower().startswith(BYTE) else ""
        raise UserError(f"tokenizer = {spec!r}: no such folder; allowed: {_ALLOWED}{hint}")
    if path.is_dir():
        if not (path / TOKENIZER_FILE).is_file():
            raise UserError(
                f"tokenizer = {spec!r}: the folder has no {TOKENIZER_FILE}; 'titan-ext data tokenizer' makes one"
            )
        return path
    if path.name != TOKENIZER_FILE:
        raise UserError(f"tokenizer = {spec!r}: not a {TOKENIZER_FILE}; allowed: {_ALLOWED}")
    return path.parent


@lru_cache(maxsize=8)
def _load(folder: Path, modified: int) -> HuggingFaceTokenizer:
    # The time is part of the key only: a tokenizer that was trained again is read again.
    del modified
    try:
        return HuggingFaceTokenizer.Config().build(tokenizer_path=str(folder))
    except Exception as error:  # noqa: BLE001 — the tokenizers library raises bare Exception
        raise UserError(f"tokenizer = {str(folder)!r}: cannot read its {TOKENIZER_FILE}: {reason(error)}") from error
