"""How often each token occurs in documents."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torchtitan.components.tokenizer import BaseTokenizer

from titan_ext.data.corpora.ranges import pieces
from titan_ext.data.corpora.reading import with_progress
from titan_ext.data.feed import Feed
from titan_ext.data.tokenizers.traits import encode_all, row_count

_BATCH_CHARACTERS = 1 << 20


def count_tokens(
    documents: Iterable[str] | Feed, tokenizer: BaseTokenizer, *, progress: Callable[[str], None] | None = None
) -> torch.Tensor:
    """Occurrences of each token, with the marks of begin and end that the data loader adds to each document.

    A part of the documents is in memory at a time.

    Args:
        documents: texts, or a feed, of which one epoch is read.
        tokenizer: what splits them.
        progress: is given a line after every 16 MiB of text and at the end.

    Returns:
        ``[rows]`` int64, on the CPU.

    Raises:
        UserError: a document cannot be read.
    """
    texts = _texts(documents)
    counts = np.zeros(row_count(tokenizer), np.int64)
    for batch in _batches(texts if progress is None else with_progress(texts, progress)):
        counts += np.bincount(encode_all(tokenizer, batch), minlength=len(counts))
    return torch.from_numpy(counts)


def _texts(documents: Iterable[str] | Feed) -> Iterator[str]:
    if isinstance(documents, Iterable):
        texts = iter(documents)
    else:
        documents.check(1)
        texts = (document.text for document in documents.read(0, None, 0, 1))
    # As the loader: empty documents are left out, marks and all, and large ones cut.
    return (piece for text in texts if text for piece in pieces(text))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
