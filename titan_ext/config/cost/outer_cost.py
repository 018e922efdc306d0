"""What the outer loop of a configuration will cost: the plan's rows, bound to shapes instead of tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from titan_ext.config.cost.inner_states import InnerStates
from titan_ext.semi_sync.binding import kind_of
from titan_ext.semi_sync.plan.plan import SyncRow
from titan_ext.semi_sync.plan.scopes import deal, settings_by_scope
from titan_ext.semi_sync.site.shards import batches_of
from titan_ext.semi_sync.state.synced_state import SyncedRow
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes
from titan_ext.semi_sync.wire.reductions import AllReduce

_FP32 = 4
# State tensors of an outer optimizer, of the size of the parameter; the others keep a momentum, if they have one.
_OUTER_STATES = {"average": 0, "adam": 2, "adagrad": 1, "yogi": 2}
_NOTHING = dict.fromkeys(
    ("global_copy_bytes", "outer_optimizer_bytes", "send_buffer_bytes", "round_bytes", "rounds", "run_bytes"), 0
)


class _Shapes:
    """A ``ModelView`` without memory: one state of each parameter, in its shape on the meta device."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes

    def tensors(self, state: str, names: Sequence[str]) -> list[torch.Tensor]:
        return [torch.empty(self._shapes[name], device="meta") for name in names]


def outer_costs(
    site: Any,
    shapes: Mapping[str, torch.Size],
    on_site: Mapping[str, int],
    held: Sequence[Mapping[str, torch.Size]],
    fullest: int,
) -> dict[str, int]:
    """The fields of ``SiteCost`` that the outer loop accounts for.

    Args:
        site: the site.
        shapes: of the whole parameters, by name.
        on_site: elements of each parameter on all ranks of the site, copies included.
        held: for each rank of the pipeline the shapes of what it holds.
        fullest: the one among them whose memory counts.
    """
    if site.config.semi_sync.method == "none":
        return dict(_NOTHING)
    rounds = _Rounds(site, shapes, on_site, held, fullest)
    rows = rounds.rows
    groups = rows_by_launch(rounds.plan.rows, site.config.training.steps)
    sent = {launched: sum(map(rounds.row_bytes, launched)) for launched in groups}
    feeds_back = [row.elements for row in rows if row.feeds_back]
    stepped = sum(
        _outer_states(rounds.settings[row.row.scope]) * row.elements for row in rows if row.row.outer_optimizer
    )
    return {
        "global_copy_bytes": _FP32 * (sum(row.copies * row.elements for row in rows) + sum(feeds_back)),
        "outer_optimizer_bytes": _FP32 * stepped,
        "send_buffer_bytes": max(map(rounds.launch_memory, groups), default=0),
        "round_bytes": max(sent.values(), default=0),
        "rounds": sum(groups.values()),
        "run_bytes": sum(sent[launched] * times for launched, times in groups.items()),
    }


class _Rounds:
    """A site's rows and what an exchange of each takes; arguments as those of ``outer_costs``."""

    def __init__(
        self,
        site: Any,
        shapes: Mapping[str, torch.Size],
        on_site: Mapping[str, int],
        held: Sequence[Mapping[str, torch.Size]],
        fullest: int,
    ) -> None:
        self._site = site
        self._outer = site.config.semi_sync.resolved()
        self._shapes = shapes
        self._on_site = on_site
        self.plan = self._outer.plan()
        self.settings = settings_by_scope(self._outer)
        self._home = deal({name: shape.numel() for name, shape in shapes.items()}, self._outer)
        self._states = InnerStates(site.config.optimizer)
        self._stages = [[self._bound(row, names) for row in self.plan.rows] for names in held]
        self.rows = self._stages[fullest]
        """The plan's, as the fullest rank holds them."""
        self._defaults = [self.settings[row.scope].build_reduction() for row in self.plan.rows]

    def row_bytes(self, index: int) -> int:
        """What all ranks of the site send for a row in one round."""
        row, reduction, sites = self.rows[index], self._reduction(index), self._site.count
        names = sorted(self._covered(row.row, self._shapes))
        if self._outer.pairing == "leader":
            return _led_bytes(row, reduction, {name: self._shapes[name].numel() for name in names}, sites, self._outer)
        if isinstance(reduction, AllReduce) and row.any_layout:
            elements = row.values_per_element * sum(self._on_site[name] for name in names)
            return ring_all_reduce_bytes(_FP32 * elements, sites)
        # A message's size follows from what one rank holds; uneven shards count as the largest.
        return (self._site.layout.ranks // len(self._stages)) * sum(
            (stage[index].reduction or self._defaults[index]).wire_bytes(stage[index].numel, sites)
            for stage in self._stages
        )

    def launch_memory(self, launched: Sequence[int]) -> int:
        """Bytes of the buffers of a round of these rows, on the fullest rank."""
        scratch = max(
            self._reduction(index).scratch_elements(self.rows[index].numel, self._site.count) for index in launched
        )
        return _FP32 * (sum(self.rows[index].numel for index in launched) + scratch)

    def _reduction(self, index: int) -> Any:
        return self.rows[index].reduction or self._defaults[index]

    def _bound(self, row: SyncRow, held: Mapping[str, torch.Size]) -> SyncedRow:
        covered = self._covered(row, held)
        return kind_of(row)(row, list(covered), _Shapes(covered), self.settings[row.scope])

    def _covered(self, row: SyncRow, held: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        """Shapes of what the row covers on a rank that holds ``held``."""
        found = {
            name: self._states.shape(row.state, name, self._shapes[name], shape)
            for name, shape in held.items()
            if self._home.get(name) == (row.scope, row.fragment)
        }
        return {name: shape for name, shape in found.items() if shape is not None}


def _outer_states(outer: Any) -> int:
    """State tensors that the outer optimizer keeps of a parameter."""
    return _OUTER_STATES.get(outer.outer_optimizer, 1 if outer.outer_momentum else 0)


def rows_by_launch(rows: Sequence[SyncRow], steps: int) -> dict[tuple[int, ...], int]:
    """Rounds of a run: which rows travel together, and how often."""
    launched: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        due = [steps + 1] if row.final else range((row.offset - 1) % row.period + 1, steps + 1, row.period)
        for step in due:
            launched.setdefault(step, []).append(index)
    groups: dict[tuple[int, ...], int] = {}
    for together in launched.values():
        groups[tuple(together)] = groups.get(tuple(together), 0) + 1
    return groups


def _led_bytes(row: SyncedRow, reduction: Any, sizes: Mapping[str, int], sites: int, outer: Any) -> int:
    total = reduction.wire_bytes(row.plain_numbers, sites)
    for batch in batches_of(sizes, max(1, int(outer.bucket_mib * 2**18))):
        total += row.values_per_element * reduction.wire_bytes(sum(sizes[name] for name in batch), sites)
    return total
