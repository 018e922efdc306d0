"""What the outer loop of a configuration will cost: the plan's rules, bound to shapes instead of tensors."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from titan_ext.config.cost.inner_states import InnerStates
from titan_ext.config.fomoe import expert_rows, holders
from titan_ext.config.outer_loop import plan_of
from titan_ext.semi_sync.bind import bind, build_reductions, shared_buffers
from titan_ext.semi_sync.plan.rule import PARAMETERS, SyncRule, not_in_vain
from titan_ext.semi_sync.plan.scopes import assign
from titan_ext.semi_sync.site.shards import batches_of
from titan_ext.semi_sync.state.sparse_tables import SparseTable, reduce_by_row
from titan_ext.semi_sync.state.synced_state import BindOptions, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors
from titan_ext.semi_sync.state.untrained import AverageBuffers, with_buffers
from titan_ext.semi_sync.wire.ledger import ring_all_reduce_bytes
from titan_ext.semi_sync.wire.reductions import AllReduce, Reduction, Turns, reduced_together
from titan_ext.semi_sync.wire.sparse_reductions import SparseReduction
from titan_ext.semi_sync.wire.through_regions import ThroughRegions

_FP32 = 4
_NOTHING = dict.fromkeys(
    ("global_copy_bytes", "outer_optimizer_bytes", "send_buffer_bytes", "round_bytes", "rounds", "run_bytes"), 0
)


class _Shapes:
    """A ``ModelView`` without memory: states in their shapes on the meta device.

    Args:
        shape: that of a state of a parameter on the rank, None if there is no such state.
        settings: the hyper-parameters of a parameter's optimizer.
    """

    def __init__(
        self, shape: Callable[[str, str], torch.Size | None], settings: Callable[[str], dict[str, Any]]
    ) -> None:
        self._shape = shape
        self._settings = settings

    def tensors(self, state: str, names: Sequence[str]) -> list[torch.Tensor]:
        return [torch.empty(self._shape(state, name), device="meta") for name in names]

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors(PARAMETERS, [name])[0]

    def keeps(self, state: str, name: str) -> bool:
        return self._shape(state, name) is not None

    def owner(self, name: str) -> tuple[None, dict[str, Any]]:
        return None, self._settings(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferCost:
    """Rules of a round that are reduced together, bucket after bucket."""

    site_bytes: int
    """What all ranks of the site send (and receive)."""
    turns: Turns
    """Of the rank that holds most."""


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
    """The fields of ``SiteCost`` that the outer loop accounts for; of None all are 0."""
    if rounds is None:
        return dict(_NOTHING)
    launches, states = rounds.launches(), rounds.states
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
        held: for each rank of the pipeline the shapes of the parameters that it holds.
        buffers: likewise of the buffers, which all ranks of a stage hold whole.
        fullest: the one among them whose memory counts.
    """

    def __init__(
        self,
        site: Any,
        shapes: Mapping[str, torch.Size],
        on_site: Mapping[str, int],
        held: Sequence[Mapping[str, torch.Size]],
        buffers: Sequence[Mapping[str, torch.Size]],
        fullest: int,
    ) -> None:
        plan = plan_of(site.config)
        names = shared_buffers([name for stage in buffers for name in stage], plan)
        shared = {name: stage[name] for stage in buffers for name in stage if name in names}
        copies = site.layout.ranks // len(held)
        self._site = site
        self._shapes = {**shapes, **shared}
        self._on_site = {**on_site, **{name: copies * shape.numel() for name, shape in shared.items()}}
        self._buffers = frozenset(shared)
        self.plan = with_buffers(plan, shared)
        self._home = assign({name: shape.numel() for name, shape in shapes.items()}, self.plan)
        self._inner = InnerStates(site.config.optimizer)
        config = site.config
        self._rows = expert_rows(config.fomoe, config.site, config.model_spec.model, config.semi_sync.scopes)
        stages = [{**own, **beside} for own, beside in zip(held, buffers, strict=True)]
        self._stages = [[self._bound(rule, names) for rule in self.plan.rules] for names in stages]
        self._reductions = [self._summed(stage) for stage in self._stages]
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
                transfers=tuple(map(self._transfer, reduced_together(launched, self._reductions[self._fullest]))),
            )
            for launched, times in self.groups.items()
        ]

    def _transfer(self, run: Sequence[int]) -> TransferCost:
        if self._site.config.semi_sync.pairing == "leader":
            turns = self._leader_turns(run)
        else:
            largest = max(sum(stage[index].numel for index in run) for stage in self._stages)
            reduction = self._reductions[self._fullest][run[0]]
            turns = reduction.turns(-(-largest // self._copies(run[0])), self._sites(run[0]))
        return TransferCost(site_bytes=self._site_bytes(run), turns=turns)

    def _leader_turns(self, run: Sequence[int]) -> Turns:
        """Of batches of parameters that a leader collects, one after the other."""
        batches: list[int] = []
        for state in map(self.states.__getitem__, run):
            sizes = {name: self._shapes[name].numel() for name in sorted(self._covered(state.rule, self._shapes))}
            found = [sum(sizes[name] for name in each) for each in batches_of(sizes, state.rule.wire.bucket_elements)]
            batches += state.facts.values_per_element * found
        reduction = self._reductions[self._fullest][run[0]]
        turns = [reduction.turns(batch, self._sites(run[0])) for batch in batches or [0]]
        first, *rest = turns
        trips = sum(each.before for each in turns) + sum(each.hops for each in rest)
        buckets, at_most = sum(each.buckets for each in turns), min(each.at_most for each in turns)
        return replace(first, buckets=buckets, at_most=at_most, before=trips)

    def _copies(self, index: int) -> int:
        """Replicas inside the site, which share the work where values may be cut."""
        state, reduction = self.states[index], self._reductions[self._fullest][index]
        return self._site.layout.replicate if reduction.cuts_anywhere and state.facts.elementwise else 1

    def _site_bytes(self, run: Sequence[int]) -> int:
        """What all ranks of the site send in one round for rules that are reduced together."""
        reduction, sites = self._reductions[self._fullest][run[0]], self._sites(run[0])
        names = {index: sorted(self._covered(self.states[index].rule, self._shapes)) for index in run}
        if self._site.config.semi_sync.pairing == "leader":
            return sum(
                _leader_bytes(self.states[index], reduction, {name: self._shapes[name].numel() for name in own}, sites)
                for index, own in names.items()
            )
        copies = self._copies(run[0])
        if isinstance(reduction, AllReduce) and self.states[run[0]].facts.elementwise:
            elements = sum(
                self.states[index].facts.values_per_element * sum(self._on_site[name] for name in own)
                for index, own in names.items()
            )
            return ring_all_reduce_bytes(_FP32 * elements // copies, sites)
        # A message's size follows from what one rank holds; uneven shards count as the largest.
        return (self._site.layout.ranks // len(self._stages)) * sum(
            reductions[run[0]].wire_bytes(-(-sum(stage[index].numel for index in run) // copies), sites)
            for stage, reductions in zip(self._stages, self._reductions, strict=True)
        )

    def launch_memory(self, launched: Sequence[int]) -> int:
        """Bytes of the buffers of a round of these rules, on the fullest rank."""
        reductions = self._reductions[self._fullest]
        scratch = max(
            reductions[index].scratch_elements(self.states[index].numel, self._sites(index)) for index in launched
        )
        return _FP32 * (sum(self.states[index].numel for index in launched) + scratch)

    def _summed(self, stage: Sequence[SyncedState]) -> list[Reduction]:
        """How each state of a rank is summed; through regions as the sites of the file are in them."""
        own, made = self._site.config.site, build_reductions(stage, self.plan.topology)
        if not own.regions:
            return made
        known = {id(each): each.of_sites(own.regions, own.place) for each in made if isinstance(each, ThroughRegions)}
        return [known.get(id(each), each) for each in made]

    def _sites(self, index: int) -> int:
        """Sites that share a rule: all of the run, or those of the file that have this site's label."""
        group = self.states[index].rule.group
        return self._site.config.site.label_counts[group] if group else self._site.count

    def _bound(self, rule: SyncRule, held: Mapping[str, torch.Size]) -> SyncedState:
        """The rule on a rank; experts that are known to be at some sites travel by row."""
        rows = self._rows.get(rule.scope)
        state = self._bound_with(rule, held, BindOptions(token_rows=rows))
        if rows is not None and isinstance(state, SparseTable):
            names = [name for name, place in self._home.items() if place[0] == rule.scope]
            reduce_by_row(state, names, {name: self._shapes[name].numel() for name in names})
            among = holders(self._site.config.fomoe, self._site.count, self._site.config.model_spec.model)
            assert isinstance(state.reduction, SparseReduction)
            state.reduction = _Shared(state.reduction, among, self._site.index)
        return state

    def _bound_with(self, rule: SyncRule, held: Mapping[str, torch.Size], options: BindOptions) -> SyncedState:
        view: Any = _Shapes(
            lambda state, name: self._shape(state, name, held[name]), lambda name: self._inner.optimizer(name)[1]
        )
        return bind(rule, BoundTensors(view, rule.state, list(self._covered(rule, held))), options)

    def _shape(self, state: str, name: str, held: torch.Size) -> torch.Size | None:
        """Of a state (one of several keys with ``|`` between them) of a parameter of which a rank holds ``held``."""
        if state == PARAMETERS:
            return held
        shapes = self._inner.shapes(name, self._shapes[name], held)
        return next((shapes[key] for key in state.split("|") if key in shapes), None)

    def _covered(self, rule: SyncRule, held: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        """Shapes of what the rule covers on a rank that holds ``held``."""
        averages_buffers = isinstance(rule.apply, AverageBuffers)
        found = {
            name: self._shape(rule.state, name, shape)
            for name, shape in held.items()
            if (name in self._buffers if averages_buffers else self._home.get(name) == (rule.scope, rule.fragment))
        }
        return {name: shape for name, shape in found.items() if shape is not None}


class _Shared(SparseReduction):
    """A reduction by row of which it is known which site holds what."""

    def __init__(self, reduction: SparseReduction, holders: torch.Tensor, site: int) -> None:
        self._reduction, self._among, self._site = reduction, holders, site

    def wire_bytes(self, numel: int, sites: int) -> int:
        return self._reduction.wire_bytes_among(numel, self._among, self._site)

    def turns(self, numel: int, sites: int) -> Turns:
        return self._reduction.turns(numel, sites)

    def scratch_elements(self, numel: int, sites: int) -> int:
        return self._reduction.scratch_elements(numel, sites)


def _outer_states(rule: SyncRule) -> int:
    """State tensors that the rule's outer optimizer keeps of a parameter."""
    optimizer = getattr(rule.apply, "optimizer", None)
    return 0 if optimizer is None else optimizer.state_copies()


def rules_by_launch(rules: Sequence[SyncRule], steps: int) -> dict[tuple[int, ...], int]:
    """Rounds of a run: which rules travel together, and how often."""
    scheduled = [(index, rule) for index, rule in enumerate(rules) if not rule.final]
    # The schedule repeats itself: a long run has no more to be looked at than a short one.
    cycle = math.lcm(*(rule.period for _, rule in scheduled))
    whole, rest = divmod(steps, cycle)
    groups = Counter(
        {launched: whole * times for launched, times in _launches(scheduled, cycle if whole else 0).items()}
    )
    groups.update(_launches(scheduled, rest))
    final = tuple(index for index, rule in enumerate(rules) if rule.final)
    return dict(groups) | ({final: 1} if final else {})


def _launches(rules: Sequence[tuple[int, SyncRule]], steps: int) -> Counter[tuple[int, ...]]:
    """Which of the numbered rules are launched together, and how often, in so many inner steps from the first."""
    launched: dict[int, list[int]] = {}
    for index, rule in rules:
        for step in range((rule.offset - 1) % rule.period + 1, steps + 1, rule.period):
            launched.setdefault(step, []).append(index)
    return Counter(tuple(not_in_vain(dict(rules), each)) for each in launched.values())


def _leader_bytes(state: SyncedState, reduction: Reduction, sizes: Mapping[str, int], sites: int) -> int:
    total = reduction.wire_bytes(state.plain_numbers, sites)
    for batch in batches_of(sizes, state.rule.wire.bucket_elements):
        total += state.facts.values_per_element * reduction.wire_bytes(sum(sizes[name] for name in batch), sites)
    return total
