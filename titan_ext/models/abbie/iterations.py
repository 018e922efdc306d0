"""How often the body is applied: in training, by step, and at evaluation."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Sampling = Literal["fixed", "uniform", "poisson"]
# The deviation of log(rate) in the recurrent-depth model's Poisson-lognormal distribution.
_LOG_DEVIATION = 0.5
_STEPS_OF_MEAN = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Iterations:
    """Applications of the body; AbbIE's paper trains with 2, fixed, and evaluates with 1, 2, 4 and 8."""

    train: int = 2
    """In training; the mean under "poisson"."""

    evaluate: int = 2
    """At evaluation, where a call names no other number."""

    sampling: Sampling = "fixed"
    """"fixed"; "uniform" draws from 1 to ``most``; "poisson" is the recurrent-depth model's, cut at ``most``."""

    most: int = 3
    """Largest number that is drawn."""

    def at(self, seed: int, step: int) -> int:
        """Iterations of a training step: the same at all ranks, and again after a resume."""
        if self.sampling == "fixed":
            return self.train
        generator = np.random.default_rng((seed, step))
        if self.sampling == "uniform":
            return int(generator.integers(1, self.most, endpoint=True))
        if self.train == 1:
            return 1
        rate = generator.lognormal(np.log(self.train - 1) - _LOG_DEVIATION**2 / 2, _LOG_DEVIATION)
        return min(1 + int(generator.poisson(rate)), self.most)

    @property
    def mean(self) -> float:
        """Iterations of a training step on average."""
        if self.sampling == "fixed":
            return float(self.train)
        return float(np.mean([self.at(0, step) for step in range(_STEPS_OF_MEAN)]))
