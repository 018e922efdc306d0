"""A site's ``tokenizer``: its torchtitan config, its folder and its vocabulary."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_ext.config.findings import Need
from titan_ext.config.settings import Settings
from titan_ext.errors import UserError


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """What torchtitan needs to build the tokenizer."""

    config: Any
    """A ``BaseTokenizer.Config``."""

    assets_path: str
    """Folder that holds the tokenizer's files; empty for the byte tokenizer, which needs none."""

    vocabulary: int
    """One more than the largest id."""

    notes: list[str] = field(default_factory=list)
    """What a user should know of it."""


def choose_tokenizer(settings: Settings, text: str, vocabulary: str = "") -> TokenizerChoice:
    """Resolve ``byte``, a folder with ``tokenizer.json`` (or what may stand in its place), or the path of one.

    Args:
        settings: for the wording of errors.
        text: what the user wrote.
        vocabulary: file of the part of it that the site holds; empty for all.

    Raises:
        Missing: there is no such file.
        UserError: it is not a tokenizer, or the vocabulary is not one of it.
    """
    from titan_ext.data.tokenizers.tokenizer import resolve_tokenizer, tokenizer_notes, vocabulary_size

    if not text:
        raise settings.error("tokenizer", 'is left blank: give a folder that holds tokenizer.json, or "byte"', text)
    try:
        config, folder = resolve_tokenizer(text, vocabulary)
        size = vocabulary_size(text, vocabulary)
    except UserError as error:
        if str(error).startswith("vocabulary = "):
            message = str(error).removeprefix(f"vocabulary = {vocabulary!r}: ")
            raise settings.error("vocabulary", message, vocabulary) from None
        message = str(error).removeprefix(f"tokenizer = {text!r}: ")
        if not _is_there(text):
            raise settings.missing(Need.TOKENIZER, "tokenizer", message, text) from None
        raise settings.error("tokenizer", message, text) from None
    if size < 1:
        raise settings.error("tokenizer", "has an empty vocabulary", text)
    return TokenizerChoice(config, folder, size, [f"tokenizer {text}: {note}" for note in tokenizer_notes(text)])


def _is_there(text: str) -> bool:
    from titan_ext.data.tokenizers.folder_tokenizer import FILES

    path = Path(text).expanduser()
    complete = any(all((path / name).is_file() for name in names) for names in FILES)
    return path.exists() and (complete or not path.is_dir())
