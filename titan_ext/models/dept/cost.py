"""What DEPT's variants hold and send, in parameters (table 1 of arXiv 2410.05021).

A payload is counted one way; each round has one up and one down.
"""

from dataclasses import dataclass
from typing import Literal

Variant = Literal["glob", "trim", "spec", "spec-opt"]
Method = Literal["std", Variant]
"""DEPT's variants, and "std": one model, one vocabulary, gradients summed in every step."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A model with a global vocabulary."""

    body: int
    """Parameters besides embeddings and head: |theta|."""
    dim: int
    """Width of an embedding: d."""
    vocabulary: int
    """Rows of the global table: |V|."""
    positions: int = 0
    """Rows of a learned position embedding: L; 0 for rotary positions."""
    tied: bool = True
    """One matrix for embedding and head; else each row of the vocabulary counts twice."""

    def tokens(self, rows: int) -> int:
        """Parameters of embedding and head for a vocabulary of ``rows``."""
        return rows * self.dim * (1 if self.tied else 2)


def parameters_held(method: Method, size: ModelSize, own_vocabulary: int) -> int:
    """Parameters of the model that a site trains.

    Args:
        method: how the vocabulary is shared.
        size: the global model.
        own_vocabulary: rows of the site's own table, |V_k|; "std" and "glob" have none and take the global one's.
    """
    rows = size.vocabulary if method in ("std", "glob") else own_vocabulary
    return size.body + size.tokens(rows) + size.positions * size.dim


def payload(method: Method, size: ModelSize, own_vocabulary: int) -> int:
    """Parameters that a site sends in a round (under "std" in a step); arguments are those of ``parameters_held``."""
    if method in ("spec", "spec-opt"):
        return size.body
    return parameters_held(method, size, own_vocabulary)


def payload_a_step(method: Method, size: ModelSize, own_vocabulary: int, sync_every: int) -> float:
    """Parameters that a site sends in the mean over steps, ``sync_every`` of which (N_local) make a round."""
    return payload(method, size, own_vocabulary) / (1 if method == "std" else sync_every)
