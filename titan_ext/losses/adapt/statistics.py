"""What a step's samples add up to: counted where the loss is, then summed over the site."""

from collections.abc import Sequence

import torch

NAMES = ("samples", "weight", "weight_squared", "score", "score_squared", "tokens", "weighted_tokens")
MOST_SOURCES = 16
"""Sources whose weights are told apart."""


class Statistics:
    """Sums over the samples of a step.

    Args:
        sources: names of the sources; more than ``MOST_SOURCES`` are not told apart.
        width: of the samples' embeddings, which are summed too; 0 for none.
        device: where the loss is computed.
    """

    def __init__(self, sources: Sequence[str], width: int, device: torch.device) -> None:
        self._sources = sources if 1 < len(sources) <= MOST_SOURCES else ()
        self._sizes = (len(NAMES), len(self._sources), len(self._sources), width)
        # Written in place, as a CUDA graph needs. fp64: a step may have more tokens than fp32 can count.
        self.local = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        self._site = torch.zeros_like(self.local)

    def add(self, weight: torch.Tensor, score: torch.Tensor, tokens: torch.Tensor) -> None:
        """Count the samples of a sequence, by weight, score and learnt tokens of each ``[L]``; those without tokens do
        not count."""
        real = (tokens > 0).double()
        weighted = (weight * tokens).double()
        each = (real, real * weight, real * weight**2, real * score, real * score**2, tokens.double(), weighted)
        self.local[: len(NAMES)].add_(torch.stack([values.sum() for values in each]))

    def add_sources(self, weight: torch.Tensor, source: torch.Tensor) -> None:
        """Count the weight of each token by its source, both ``[L]``."""
        if self._sources:
            _, tokens, weighted, _ = self.local.split(self._sizes)
            tokens.index_add_(0, source, torch.ones_like(weight).double())
            weighted.index_add_(0, source, weight.double())

    def add_embeddings(self, embedding: torch.Tensor) -> None:
        """Count the embeddings of a sequence's samples, ``[L, width]``."""
        self.local.split(self._sizes)[3].add_(embedding.double().sum(0))

    def settle(self, total: torch.Tensor) -> None:
        """Take the site's sums of the step, and begin the next one."""
        self._site.copy_(total)
        self.local.zero_()

    def total(self, name: str) -> torch.Tensor:
        """The site's sum in the last step."""
        return self._site[NAMES.index(name)]

    @property
    def embeddings(self) -> torch.Tensor:
        """The site's sum of embeddings in the last step, ``[width]``."""
        return self._site.split(self._sizes)[3]

    def mean_and_variance(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of "weight" or "score" over the samples of the last step."""
        count = self.total("samples").clamp_min(1)
        mean = self.total(name) / count
        return mean, (self.total(f"{name}_squared") / count - mean**2).clamp_min(0)

    def report(self) -> dict[str, float]:
        """The last step in numbers; also by source where these are told apart."""
        found: dict[str, float] = {}
        for name in ("weight", "score"):
            mean, variance = self.mean_and_variance(name)
            found |= {f"{name}_mean": mean.item(), f"{name}_std": variance.sqrt().item()}
        found["effective_ratio"] = (self.total("weighted_tokens") / self.total("tokens").clamp_min(1)).item()
        _, tokens, weighted, _ = self._site.split(self._sizes)
        for name, count, weight in zip(self._sources, tokens.tolist(), weighted.tolist(), strict=True):
            if count:
                found[f"weight/{name}"] = weight / count
        return found
