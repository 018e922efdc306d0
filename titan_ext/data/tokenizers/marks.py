"""The marks that begin and end a text, wherever a Hugging Face folder names them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG_FILE = "tokenizer_config.json"
_MAP_FILE = "special_tokens_map.json"
_ID_FILES = ("generation_config.json", "config.json")
MARK_FILES = (CONFIG_FILE, _MAP_FILE, *_ID_FILES)
"""Files that may name marks."""
# What special tokens are called where no file says what they are for.
_USUAL = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>"),
    "eos_token": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>"),
}
_WORDS = {"bos_token": "beginning", "eos_token": "end"}


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file.

    Raises:
        ValueError: it is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: holds no JSON object")
    return found


def find_marks(folder: Path, config: Mapping[str, Any], tokenizer: "Tokenizer") -> tuple[dict[str, str], list[str]]:
    """Marks that ``tokenizer_config.json`` does not mention, by its keys, and a note on each.

    Args:
        folder: of the tokenizer's files.
        config: the content of ``tokenizer_config.json``; a mark that it sets to null is none.
        tokenizer: that has the tokens.

    Raises:
        ValueError: a file is no JSON object.
    """
    found, notes = {}, []
    for key, word in _WORDS.items():
        if key in config:
            continue
        where, token = next(_named(folder, key, tokenizer), ("", None))
        if token is not None:
            found[key] = token
            notes.append(f"the mark of a text's {word} is {token!r}, by {where}")
    return found, notes


def new_marks(config: Mapping[str, Any], tokenizer: "Tokenizer") -> list[str]:
    """Notes on marks that ``tokenizer_config.json`` names and the tokenizer does not have: they become new tokens."""
    listed = {content(each) for each in (config.get("added_tokens_decoder") or {}).values()}
    named = {word: content(config.get(key)) for key, word in _WORDS.items()}
    return [
        f"the mark of a text's {word}, {token!r}, is no token of it yet and becomes one, after all others"
        for word, token in named.items()
        if token is not None and token not in listed and tokenizer.token_to_id(token) is None
    ]


def _named(folder: Path, key: str, tokenizer: "Tokenizer") -> Iterator[tuple[str, str]]:
    """The places that name the mark, best first, and the token."""
    token = content((read_json(folder / _MAP_FILE) or {}).get(key))
    if token is not None and tokenizer.token_to_id(token) is not None:
        yield _MAP_FILE, token
    for name in _ID_FILES:
        ids = (read_json(folder / name) or {}).get(f"{key}_id")
        # Of several, which end a turn or a text, the first is the base model's.
        first = ids[0] if isinstance(ids, list) and ids else ids
        token = tokenizer.id_to_token(first) if isinstance(first, int) and first >= 0 else None
        if token is not None:
            yield name, token
    special = {each.content for each in tokenizer.get_added_tokens_decoder().values() if each.special}
    usual = [token for token in _USUAL[key] if token in special]
    if len(usual) == 1:
        yield "its name, for no file says so", usual[0]


def content(token: Any) -> str | None:
    """The string of a token that is written as one, or as an object with its traits."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
