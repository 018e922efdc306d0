"""SPARTA (openreview stFPf3gzq1): after every inner step a small random share of the parameters is averaged.

Every site picks the same elements, so no indices travel. Each element comes up exactly once in
``1 / share`` steps, at a random place (one of the variants of the authors' code). Every
``sync_every`` steps all parameters are averaged, or take the outer optimizer's step (SPARTA + DiLoCo).
"""

import math
from typing import Any

import torch

from titan_ext.semi_sync.methods import register_method
from titan_ext.semi_sync.plan.plan import PARAMETERS, SyncPlan, SyncRow
from titan_ext.semi_sync.state.synced_state import Landing, SyncedRow
from titan_ext.semi_sync.wire.reductions import AllReduce


class SampledRow(SyncedRow):
    """Stretches of ``1 / share`` elements; each step sends one of each, shifted by chance once a cycle."""

    any_layout = False  # the elements are counted over a rank's own shards

    def __init__(self, row, names, view, config, device=None) -> None:
        super().__init__(row, names, view, config, device)
        self._stretch = math.ceil(1 / config.sparta_share)
        self._ends = torch.tensor([shape.numel() for shape in self._shapes]).cumsum(0)
        # Other elements each time: what a codec lost of one sample is not owed to the next.
        self.reduction = AllReduce(int(config.bucket_mib * 2**18) or 1)
        self._cycle = -1
        self._shifts = torch.empty(0, dtype=torch.int64)

    @property
    def numel(self) -> int:
        """One element of every stretch."""
        return math.ceil(self.elements / self._stretch)

    @torch.no_grad()
    def write(self, out: torch.Tensor, clock: int) -> None:
        """The chosen elements, zeros where the last stretch is too short to have one."""
        out.zero_()
        start = 0
        for local, places in self._chosen(clock):
            out[start : start + len(places)] = local[places]
            start += len(places)

    @torch.no_grad()
    def apply(self, total: torch.Tensor, landing: Landing) -> None:
        """The mean of the chosen elements."""
        mean, start = landing.mean(total), 0
        for local, places in self._chosen(landing.clock):
            local[places] = mean[start : start + len(places)].to(local)
            start += len(places)

    def _chosen(self, clock: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Flat local tensors and the places in them that step ``clock`` averages."""
        cycle, turn = divmod(clock, self._stretch)
        if cycle != self._cycle:
            generator = torch.Generator().manual_seed(1000003 * cycle + self.row.fragment)
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
            for local, part, first in zip(self.locals(), parts, firsts)
        ]


@register_method(
    "sparta",
    fixed={"fragment_sync_delay": 0, "fragment_update_alpha": 0.0, "aggregation": "mean"},
    sync_every=100,
    outer_optimizer="average",
    sparta_share=0.005,
)
def sparta(config) -> SyncPlan:
    """A sample of each fragment every step, and the whole fragment every ``sync_every`` steps."""
    rows: list[Any] = []
    for fragment in range(config.num_fragments):
        rows.append(SyncRow(name="sample", kind=SampledRow, state=PARAMETERS, fragment=fragment, period=1, retry=False))
        rows.append(
            SyncRow(
                fragment=fragment,
                period=config.sync_every,
                offset=(fragment + 1) * (config.sync_every // config.num_fragments),
                outer_optimizer=config.outer_optimizer != "average",
            )
        )
    return SyncPlan(tuple(rows))
