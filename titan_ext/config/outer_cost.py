"""What the outer loop of a configuration will cost: the plan's rows, bound to shapes instead of tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from titan_ext.config.inner_states import InnerStates
from titan_ext.semi_sync.binding import kind_of
from titan_ext.semi_sync.ledger import ring_all_reduce_bytes
from titan_ext.semi_sync.pairing.shards import batches_of
from titan_ext.semi_sync.plan import SyncRow
from titan_ext.semi_sync.reduction import AllReduce
from titan_ext.semi_sync.scopes import deal, settings_by_scope
from titan_ext.semi_sync.synced import SyncedRow

_FP32 = 4
# State tensors of an outer optimizer, of the size of the parameter; others are taken to keep two as Adam does.
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
    outer = site.config.semi_sync.resolved()
    plan = outer.plan()
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    home, settings = deal(sizes, outer), settings_by_scope(outer)
    states = InnerStates(site.config.optimizer)
    stages = [[_bound(row, _held(row, names, home, shapes, states), settings[row.scope]) for row in plan.rows] for names in held]
    rows = stages[fullest]
    defaults = [settings[row.scope].build_reduction() for row in plan.rows]
    led = outer.pairing == "leader"

    def bytes_of(index: int) -> int:
        reduction = rows[index].reduction or defaults[index]
        row = plan.rows[index]
        names = [
            name
            for name in sizes
            if home.get(name) == (row.scope, row.fragment) and states.shape(row.state, name, shapes[name], shapes[name]) is not None
        ]
        if led:
            return _led_bytes(rows[index], reduction, {name: sizes[name] for name in sorted(names)}, site.count, outer)
        plain = isinstance(reduction, AllReduce) and rows[index].any_layout
        if plain:
            elements = rows[index].values_per_element * sum(on_site[name] for name in names)
            return ring_all_reduce_bytes(_FP32 * elements, site.count)
        # A message's size follows from what one rank holds; uneven shards count as the largest.
        return (site.layout.ranks // len(stages)) * sum(
            (stage[index].reduction or defaults[index]).wire_bytes(stage[index].numel, site.count) for stage in stages
        )

    def memory_of(launched: Sequence[int]) -> int:
        scratch = max((rows[i].reduction or defaults[i]).scratch_elements(rows[i].numel, site.count) for i in launched)
        return _FP32 * (sum(rows[index].numel for index in launched) + scratch)

    groups = rows_by_launch(plan.rows, site.config.training.steps)
    sent = {launched: sum(bytes_of(index) for index in launched) for launched in groups}
    feeds_back = [row.elements for row in rows if row.feeds_back]
    stepped = sum(_outer_states(settings[row.row.scope]) * row.elements for row in rows if row.row.outer_optimizer)
    return {
        "global_copy_bytes": _FP32 * (sum(row.copies * row.elements for row in rows) + sum(feeds_back)),
        "outer_optimizer_bytes": _FP32 * stepped,
        "send_buffer_bytes": max(map(memory_of, groups), default=0),
        "round_bytes": max(sent.values(), default=0),
        "rounds": sum(groups.values()),
        "run_bytes": sum(sent[launched] * times for launched, times in groups.items()),
    }


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


def _held(row: SyncRow, held: Mapping, home: Mapping, shapes: Mapping, states: InnerStates) -> dict[str, torch.Size]:
    """Shapes of what the row covers on a rank that holds ``held``."""
    found = {
        name: states.shape(row.state, name, shapes[name], shape)
        for name, shape in held.items()
        if home.get(name) == (row.scope, row.fragment)
    }
    return {name: shape for name, shape in found.items() if shape is not None}


def _bound(row: SyncRow, held: Mapping[str, torch.Size], outer: Any) -> SyncedRow:
    return kind_of(row)(row, list(held), _Shapes(held), outer)


def _led_bytes(row: SyncedRow, reduction: Any, sizes: Mapping[str, int], sites: int, outer: Any) -> int:
    total = reduction.wire_bytes(row.plain_numbers, sites)
    for batch in batches_of(sizes, max(1, int(outer.bucket_mib * 2**18))):
        total += row.values_per_element * reduction.wire_bytes(sum(sizes[name] for name in batch), sites)
    return total
