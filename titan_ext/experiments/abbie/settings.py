"""What a comparison of AbbIE's variants is made with, and what a run of it came to."""

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What all runs of a comparison share."""

    sites: ClassVar[int] = 1
    """Nothing is exchanged here; the text of a comparison is shared out among sites."""

    flavor: str
    """One of the AbbIE model, without the ending of a variant."""
    steps: int
    batch: int
    """Sequences of a step."""
    length: int
    """Tokens of a sequence."""
    iterations: tuple[int, ...]
    """Numbers of iterations to evaluate at, ascending."""
    corpus: str
    device: str
    compile: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run came to. What is kept by variant has a value for each of ``Settings.iterations``; None: no number."""

    trained_loss: float | None
    """Validation loss at the number of iterations of the training, in nats a token."""
    losses: dict[str, list[float | None]]
    """By variant: validation losses of the model, iterated as this variant is."""
    cosines: dict[str, list[float | None]]
    """By variant: mean cosine between the tail's input and that at the number of iterations of the training."""
    sizes: dict[str, list[float | None]]
    """By variant: norm of the tail's input as a multiple of that at the number of iterations of the training."""
    parameters: int
    tokens: int
    """Tokens that were trained on."""
    tokens_sha256: str
    """Hash of them, in order."""
    seconds: float

    @property
    def loss(self) -> float:
        """``trained_loss``; infinite for a run that diverged."""
        return math.inf if self.trained_loss is None else self.trained_loss
