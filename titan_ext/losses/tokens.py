"""What a loss knows of the tokens of a batch."""

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch, token by token; all int64 ``[B, L]``.

    It travels to the loss in the place of the labels, as one tensor: pipelines and CUDA graphs carry nothing else there.
    """

    labels: torch.Tensor
    """The next token; torchtitan's ignored index where there is nothing to learn."""
    inputs: torch.Tensor
    positions: torch.Tensor
    """As the model sees them: 0 where a piece of a document begins in its sequence."""
    source: torch.Tensor
    """Number of the file that the token comes from."""
    document: torch.Tensor
    """Number of the document in its corpus; -1 where that is not known."""
    place: torch.Tensor
    """Place in the document, also where the sequence begins inside of it."""

    def pack(self) -> torch.Tensor:
        """int64 ``[B, L, 6]``."""
        return torch.stack([getattr(self, each.name) for each in fields(self)], dim=-1)

    def row(self, row: int) -> "Tokens":
        """One sequence of the batch, ``[L]``."""
        return Tokens(*(getattr(self, each.name)[row] for each in fields(self)))

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "Tokens":
        """What ``pack`` made one tensor of."""
        return cls(*packed.unbind(-1))
