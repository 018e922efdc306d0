"""Updates that are clipped and noised before anything of them leaves their site (Gaussian mechanism, local to a site)."""

import math
import secrets
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_ext.optim.rounding import seed_of, shard_of
from titan_ext.semi_sync.plan.rule import Apply, SyncRule
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.site.shards import counted_once
from titan_ext.semi_sync.state.outer_optimizers import OuterOptimizer
from titan_ext.semi_sync.state.synced_parameters import SyncedParameters
from titan_ext.semi_sync.state.synced_state import BindOptions
from titan_ext.semi_sync.state.tensors import BoundTensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """How an update is clipped and noised."""

    clip: float
    """Euclidean norm that no update exceeds."""
    multiplier: float
    """Standard deviation of the noise of each element, divided by ``clip``; 0 clips alone."""


class Noised:
    """Clips and noises updates of some parameters of a site. Building it, and each call, is a collective over the site.

    Args:
        noise: how.
        tensors: the parameters on this rank.
        site: the ranks that hold all of them.
    """

    def __init__(self, noise: Noise, tensors: BoundTensors, site: SiteRanks) -> None:
        self._noise, self._tensors, self._site = noise, tensors, site
        self._counts = counted_once(tensors.names, tensors.view.tensor, site)

    @torch.no_grad()
    def noise_(self, update: torch.Tensor) -> None:
        """Clip an update (fp32 ``[elements]``) and add new noise, in place; what is not finite stays so.

        Ranks that hold the same shard add the same noise to it. It comes from torch's generator, from a new secret seed.
        """
        parts = self._tensors.split(update)
        own = sum(
            torch.linalg.vector_norm(part, dtype=torch.float64).item() ** 2
            for part, counts in zip(parts, self._counts, strict=True)
            if counts
        )
        told = self._site.gather((own, secrets.randbits(62)))
        norm, seed = math.sqrt(sum(square for square, _ in told)), told[0][1]
        if not norm <= self._noise.clip:
            update.mul_(self._noise.clip / norm)
        deviation = self._noise.clip * self._noise.multiplier
        for name, part in zip(self._tensors.names, parts if deviation else (), strict=False):
            shard = shard_of(self._tensors.view.tensor(name))
            generator = torch.Generator().manual_seed(seed_of(seed, zlib.crc32(name.encode()), *shard))
            part.add_(torch.randn(part.shape, generator=generator).to(part.device), alpha=deviation)


@dataclass(frozen=True, kw_only=True, slots=True)
class NoisedStep(Apply):
    """The mean, or an outer step, of updates that were clipped and noised."""

    plain_sum: ClassVar[bool] = True
    keeps_private: ClassVar[bool] = True

    optimizer: OuterOptimizer | None
    """None takes the mean itself."""
    noise: Noise

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> "NoisedParameters":
        """Parameters with a global copy."""
        return NoisedParameters(rule, tensors, options)


class NoisedParameters(SyncedParameters):
    """Sends updates that are clipped and noised."""

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        assert isinstance(rule.apply, NoisedStep)
        self.sends_difference = True
        self._noised = Noised(rule.apply.noise, tensors, options.site)

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """The pseudo-gradient, clipped and noised. A collective over the site."""
        super().write(out, step)
        self._noised.noise_(out)
