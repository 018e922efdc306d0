"""Steps whose loss or gradient stands out against those before: skipped, or their gradient clipped.

Skipping goes by loss and gradient norm as OLMo 2's optimizer does (arXiv 2501.00656); clipping at a norm that follows
the run as ZClip does (arXiv 2504.02507).
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from titan_ext.errors import require

_SIGNALS = ("loss", "grad_norm")


@dataclass(kw_only=True, slots=True)
class SpikesConfig:
    """Steps whose loss or gradient stands out."""

    action: Literal["none", "skip", "clip"] = "none"
    """What becomes of such a step: "skip" leaves parameters and the optimizer's states as they are, by the loss or by the
    gradient's norm; "clip" brings the gradient's norm down to its limit. Each is a line of the kind "spike" in metrics.jsonl."""

    window: int = 128
    """Steps before, by which is judged; until half of them are there, nothing is."""

    deviations: float = 6.0
    """Standard deviations above the mean of the window at which a value stands out."""

    def __post_init__(self) -> None:
        require(self.window >= 4, "window", self.window, "at least 4")
        require(0 < self.deviations < math.inf, "deviations", self.deviations, "above 0, and finite")


@dataclass(frozen=True, slots=True)
class Spike:
    """A step that stands out."""

    loss: float
    grad_norm: float
    limits: Mapping[str, float]
    """Of loss and norm; a signal that stays below does not count."""


class SpikeDetector:
    """Judges each step by the loss and the gradient norm of those before it.

    A value enters the window at most as large as its limit, so that a new level is let in by and by, and one spike does
    not hide the next. Values that are not finite always stand out, and never enter.

    Args:
        config: how far a value may go.
    """

    def __init__(self, config: SpikesConfig) -> None:
        self._config = config
        self._signals = _SIGNALS if config.action == "skip" else ("grad_norm",)
        self._seen = {signal: deque[float](maxlen=config.window) for signal in self._signals}

    def judge(self, loss: float, grad_norm: float) -> Spike | None:
        """Whether a step stands out; call once a step.

        Args:
            loss: of the step, the same at all ranks.
            grad_norm: of the whole gradient, before any clipping.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        limits = {signal: self._limit(seen) for signal, seen in self._seen.items()}
        outside = any(not values[signal] <= limits[signal] or math.isinf(values[signal]) for signal in self._signals)
        for signal, seen in self._seen.items():
            if math.isfinite(values[signal]):
                seen.append(min(values[signal], limits[signal]))
        return Spike(loss, grad_norm, limits) if outside else None

    def _limit(self, seen: "deque[float]") -> float:
        if len(seen) < self._config.window // 2:
            return math.inf
        mean = sum(seen) / len(seen)
        variance = sum((value - mean) ** 2 for value in seen) / (len(seen) - 1)
        return mean + self._config.deviations * math.sqrt(variance)

    def state_dict(self) -> dict[str, Any]:
        """The window, fp64 ``[window]`` for each signal with NaN where nothing has been seen, equal at all ranks."""
        return {signal: _padded(seen, self._config.window) for signal, seen in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for signal, seen in self._seen.items():
            seen.clear()
            seen.extend(value for value in state[signal].tolist() if not math.isnan(value))


def _padded(seen: "deque[float]", length: int) -> torch.Tensor:
    return torch.tensor([*seen, *[math.nan] * (length - len(seen))], dtype=torch.float64)
