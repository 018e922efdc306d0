"""Tokenizers and vocabularies that several tests of vocabularies start from."""

from collections.abc import Iterable
from pathlib import Path

import torch

from titan_ext.data.tokenizers.bpe import train_tokenizer
from titan_ext.data.tokenizers.tokenizer import build_tokenizer
from titan_ext.data.tokenizers.vocabulary import Vocabulary, find_vocabulary


def train_bpe(folder: Path, texts: Iterable[str], size: int = 300) -> Path:
    """A byte-level BPE tokenizer of ``size`` tokens in the folder."""
    folder.mkdir(parents=True)
    assert train_tokenizer(texts, size, folder) == size
    return folder


def write_words(folder: Path, words: Iterable[str], **model: str) -> Path:
    """A tokenizer of whole words; ``model`` may name its unknown token, ``unk_token``, which is one of the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, **model))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def save_vocabulary(path: Path, spec: str, texts: Iterable[str], min_count: int = 1) -> Vocabulary:
    """The texts' vocabulary, also written to the path."""
    vocabulary = find_vocabulary(texts, build_tokenizer(spec), min_count=min_count)
    vocabulary.save(path)
    return vocabulary


def same(one: Vocabulary, other: Vocabulary) -> bool:
    """Whether two vocabularies are equal in every field."""
    return (
        torch.equal(one.ids, other.ids)
        and torch.equal(one.counts, other.counts)
        and (one.total, one.tokenizer) == (other.total, other.tokenizer)
    )
