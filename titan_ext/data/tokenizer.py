"""From what a config calls a tokenizer to what torchtitan builds."""

from functools import lru_cache
from pathlib import Path

from titan_ext.data.byte_tokenizer import VOCABULARY, ByteTokenizer
from titan_ext.data.reason import reason
from titan_ext.errors import UserError
from titan_ext.platform import prepare

prepare()

from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer  # noqa: E402

BYTE = "byte"
_FILE = "tokenizer.json"
_ALLOWED = f"'{BYTE}', or a folder holding {_FILE}"


def resolve_tokenizer(spec: str) -> tuple[BaseTokenizer.Config, str]:
    """The tokenizer's config, and the folder of its files for ``hf_assets_path`` (empty for "byte").

    Args:
        spec: "byte", a folder holding tokenizer.json, or the path of a tokenizer.json.

    Raises:
        UserError: nothing is there, or it is not a tokenizer.
    """
    if spec == BYTE:
        return ByteTokenizer.Config(), ""
    folder = _folder(spec)
    _load(folder, _modified(folder))
    return HuggingFaceTokenizer.Config(), str(folder)


def vocabulary_size(spec: str) -> int:
    """Rows that an embedding for this tokenizer needs: its highest token plus one.

    Raises:
        UserError: as ``resolve_tokenizer``.
    """
    if spec == BYTE:
        return VOCABULARY
    folder = _folder(spec)
    return max(_load(folder, _modified(folder)).get_vocab().values(), default=-1) + 1


def build_tokenizer(spec: str) -> BaseTokenizer:
    """The tokenizer itself.

    Raises:
        UserError: as ``resolve_tokenizer``.
    """
    config, folder = resolve_tokenizer(spec)
    return config.build(tokenizer_path=folder)


def _folder(spec: str) -> Path:
    path = Path(spec).expanduser()
    if not spec or not path.exists():
        hint = f"; did you mean '{BYTE}'?" if spec.lower().startswith(BYTE) else ""
        raise UserError(f"tokenizer = {spec!r}: no such folder; allowed: {_ALLOWED}{hint}")
    if path.is_dir():
        if not (path / _FILE).is_file():
            raise UserError(f"tokenizer = {spec!r}: the folder has no {_FILE}; 'titan-ext data tokenizer' makes one")
        return path
    if path.name != _FILE:
        raise UserError(f"tokenizer = {spec!r}: not a {_FILE}; allowed: {_ALLOWED}")
    return path.parent


def _modified(folder: Path) -> int:
    return (folder / _FILE).stat().st_mtime_ns


@lru_cache(maxsize=8)
def _load(folder: Path, modified: int) -> HuggingFaceTokenizer:
    # The time is part of the key only: a tokenizer that was trained again is read again.
    del modified
    try:
        return HuggingFaceTokenizer.Config().build(tokenizer_path=str(folder))
    except Exception as error:  # noqa: BLE001 — the tokenizers library raises bare Exception
        raise UserError(f"tokenizer = {str(folder)!r}: cannot read its {_FILE}: {reason(error)}") from error
