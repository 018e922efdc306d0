"""A site's corpus, tokenizer and data loader.

The names below are imported on first use: the command line reads this package to print its help,
and must not wait for torch to do so.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_ext.data.corpora.corpus import Corpus, open_corpus
    from titan_ext.data.dataset import PackedTextDataset
    from titan_ext.data.loader import TextDataLoader
    from titan_ext.data.tokenizers.byte_tokenizer import ByteTokenizer
    from titan_ext.data.tokenizers.tokenizer import resolve_tokenizer, vocabulary_size
    from titan_ext.data.tokenizers.trimmed import TrimmedTokenizer
    from titan_ext.data.tokenizers.unigram import Unigram
    from titan_ext.data.tokenizers.vocabulary import Vocabulary, find_vocabulary
    from titan_ext.data.tokenizers.vocabulary_file import site_vocabulary

_MODULE_OF = {
    "ByteTokenizer": "tokenizers.byte_tokenizer",
    "Corpus": "corpora.corpus",
    "PackedTextDataset": "dataset",
    "TextDataLoader": "loader",
    "TrimmedTokenizer": "tokenizers.trimmed",
    "Unigram": "tokenizers.unigram",
    "Vocabulary": "tokenizers.vocabulary",
    "find_vocabulary": "tokenizers.vocabulary",
    "open_corpus": "corpora.corpus",
    "resolve_tokenizer": "tokenizers.tokenizer",
    "site_vocabulary": "tokenizers.vocabulary_file",
    "vocabulary_size": "tokenizers.tokenizer",
}

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "PackedTextDataset",
    "TextDataLoader",
    "TrimmedTokenizer",
    "Unigram",
    "Vocabulary",
    "find_vocabulary",
    "open_corpus",
    "resolve_tokenizer",
    "site_vocabulary",
    "vocabulary_size",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
