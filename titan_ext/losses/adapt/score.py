"""What samples are scored by: their embeddings against the anchors' centroid, or BM25.

Shapes: L tokens of a sequence, D width of the model.
"""

import torch
import torch.nn.functional as F

from titan_ext.losses.adapt.similarity import pooled, samples, similarity


class Centroid:
    """The anchors' mean embedding under the present model (equations 9 and 10).

    Args:
        width: D.
        centered: whether the mean embedding of recent samples is taken out of all embeddings.
        device: where the loss is computed.
    """

    def __init__(self, width: int, centered: bool, device: torch.device) -> None:
        self.centered = centered
        # All of it is equal at every rank, and written in place.
        self.state = {
            "centroid": torch.zeros(width, device=device),
            "center": torch.zeros(width, device=device),
            "embeddings": torch.zeros(width if centered else 0, dtype=torch.float64, device=device),
            "samples": torch.zeros((), dtype=torch.float64, device=device),
        }
        self.local = torch.zeros(width + 1, dtype=torch.float64, device=device)
        """This rank's part of the anchors: the sum of their embeddings, and their number."""

    def score(self, embedding: torch.Tensor) -> torch.Tensor:
        """Similarity to the anchors of each ``pooled`` sample, ``[L]``."""
        return similarity(self._without_center(embedding), self.state["centroid"])

    def _without_center(self, embedding: torch.Tensor) -> torch.Tensor:
        if not self.centered:
            return embedding
        # A place without a sample stays zero.
        return F.normalize(embedding - self.state["center"] * embedding.any(-1, keepdim=True), dim=-1)

    def count(self, embeddings: torch.Tensor, samples: torch.Tensor) -> None:
        """Take the site's sum of a step's embeddings before centering, and their number."""
        self.state["embeddings"].add_(embeddings)
        self.state["samples"].add_(samples)

    def begin(self) -> None:
        """The anchors are about to be read anew."""
        self.local.zero_()
        if self.centered:
            self.state["center"].copy_(self.state["embeddings"] / self.state["samples"].clamp_min(1))
            self.state["embeddings"].zero_()
            self.state["samples"].zero_()

    def read(self, hidden: torch.Tensor, positions: torch.Tensor, real: torch.Tensor) -> None:
        """Add the anchors of a sequence.

        Args:
            hidden: ``[L, D]``.
            positions: ``[L]``, 0 where an anchor begins.
            real: bool ``[L]``, false for padding.
        """
        sample, place = samples(positions, None)
        self.local[:-1].add_(self._without_center(pooled(hidden, sample, (place + 1) * real)).double().sum(0))
        self.local[-1].add_((real & (place == 0)).sum())

    def end(self, total: torch.Tensor) -> None:
        """Take the site's sum of ``local``; that of a model that has diverged is passed over."""
        fresh = (total[:-1] / total[-1]).to(self.state["centroid"])
        self.state["centroid"].copy_(torch.where(fresh.isfinite().all(), fresh, self.state["centroid"]))


class MovingMoments:
    """Mean and standard deviation of recent scores, without the bias towards their first value."""

    def __init__(self, decay: float, device: torch.device) -> None:
        self._decay = decay
        self.state = {"moving": torch.zeros(3, dtype=torch.float64, device=device)}
        self.mean, self.deviation = torch.zeros((), device=device), torch.ones((), device=device)
        """What ``add`` and ``restore`` leave for the next step; before the first, scores stay as they are."""

    def add(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Take those of a step's scores."""
        now = torch.stack([mean, variance, torch.ones_like(mean)])
        self.state["moving"].lerp_(now, 1 - self._decay)
        self.restore()

    def restore(self) -> None:
        """Go on from ``state``."""
        mean, variance, weight = self.state["moving"].unbind()
        known = weight > 0
        self.mean.copy_(torch.where(known, mean / weight, 0.0))
        self.deviation.copy_(torch.where(known, (variance / weight).sqrt(), 1.0))
