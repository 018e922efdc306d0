"""SPARTA (openreview stFPf3gzq1): after every inner step a small random fraction of the parameters is averaged.

Every site picks the same elements, so no indices travel. Each element comes up exactly once in
``1 / sparta_fraction`` steps, at a random place (one of the variants of the authors' code). Every
``sync_every`` steps all parameters are averaged, or take the outer optimizer's step (SPARTA + DiLoCo).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from titan_ext.optim.rounding import copy_randomly
from titan_ext.semi_sync.methods.registry import MethodContext, register_method
from titan_ext.semi_sync.plan.rule import Apply, SyncRule
from titan_ext.semi_sync.state.synced_parameters import average_or_step
from titan_ext.semi_sync.state.synced_state import AppliedRound, BindOptions, StateFacts, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors
from titan_ext.semi_sync.wire.reductions import AllReduce


@dataclass(frozen=True, kw_only=True)
class SpartaSettings:
    """``[semi_sync.sparta]``.

    Raises:
        ValueError: the fraction is outside its range.
    """

    sparta_fraction: float = 0.005
    """Fraction of the parameters averaged after each inner step, above 0 and at most 1."""

    def __post_init__(self) -> None:
        if not 0 < self.sparta_fraction <= 1:
            raise ValueError(f"sparta_fraction = {self.sparta_fraction}: must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledAverage(Apply):
    """The mean of a random fraction of the parameters."""

    fraction: float

    def bind(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
        """Parameters of which a sample travels."""
        return SampledParameters(rule, tensors, options)


class SampledParameters(SyncedState):
    """Stretches of ``1 / share`` elements; each step sends one of each, shifted by chance once a cycle."""

    facts = StateFacts(elementwise=False)  # the elements are counted over a rank's own shards

    def __init__(self, rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> None:
        super().__init__(rule, tensors, options)
        assert isinstance(rule.apply, SampledAverage)
        self._stretch = math.ceil(1 / rule.apply.fraction)
        self._ends = torch.tensor([shape.numel() for shape in tensors.shapes]).cumsum(0)
        # Other elements each time: what a codec lost of one sample is not owed to the next.
        self.reduction = AllReduce(rule.wire.bucket_elements)
        self._cycle = -1
        self._shifts = torch.empty(0, dtype=torch.int64)

    @property
    def numel(self) -> int:
        """One element of every stretch."""
        return math.ceil(self.elements / self._stretch)

    @torch.no_grad()
    def write(self, out: torch.Tensor, step: int) -> None:
        """The chosen elements, zeros where the last stretch is too short to have one."""
        out.zero_()
        start = 0
        for local, places in self._chosen(step):
            out[start : start + len(places)] = local[places]
            start += len(places)

    @torch.no_grad()
    def apply(self, total: torch.Tensor, of: AppliedRound) -> None:
        """The mean of the chosen elements."""
        mean, start = of.mean(total), 0
        for place, (local, places) in enumerate(self._chosen(of.step)):
            chosen = torch.empty(len(places), dtype=local.dtype, device=local.device)
            copy_randomly(chosen, mean[start : start + len(places)].to(local.device), self.seed(of.step, place))
            local[places] = chosen
            start += len(places)

    def _chosen(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Flat local tensors and the places in them that step ``step`` averages."""
        cycle, turn = divmod(step, self._stretch)
        if cycle != self._cycle:
            generator = torch.Generator().manual_seed(1000003 * cycle + self.rule.fragment)
            self._shifts = torch.randint(self._stretch, (self.numel,), generator=generator)
            self._cycle = cycle
        starts = torch.arange(self.numel) * self._stretch
        places = starts + (self._shifts + turn) % self._stretch
        places = places[places < self.elements]
        counts = torch.searchsorted(places, self._ends).diff(prepend=torch.zeros(1, dtype=torch.int64))
        firsts = self._ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).neg() + self._ends
        parts = places.split(counts.tolist()) if len(counts) else ()
        return [
            (local.view(-1), (part - first).to(local.device))
            for local, part, first in zip(self.tensors.locals(), parts, firsts, strict=True)
        ]


@register_method(
    "sparta",
    settings=SpartaSettings,
    fixed={"fragment_sync_delay": 0, "fragment_update_alpha": 0.0, "aggregation": "mean"},
    sync_every=100,
    outer_optimizer="average",
)
def sparta(context: MethodContext) -> list[SyncRule]:
    """A sample of each fragment every step, and the whole fragment every ``sync_every`` steps."""
    sample = SampledAverage(fraction=context.settings.sparta_fraction)
    rules = []
    for fragment in range(context.num_fragments):
        place: dict[str, Any] = {"fragment": fragment, "wire": context.wire}
        rules.append(SyncRule(name="sample", period=1, retry=False, apply=sample, **place))
        rules.append(
            SyncRule(
                period=context.sync_every,
                offset=(fragment + 1) * context.spacing,
                apply=average_or_step(context.outer_optimizer),
                **place,
            )
        )
    return rules
