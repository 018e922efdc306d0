"""Documents packed into sequences of one length, without padding.

The conventions are torchtitan's: a label is the next token of the same document, so the last token
of a document is a label only and the first of the next is never one; positions count from the
document's start, and from the sequence's start where a sequence begins inside a document, so they
stay below the sequence length.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

Sample = tuple[dict[str, torch.Tensor], torch.Tensor]
"""({"input": [seq_len], "positions": [seq_len]}, labels [seq_len]), all int64."""

IDENTITY = "identity"
"""Key of what tells whose the tokens are: int64 ``[seq_len, 3]``, each token's source, document, and place in it."""


class Identified(Protocol):
    """A place that knows what stands there."""

    source: int
    number: int


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
    documents: Iterable[tuple[int, Any, np.ndarray]], seq_len: int, skip: int = 0, identify: bool = False
) -> Iterator[tuple[Cursor, Sample]]:
    """Full sequences, each with the cursor behind it; what fills no sequence at the end is dropped.

    Args:
        documents: Epoch, place and tokens ``[n]`` of each, with the marks of begin and end.
        seq_len: Tokens of a sequence.
        skip: Tokens of the first document that were used before.
        identify: Whether samples have ``IDENTITY``; places are then ``Identified``.
    """
    rows = 6 if identify else 3
    sequence = np.empty((rows, seq_len), np.int64)
    filled = 0
    for epoch, place, tokens in documents:
        used, skip = skip, 0
        while used < len(tokens) - 1:
            taken = min(seq_len - filled, len(tokens) - 1 - used)
            piece = slice(filled, filled + taken)
            sequence[0, piece] = tokens[used : used + taken]
            sequence[1, piece] = tokens[used + 1 : used + taken + 1]
            sequence[2, piece] = np.arange(taken)
            if identify:
                sequence[3, piece], sequence[4, piece] = place.source, place.number
                sequence[5, piece] = np.arange(used, used + taken)
            used, filled = used + taken, filled + taken
            if filled == seq_len:
                yield Cursor(epoch, place, used), _sample(sequence)
                sequence = np.empty((rows, seq_len), np.int64)
                filled = 0


def _sample(sequence: np.ndarray) -> Sample:
    inputs, labels, positions, *identity = (torch.from_numpy(row) for row in sequence)
    samples = {"input": inputs, "positions": positions}
    if identity:
        samples[IDENTITY] = torch.stack(identity, dim=-1)
    return samples, labels
