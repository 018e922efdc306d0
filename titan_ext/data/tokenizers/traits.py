"""What is asked of a tokenizer beyond torchtitan's interface: its rows, its marks, which it is, texts by the batch."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer

from titan_ext.data.tokenizers.byte_tokenizer import ByteTokenizer
from titan_ext.data.tokenizers.folder_tokenizer import TOKENIZER_FILE, FolderTokenizer
from titan_ext.errors import UserError

BYTE = "byte"


def row_count(tokenizer: BaseTokenizer) -> int:
    """Rows that an embedding for the tokenizer needs: its highest token plus one."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return max(tokenizer.get_vocab().values(), default=-1) + 1
    return tokenizer.get_vocab_size()


def fingerprint(tokenizer: BaseTokenizer) -> str:
    """ "byte" for the byte tokenizer, else the sha256 of tokenizer.json, or of the files in its place, in hexadecimal.

    Raises:
        UserError: the tokenizer was not read from a folder.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return BYTE
    if isinstance(tokenizer, FolderTokenizer):
        return tokenizer.fingerprint
    file = Path(getattr(tokenizer, "tokenizer_path", "")) / TOKENIZER_FILE
    if not file.is_file():
        raise UserError(f"tokenizer: a {type(tokenizer).__name__} without a {TOKENIZER_FILE} has no fingerprint")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def identity(tokenizer: BaseTokenizer) -> dict[str, Any]:
    """By what a tokenizer is known again: its rows, which it is, and its marks of begin and end."""
    base = getattr(tokenizer, "base", tokenizer)
    vocabulary = getattr(tokenizer, "vocabulary", None)
    try:
        known = fingerprint(base)
    except UserError:
        known = type(base).__name__
    if vocabulary is not None:
        known += f"/{hashlib.sha256(vocabulary.ids.numpy().tobytes()).hexdigest()}"
    marks = [getattr(tokenizer, "bos_id", None), tokenizer.eos_id]
    return {"vocabulary": tokenizer.get_vocab_size(), "tokenizer": known, "marks": marks}


def token_rows(tokenizer: BaseTokenizer) -> str:
    """A digest of which token each row of an embedding stands for: equal where sites can share embeddings row by row.

    Of a tokenizer that does not tell its vocabulary, the name of its class.
    """
    base, vocabulary = getattr(tokenizer, "base", tokenizer), getattr(tokenizer, "vocabulary", None)
    rows = BYTE if isinstance(base, ByteTokenizer) else type(base).__name__
    if isinstance(base, HuggingFaceTokenizer):
        rows = json.dumps(sorted((row, token) for token, row in base.get_vocab().items()))
    if vocabulary is not None:
        rows += hashlib.sha256(vocabulary.ids.numpy().tobytes()).hexdigest()
    return rows if rows == BYTE else hashlib.sha256(rows.encode()).hexdigest()[:16]


def unknown_id(tokenizer: BaseTokenizer) -> int | None:
    """The token that the tokenizer itself gives to what it does not know; None where it has none."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    # Not every model of the tokenizers library tells it otherwise.
    model = json.loads(tokenizer.tokenizer.to_str())["model"]
    if model.get("unk_token") is not None:
        return tokenizer.token_to_id(model["unk_token"])
    return model.get("unk_id")


def special_ids(tokenizer: BaseTokenizer) -> list[int]:
    """The marks of begin, end, padding and the unknown, and tokens added to the trained ones: ascending, distinct."""
    found = {getattr(tokenizer, name, None) for name in ("bos_id", "eos_id", "pad_id")} | {unknown_id(tokenizer)}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        found |= tokenizer.tokenizer.get_added_tokens_decoder().keys()
    return sorted(found - {None})


def encode_all(tokenizer: BaseTokenizer, texts: Sequence[str]) -> np.ndarray:
    """The tokens of all texts, each with its marks of begin and end: ``[tokens]`` int64, in no order of note."""
    if isinstance(tokenizer, FolderTokenizer):
        lists = [*tokenizer.encode_texts(texts), _marks(tokenizer) * len(texts)]
    else:
        lists = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in texts]
    return np.fromiter(chain.from_iterable(lists), np.int64)


def _marks(tokenizer: HuggingFaceTokenizer) -> list[int]:
    """What torchtitan adds to the tokens of a text; the library's own template may have its marks besides."""
    whole = Counter(tokenizer.encode("", add_bos=True, add_eos=True))
    return list((whole - Counter(tokenizer.tokenizer.encode("").ids)).elements())
