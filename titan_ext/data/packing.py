"""Documents packed into sequences of one length, without padding.

The conventions are torchtitan's: a label is the next token of the same document, so the last token
of a document is a label only and the first of the next is never one; positions count from the
document's start, and from the sequence's start where a sequence begins inside a document, so they
stay below the sequence length.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Sample = tuple[dict[str, torch.Tensor], torch.Tensor]
"""({"input": [seq_len], "positions": [seq_len]}, labels [seq_len]), all int64."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the next sequence begins. A sequence is given out as soon as it is full, so what is left
    over is always the rest of one document, and its place with an offset says it all."""

    epoch: int = 0
    place: Any = None
    """The document's place in its feed; None: the epoch's start."""
    offset: int = 0
    """Tokens of that document, or of its piece, that were used as inputs."""
    piece: int = 0
    """Which piece of a document that is too large to be one; 0 for any other."""


def pack(
    documents: Iterable[tuple[int, Any, np.ndarray]], seq_len: int, skip: int = 0
) -> Iterator[tuple[Cursor, Sample]]:
    """Full sequences, each with the cursor behind it; what fills no sequence at the end is dropped.

    Args:
        documents: Epoch, place and tokens ``[n]`` of each, with the marks of begin and end.
        seq_len: Tokens of a sequence.
        skip: Tokens of the first document that were used before.
    """
    inputs, labels, positions = np.empty((3, seq_len), np.int64)
    filled = 0
    for epoch, place, tokens in documents:
        used, skip = skip, 0
        while used < len(tokens) - 1:
            taken = min(seq_len - filled, len(tokens) - 1 - used)
            piece = slice(filled, filled + taken)
            inputs[piece] = tokens[used : used + taken]
            labels[piece] = tokens[used + 1 : used + taken + 1]
            positions[piece] = np.arange(taken)
            used, filled = used + taken, filled + taken
            if filled == seq_len:
                yield Cursor(epoch, place, used), _sample(inputs, labels, positions)
                inputs, labels, positions = np.empty((3, seq_len), np.int64)
                filled = 0


def _sample(inputs: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> Sample:
    samples = {"input": torch.from_numpy(inputs), "positions": torch.from_numpy(positions)}
    return samples, torch.from_numpy(labels)
