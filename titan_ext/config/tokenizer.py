"""A site's ``tokenizer``: its torchtitan config, its folder and its vocabulary."""

from dataclasses import dataclass
from typing import Any

from titan_ext.config.settings import Settings
from titan_ext.errors import UserError


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """What torchtitan needs to build the tokenizer."""

    config: Any
    """A ``BaseTokenizer.Config``."""

    assets_path: str
    """Folder that holds ``tokenizer.json``; empty for the byte tokenizer, which needs no file."""

    vocabulary: int
    """One more than the largest id."""


def choose_tokenizer(settings: Settings, text: str) -> TokenizerChoice:
    """Resolve ``byte``, a folder with ``tokenizer.json``, or the path of one.

    Raises:
        UserError: there is no such file, or it is not a tokenizer.
    """
    from titan_ext.data import resolve_tokenizer, vocabulary_size

    try:
        config, folder = resolve_tokenizer(text)
        vocabulary = vocabulary_size(text)
    except UserError as error:
        raise settings.error("tokenizer", str(error).removeprefix(f"tokenizer = {text!r}: "), text) from None
    if vocabulary < 1:
        raise settings.error("tokenizer", "has an empty vocabulary", text)
    return TokenizerChoice(config, folder, vocabulary)
