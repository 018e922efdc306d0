"""The cross-entropy of each source's tokens in a step, however documents are packed."""

from collections.abc import Sequence

import torch
from torchtitan.components.loss import IGNORE_INDEX

from titan_ext.errors import InvalidValue

MOST_SOURCES = 64
"""What a line of the log is made for."""


class SourceLosses:
    """Counted where the loss is computed, then summed over the site.

    Args:
        names: of each number that ``Tokens.source`` may hold; numbers of one name count together.
        device: where the loss is computed.

    Raises:
        InvalidValue: there are too many to tell apart.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = list(dict.fromkeys(names))
        if len(self._names) > MOST_SOURCES:
            problem = (
                f"must be false: the data has {len(self._names)} files, and at most {MOST_SOURCES} are told apart; "
            )
            raise InvalidValue("loss.by_source", True, f"{problem}name folders of them in data.mix")
        places = {name: place for place, name in enumerate(self._names)}
        self._places = torch.tensor([places[name] for name in names], device=device)
        # Written in place, as a CUDA graph needs.
        self.local = torch.zeros(2 * len(self._names), dtype=torch.float64, device=device)
        """Of each name the sum of its tokens' losses, then of each the number of these tokens; both divided by the number
        of all tokens of the step."""
        self._site = torch.zeros_like(self.local)

    @property
    def count(self) -> int:
        """How many are told apart."""
        return len(self._names)

    def places(self, source: torch.Tensor) -> torch.Tensor:
        """Of ``Tokens.source`` ``[B, L]`` the number of each token's name, ``[B, L]``."""
        return self._places[source]

    def add(self, sums: torch.Tensor, places: torch.Tensor, labels: torch.Tensor, tokens: torch.Tensor) -> None:
        """Count a pass: its losses ``[count]`` over all ``tokens`` of the step, and its ``labels`` ``[B, L]``."""
        learnt = (labels != IGNORE_INDEX).flatten().double()
        self.local[: self.count].add_(sums)
        self.local[self.count :].index_add_(0, places.flatten(), learnt / tokens)

    def settle(self, total: torch.Tensor) -> None:
        """Take the site's sums of the step, and begin the next one."""
        self._site.copy_(total)
        self.local.zero_()

    def report(self) -> dict[str, float]:
        """The mean loss of each name's tokens in the last step, of those that it had."""
        losses, tokens = self._site.view(2, -1).tolist()
        return {
            f"cross_entropy/{name}": loss / count
            for name, loss, count in zip(self._names, losses, tokens, strict=True)
            if count
        }
