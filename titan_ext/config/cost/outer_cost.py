"""What the outer loop of a configuration will cost: the plan's rules, bound to shapes instead of tensors."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from titan_ext.config.cost.inner_states import InnerStates
from titan_ext.config.outer_loop import plan_of
from titan_ext.semi_sync.build import bind, build_reductions
from titan_ext.semi_sync.plan.plan import SyncRule
from titan_ext.semi_sync.plan.scopes import assign
from titan_ext.semi_sync.site.shards import batches_of
from titan_ext.semi_sync.state.synced_state import SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes
from titan_ext.semi_sync.wire.reductions import AllReduce, Reduction

_FP32 = 4
_NOTHING = dict.fromkeys(
    ("global_copy_bytes", "outer_optimizer_bytes", "send_buffer_bytes", "round_bytes", "rounds", "run_bytes"), 0
)


class _Shapes:
    """A ``ModelView`` without memory: states in their shapes on the meta device.

    Args:
        shape: that of a state of a parameter on the rank, None if there is no such state.
    """

    def __init__(self, shape: Callable[[str, str], torch.Size | None]) -> None:
        self._shape = shape

    def tensors(self, state: str, names: Sequence[str]) -> list[torch.Tensor]:
        return [torch.empty(self._shape(state, name), device="meta") for name in names]

    def keeps(self, state: str, name: str) -> bool:
        return self._shape(state, name) is not None

    def owner(self, name: str) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferCost:
    """Rules of a round that are reduced together, bucket after bucket."""

    site_bytes: int
    """What all ranks of the site send (and receive)."""
    buckets: int
    """Messages of a rank, one after the other."""
    hops: int
    """Between sites, one after the other, that a bucket takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchCost:
    """A kind of round: the rules that are launched together."""

    rules: tuple[str, ...]
    """Their keys."""
    times: int
    """Rounds of this kind in the run."""
    delay: int
    """Inner steps that overlap it."""
    transfers: tuple[TransferCost, ...]

    @property
    def site_bytes(self) -> int:
        """What the site sends (and receives) in one such round."""
        return sum(each.site_bytes for each in self.transfers)


def outer_costs(rounds: "OuterRounds | None") -> dict[str, int]:
    """The fields of ``SiteCost`` that the outer loop accounts for.

    Args:
        rounds: None without an outer loop.
    """
    if rounds is None:
        return dict(_NOTHING)
    launches = rounds.launches()
    states = rounds.states
    kept = sum(state.facts.copies * state.elements + (state.elements if state.feeds_back else 0) for state in states)
    return {
        "global_copy_bytes": _FP32 * kept,
        "outer_optimizer_bytes": _FP32 * sum(_outer_states(state.rule) * state.elements for state in states),
        "send_buffer_bytes": max(map(rounds.launch_memory, rounds.groups), default=0),
        "round_bytes": max((each.site_bytes for each in launches), default=0),
        "rounds": sum(each.times for each in launches),
        "run_bytes": sum(each.site_bytes * each.times for each in launches),
    }


class OuterRounds:
    """A site's rules and what an exchange of each takes.

    Args:
        site: the site.
        shapes: of the whole parameters, by name.
        on_site: elements of each parameter on all ranks of the site, copies included.
        held: for each rank of the pipeline the shapes of what it holds.
        fullest: the one among them whose memory counts.
    """

    def __init__(
        self,
        site: Any,
        shapes: Mapping[str, torch.Size],
        on_site: Mapping[str, int],
        held: Sequence[Mapping[str, torch.Size]],
        fullest: int,
    ) -> None:
        self._site = site
        self._shapes = shapes
        self._on_site = on_site
        self.plan = plan_of(site.config)
        self._home = assign({name: shape.numel() for name, shape in shapes.items()}, self.plan)
        self._inner = InnerStates(site.config.optimizer)
        self._stages = [[self._bound(rule, names) for rule in self.plan.rules] for names in held]
        self._reductions = [build_reductions(stage) for stage in self._stages]
        self._fullest = fullest
        self.states = self._stages[fullest]
        """The plan's rules, as the fullest rank holds them."""
        self.groups = rules_by_launch(self.plan.rules, site.config.training.steps)
        """Rules that travel together, by their places in the plan, and how often."""

    def launches(self) -> list[LaunchCost]:
        """All kinds of rounds of the run."""
        return [
            LaunchCost(
                rules=tuple(self.states[index].rule.key for index in launched),
                times=times,
                delay=max(self.states[index].rule.delay for index in launched),
                transfers=tuple(map(self._transfer, self._together(launched))),
            )
            for launched, times in self.groups.items()
        ]

    def _together(self, launched: Sequence[int]) -> list[list[int]]:
        """Rules that are reduced alike; see ``Exchange``, which makes one stretch of neighbours."""
        reductions = self._reductions[self._fullest]
        runs: list[list[int]] = []
        for index in launched:
            if runs and reductions[runs[-1][0]] is reductions[index]:
                runs[-1].append(index)
            else:
                runs.append([index])
        return runs

    def _transfer(self, run: Sequence[int]) -> TransferCost:
        reduction = self._reductions[self._fullest][run[0]]
        largest = max(sum(stage[index].numel for index in run) for stage in self._stages)
        if self._site.config.semi_sync.pairing == "leader":
            largest *= self._site.layout.ranks // len(self._stages)
        bucket = self.states[run[0]].rule.wire.bucket_elements
        return TransferCost(
            site_bytes=sum(map(self.rule_bytes, run)),
            buckets=max(1, math.ceil(largest / bucket)),
            hops=reduction.hops(self._site.count),
        )

    def rule_bytes(self, index: int) -> int:
        """What all ranks of the site send for a rule in one round."""
        state, reduction, sites = self.states[index], self._reductions[self._fullest][index], self._site.count
        names = sorted(self._covered(state.rule, self._shapes))
        if self._site.config.semi_sync.pairing == "leader":
            return _leader_bytes(state, reduction, {name: self._shapes[name].numel() for name in names}, sites)
        if isinstance(reduction, AllReduce) and state.facts.elementwise:
            elements = state.facts.values_per_element * sum(self._on_site[name] for name in names)
            return ring_all_reduce_bytes(_FP32 * elements, sites)
        # A message's size follows from what one rank holds; uneven shards count as the largest.
        return (self._site.layout.ranks // len(self._stages)) * sum(
            reductions[index].wire_bytes(stage[index].numel, sites)
            for stage, reductions in zip(self._stages, self._reductions, strict=True)
        )

    def launch_memory(self, launched: Sequence[int]) -> int:
        """Bytes of the buffers of a round of these rules, on the fullest rank."""
        reductions = self._reductions[self._fullest]
        scratch = max(
            reductions[index].scratch_elements(self.states[index].numel, self._site.count) for index in launched
        )
        return _FP32 * (sum(self.states[index].numel for index in launched) + scratch)

    def _bound(self, rule: SyncRule, held: Mapping[str, torch.Size]) -> SyncedState:
        def shape(state: str, name: str) -> torch.Size | None:
            return self._inner.shape(state, name, self._shapes[name], held[name])

        return bind(rule, BoundTensors(_Shapes(shape), rule.state, list(self._covered(rule, held))))

    def _covered(self, rule: SyncRule, held: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        """Shapes of what the rule covers on a rank that holds ``held``."""
        found = {
            name: self._inner.shape(rule.state, name, self._shapes[name], shape)
            for name, shape in held.items()
            if self._home.get(name) == (rule.scope, rule.fragment)
        }
        return {name: shape for name, shape in found.items() if shape is not None}


def _outer_states(rule: SyncRule) -> int:
    """State tensors that the rule's outer optimizer keeps of a parameter."""
    optimizer = getattr(rule.apply, "optimizer", None)
    return 0 if optimizer is None else optimizer.state_copies()


def rules_by_launch(rules: Sequence[SyncRule], steps: int) -> dict[tuple[int, ...], int]:
    """Rounds of a run: which rules travel together, and how often."""
    launched: dict[int, list[int]] = {}
    for index, rule in enumerate(rules):
        due = [steps + 1] if rule.final else range((rule.offset - 1) % rule.period + 1, steps + 1, rule.period)
        for step in due:
            launched.setdefault(step, []).append(index)
    groups: dict[tuple[int, ...], int] = {}
    for together in launched.values():
        groups[tuple(together)] = groups.get(tuple(together), 0) + 1
    return groups


def _leader_bytes(state: SyncedState, reduction: Reduction, sizes: Mapping[str, int], sites: int) -> int:
    total = reduction.wire_bytes(state.plain_numbers, sites)
    for batch in batches_of(sizes, state.rule.wire.bucket_elements):
        total += state.facts.values_per_element * reduction.wire_bytes(sum(sizes[name] for name in batch), sites)
    return total
