"""Anchors as sequences that the model reads like a batch."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torchtitan.components.loss import IGNORE_INDEX

from titan_ext.data.feed import Feed
from titan_ext.errors import UserError
from titan_ext.losses.tokens import Tokens


def first_texts(feed: Feed, most: int) -> list[str]:
    """The first documents with text, at most so many.

    Raises:
        UserError: there is none.
    """
    texts = list(islice((document.text for document in feed.read(0, None, 0, 1) if document.text), most))
    if not texts:
        raise UserError(f"loss.adapt.anchors = {feed.name!r}: no document has text")
    return texts


def encoded(tokenizer: Any, texts: Iterable[str], longest: int) -> list[list[int]]:
    """Tokens of each text, cut to ``longest``, with the marks that training texts have."""
    return [tokenizer.encode(text, add_bos=True, add_eos=True)[:longest] for text in texts]


def packed(documents: Sequence[Sequence[int]], seq_len: int, reader: int, readers: int, rows: int) -> Tokens:
    """Documents as whole in sequences; each reader has its own, and all have as many.

    What is left of a sequence is padding: a piece of its own, whose labels are ignored.

    Args:
        documents: tokens of each, at most ``seq_len``.
        seq_len: tokens of a sequence.
        reader: this rank among those that read different data.
        readers: how many they are.
        rows: the number of sequences is a multiple of this.

    Returns:
        ``[n rows, seq_len]``, on the CPU.
    """
    lines = list(_lines(documents, seq_len))
    turns = -(-len(lines) // (readers * rows))
    mine = lines[reader::readers]
    mine += [[]] * (turns * rows - len(mine))
    inputs, labels, positions = torch.zeros(3, len(mine), seq_len, dtype=torch.int64)
    labels.fill_(IGNORE_INDEX)
    for row, line in enumerate(mine):
        filled = 0
        for document in line:
            place = slice(filled, filled + len(document))
            inputs[row, place] = torch.tensor(document)
            labels[row, place] = 0
            positions[row, place] = torch.arange(len(document))
            filled += len(document)
        positions[row, filled:] = torch.arange(seq_len - filled)
    unknown = torch.full_like(inputs, -1)
    return Tokens(labels, inputs, positions, torch.zeros_like(inputs), unknown, positions)


def _lines(documents: Sequence[Sequence[int]], seq_len: int) -> Iterator[list[Sequence[int]]]:
    line: list[Sequence[int]] = []
    filled = 0
    for document in documents:
        if filled + len(document) > seq_len:
            yield line
            line, filled = [], 0
        line.append(document)
        filled += len(document)
    if line:
        yield line
