"""What a loss may ask of the inner step that it belongs to."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from titan_ext.losses.tokens import Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class InnerStep:
    """The step of one rank, as its loss sees it."""

    device: torch.device
    width: int
    """Of the hidden states that the head reads."""
    vocabulary: int
    """Rows of the embedding."""
    seq_len: int
    tokenizer: Any
    sources: Sequence[str]
    """What ``Tokens.source`` counts."""
    documents: Callable[[], Iterator[str]]
    """The site's own texts, from the first on, the same at every rank."""
    reader: int
    """This rank among those that read different data."""
    readers: int
    rows: int
    """Sequences of one forward pass."""
    read: Callable[[Tokens], None]
    """Run the model forward over sequences ``[n rows, L]`` on the CPU, without gradients and in evaluation mode, and call
    the loss with them. A collective over the site: all ranks give as many sequences."""
    sum_over_site: Callable[[torch.Tensor], torch.Tensor]
    """Sum a tensor over all data of the site, each counted once, wherever the loss is computed. A collective."""
    corpora: Sequence[str] = ()
    """What each of ``sources`` is a part of: a name of ``data.mix``; empty without a mix."""
