"""What becomes of the body's output between two iterations, and after the last.

The papers' summaries disagree on where variant D adds its residual. The default is the one reading under which
one iteration is the standard decoder; the others are settings.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

Skip = Literal["prev", "input", "none"]
Between = Literal["none", "mean", "norm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recurrence:
    """From the body's output y = B(u) to the next state u: y + u, y + h0 or y."""

    skip: Skip = "prev"
    """"prev" adds the state that the body was given, "input" the head's output: variant D; "none" is variant C."""

    final_skip: bool = False
    """Whether the last iteration adds the skip too."""

    between: Between = "none"
    """What else happens between iterations: "mean" halves the sum, "norm" divides it by its root mean square."""

    backprop_iterations: int | None = None
    """Gradients flow through so many last iterations, to the head's output that is added in them; None: through all."""

    def next_state(self, output: torch.Tensor, state: torch.Tensor, start: torch.Tensor, *, last: bool) -> torch.Tensor:
        """The state after an iteration: the next one's input, or the tail's where it is the last.

        Args:
            output: ``[B, L, D]``, the body's output.
            state: ``[B, L, D]``, what the body was given.
            start: ``[B, L, D]``, the head's output.
            last: whether the tail follows.
        """
        if self.skip != "none" and (self.final_skip or not last):
            output = output + (state if self.skip == "prev" else start)
        if last or self.between == "none":
            return output
        return output / 2 if self.between == "mean" else F.rms_norm(output, output.shape[-1:])
