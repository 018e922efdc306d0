"""A plan and a rank's tensors, put together to the parts of the engine."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from titan_ext.semi_sync.compat.torchft_manager import adapt_manager
from titan_ext.semi_sync.plan.plan import LATE_WORK_NEEDS, PARAMETERS, SyncPlan, SyncRule, Wire, short_hash
from titan_ext.semi_sync.plan.regions import REGION, level_labels
from titan_ext.semi_sync.plan.schedule import Progress, Schedule
from titan_ext.semi_sync.plan.scopes import assign, matches
from titan_ext.semi_sync.round.agreement import BITS, MOST_GROUPS, MOST_RULES, NAME_BYTES
from titan_ext.semi_sync.round.box import RoundBox
from titan_ext.semi_sync.round.clock import Clock
from titan_ext.semi_sync.round.commit import Committer
from titan_ext.semi_sync.round.commit_log import CommitLog
from titan_ext.semi_sync.round.contributions import ErrorFeedback
from titan_ext.semi_sync.round.differences import InCommon
from titan_ext.semi_sync.round.exchange import Exchange
from titan_ext.semi_sync.round.healing import Healing
from titan_ext.semi_sync.round.lineage import Lineage
from titan_ext.semi_sync.round.outer_norms import OuterNorms
from titan_ext.semi_sync.round.participation import Participation
from titan_ext.semi_sync.round.round import InFlightRound
from titan_ext.semi_sync.site.by_leader import ByLeader
from titan_ext.semi_sync.site.by_rank import ByRank
from titan_ext.semi_sync.site.leader_manager import LeaderManager
from titan_ext.semi_sync.site.pairing import Pairing
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.site.shards import SiteShards
from titan_ext.semi_sync.sources.bank import Bank
from titan_ext.semi_sync.sources.source import Source, Turn
from titan_ext.semi_sync.sources.turns import SourceTurns
from titan_ext.semi_sync.state.checksum import SharedChecksum
from titan_ext.semi_sync.state.group_parameters import WithGroup
from titan_ext.semi_sync.state.sparse_tables import SparseRows, SparseTable, reduce_by_row
from titan_ext.semi_sync.state.synced_state import BindOptions, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors
from titan_ext.semi_sync.state.untrained import FROZEN, AverageBuffers, with_buffers
from titan_ext.semi_sync.state.views import ModelView, warn_of_rounding
from titan_ext.semi_sync.wire.ledger import RoundRecord
from titan_ext.semi_sync.wire.manager import ReplicaManager, wire_device
from titan_ext.semi_sync.wire.reductions import AllReduce, Reduction
from titan_ext.semi_sync.wire.some_sites import WithinGroup
from titan_ext.semi_sync.wire.through_regions import ThroughRegions
from titan_ext.semi_sync.wire.token_row_map import TokenRowMap


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteOptions:
    """Who a site is, and what it chooses for itself; the plan holds what all sites share."""

    name: str = ""
    """Under which commits are recorded; no two sites of a run share one. At most 64 bytes."""
    weight: float = 1.0
    """Its weight under ``weighting = "site"``."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What it has in common with some of the others, by key, such as ``{"language": "de"}``; for scopes with
    ``shared = "group"``."""
    ranks: SiteRanks = field(default_factory=SiteRanks)
    """Its ranks; by default those of the default process group."""
    commit_log: CommitLog | None = None
    """Where commits are recorded; that of rank 0 counts."""
    allow_rollback: bool = False
    """Go on from a checkpoint older than the site's last commit even if a site that took part in it is missing."""
    token_rows: TokenRowMap | None = None
    """Which rows of the run's tables it holds, for scopes with ``shared = "sparse_rows"``."""
    scope_rows: Mapping[str, TokenRowMap] = field(default_factory=dict)
    """By scope, where its rows stand for something else than the others'."""
    heartbeat_timeout_seconds: float = 0.0
    """After which the lighthouse takes a site for dead. A round that breaks is tried again after about as long; until
    then a quorum would be waited for, and the inner loop goes on instead."""
    norms_every: int = 0
    """Inner steps from one round whose norms are measured to the next, at least; 0: none is."""
    pairing: Literal["rank", "leader"] = "rank"
    """Who exchanges with the other sites: each rank, or rank 0 for all."""
    outer_state_device: Literal["same", "cpu"] = "same"
    """Where the global copy, the outer optimizer's state and the buffers lie."""
    clock: Clock = field(default_factory=Clock)
    """What it takes time from."""
    measure_loss: Callable[[], float] | None = None
    """Mean loss, in nats a token, of the parameters as they are on the site's own held-out text, for weights by loss
    (``plan.weighting.needs_loss``). Called on all ranks, which get the same, after a round that was committed."""
    make_in_flight: Callable[[], InFlightRound] = InFlightRound
    """Makes what runs a round beside inner steps."""
    sources: Sequence[Source] = ()
    """Its data sources, which train one after the other in a round; none: the site is one itself. With
    ``source_placement = "pollen"`` those of the run, equal at all sites."""
    serve: Callable[[Turn], None] = lambda turn: None
    """Told of each source that is about to train, so that its data comes next."""


def build(
    plan: SyncPlan,
    *,
    model_parts: Iterable[nn.Module],
    optimizers: Any,
    manager: ReplicaManager | None,
    site: SiteOptions,
    outer_optimizers: Sequence[Optimizer] | None = None,
    must_agree: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    keep_local_work: bool = True,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Committer:
    """Put the parts of a rank's outer loop together. A collective over the site.

    Args:
        plan: what the sites exchange.
        model_parts: of this rank.
        optimizers: the inner ones.
        manager: this rank's; None where another rank of the site exchanges for it.
        site: who the site is.
        outer_optimizers: in place of the plan's.
        must_agree: what else has to be equal at sites that exchange, by configuration key.
        settings: those behind the plan, by configuration key, to name a difference by.
        model: those behind the model and its layout.
        keep_local_work: whether a round that was not committed is tried again at the next step, with what was done since.
        on_round: called with the record of every round.

    Returns:
        The end of a round, which holds its other phases.

    Raises:
        ValueError: the site's name or the plan is too long, a scope or fragment does not fit the model, a synced state
            does not exist, or nothing measures the loss that sites are weighed by.
    """
    _check(plan, site)
    ranks = site.ranks
    labels = _labels(plan, site)
    lineage = Lineage(site.name, site.commit_log, ranks, allow_rollback=site.allow_rollback)
    view = ModelView(model_parts, optimizers)
    plan = with_buffers(plan, {name for names in ranks.gather(view.buffers()) for name in names})
    states = bind_states(plan, view, site, outer_optimizers)
    warn_of_rounding(view)
    pairing, manager = _pair(plan, site, states, view, adapt_manager(manager))
    device = _device(site, states)
    schedule, progress = Schedule(plan), Progress()
    checksum = SharedChecksum(states, ranks, pairing.speaks_for)
    healing = Healing(
        states,
        lineage=lineage,
        schedule=schedule,
        progress=progress,
        checksum=checksum,
        manager=manager,
        site=ranks,
        keeps_late_work=plan.lateness.keeps_work,
    )
    bank = Bank(states, device, ranks)
    sources = SourceTurns(
        plan,
        sources=site.sources,
        name=site.name,
        states=states,
        view=view,
        bank=bank,
        progress=progress,
        serve=site.serve,
    )
    exchange = Exchange(
        manager=manager,
        states=states,
        in_common=InCommon(
            plan=plan.fingerprint(),
            tensors={key: short_hash(value) for key, value in pairing.fingerprint(states).items()},
            settings=_as_text(must_agree),
            behind_plan=_as_text(settings),
            behind_tensors=_as_text(model),
        ),
        lineage=lineage,
        healing=healing,
        error_feedback=ErrorFeedback(states, device),
        reductions=build_reductions(states, plan.topology),
        pairing=pairing,
        site=ranks,
        plan=plan,
        guard=plan.outlier_guard,
        weighting=plan.weighting,
        groups=plan.groups,
        labels=labels,
        bank=bank,
        device=device,
        wire=wire_device(manager),
        heartbeat_timeout_seconds=site.heartbeat_timeout_seconds,
        clock=site.clock,
    )
    return Committer(
        exchange=exchange,
        schedule=schedule,
        progress=progress,
        checksum=checksum,
        participation=Participation(
            states, plan.sampling, site.name, RoundBox(plan.box, ranks, site.clock, _inner_device(view)), sources
        ),
        view=view,
        norms=OuterNorms(states, ranks, site.norms_every),
        reset_inner_optimizer=plan.reset_inner_optimizer,
        keep_local_work=keep_local_work,
        on_round=on_round,
    )


def _check(plan: SyncPlan, site: SiteOptions) -> None:
    if len(site.name.encode()) > NAME_BYTES:
        raise ValueError(f"site name {site.name!r}: must be at most {NAME_BYTES} bytes")
    if plan.weighting.needs_loss and site.measure_loss is None:
        raise ValueError("weighting: sites are weighed by loss; give measure_loss, which measures it")
    if plan.lateness.keeps_work and not site.name:
        raise ValueError(
            'late_work = "keep": what a late site has brought already is known by its name; give site_name'
        )
    if plan.lateness.keeps_work and len(site.sources) > 1:
        raise ValueError(f'late_work = "keep": {LATE_WORK_NEEDS}')
    if plan.lateness.trains_on and site.pairing == "leader":
        raise ValueError('overdue_result = "train_on": must be "wait" with pairing = "leader"')
    if len(plan.rules) > MOST_RULES:
        raise ValueError(f"{len(plan.rules)} rules in the plan: must be at most {MOST_RULES} (fewer fragments)")


def _labels(plan: SyncPlan, site: SiteOptions) -> tuple[int, ...]:
    """For each of the plan's groups a number of the site's label, equal at sites with an equal label."""
    if len(plan.groups) > MOST_GROUPS:
        raise ValueError(f"scopes: shared by {', '.join(plan.groups)}: must be at most {MOST_GROUPS} labels")
    region = site.labels.get(REGION)
    known = {**site.labels, **(level_labels(region) if region else {})}
    for group in plan.groups:
        if group not in known:
            raise ValueError(f'site "{site.name}" has no label "{group.split("/")[0]}", by which something is shared')
    return tuple(int(short_hash(known[group]), 16) % 2**BITS for group in plan.groups)


def bind_states(
    plan: SyncPlan, view: ModelView, site: SiteOptions, outer_optimizers: Sequence[Optimizer] | None = None
) -> list[SyncedState]:
    """Bind every rule of the plan to the shards that this rank holds, and after them parameters that do not travel.

    A collective over the site.

    Fragments are cut from the whole model, so that every pipeline stage agrees on them; a rank may
    hold nothing of a fragment and still takes part in its rounds.

    Raises:
        ValueError: fragments or scopes that do not fit the model, a state that no optimizer keeps, or one that it keeps
            and a method that averages states leaves out.
    """
    sizes: dict[str, int] = {}
    frozen: set[str] = set()
    for rank_sizes, rank_frozen in site.ranks.gather((view.sizes(), view.frozen())):
        sizes.update(rank_sizes)
        frozen.update(rank_frozen)
    home = assign(sizes | dict.fromkeys(frozen, 0), plan)
    for rule in plan.rules:
        view.check_state(rule.state, rule.required)
    device = torch.device("cpu") if site.outer_state_device == "cpu" else None
    states: list[SyncedState] = []
    for rule in plan.rules:
        names = _names_of(rule, home, view, plan)
        own = outer_optimizers[rule.fragment] if outer_optimizers and not rule.scope else None
        tensors = BoundTensors(view, rule.state, names, device)
        rows = site.scope_rows.get(rule.scope) or site.token_rows or TokenRowMap.all(0)
        options = BindOptions(
            own_outer=own,
            token_rows=rows,
            running_average=plan.weighting.averages_model,
            site=site.ranks,
            earlier=tuple(states),
        )
        states.append(bind(rule, tensors, options))
    _check_covered(states, view)
    for state in states:
        if isinstance(state, SparseTable):
            reduce_by_row(state, [name for name, place in home.items() if place[0] == state.rule.scope], sizes)
    if frozen:
        # All but those of which every site has its own or other rows.
        apart = {rule.scope for rule in plan.rules if isinstance(rule.apply, (SparseRows, WithGroup))}
        names = [name for name in view.frozen() if name in home and home[name][0] not in apart]
        states.append(bind(FROZEN, BoundTensors(view, PARAMETERS, names)))
    return states


def shared_buffers(names: Iterable[str], plan: SyncPlan) -> list[str]:
    """Those of the buffers that travel: no scope keeps them, or the rows beside them, at their site."""
    sparse = {each.scope for each in plan.rules if isinstance(each.apply, SparseRows)}
    apart = [scope.parameters for scope in plan.scopes if not scope.shared or scope.name in sparse]
    return [name for name in names if not any(matches(name, patterns) for patterns in apart)]


def _names_of(rule: SyncRule, home: Mapping[str, tuple[str, int]], view: ModelView, plan: SyncPlan) -> list[str]:
    """What of this rank's tensors a rule covers."""
    if isinstance(rule.apply, AverageBuffers):
        return shared_buffers(view.buffers(), plan)
    return [
        name
        for name, parameter in view.parameters.items()
        if home.get(name) == (rule.scope, rule.fragment) and parameter.requires_grad and view.keeps(rule.state, name)
    ]


def _check_covered(states: Sequence[SyncedState], view: ModelView) -> None:
    """Refuse an optimizer of whose states a method would average only some: the rest would drift apart unseen."""
    covered: dict[str, set[str | None]] = {}
    for state in states:
        for name in (each for each in state.names if each in view.parameters):  # buffers have no states
            covered.setdefault(name, set()).update({view.key(state.rule.state, name)} if state.averages_state else ())
    if not any(covered.values()):
        return
    for name, keys in covered.items():
        left = [key for key in view.shared_states(name) if key not in keys]
        if left:
            raise ValueError(
                f"the method averages the inner optimizer's states, but knows nothing of {left[0]!r}, which it keeps of "
                f"{name}; take another method or optimizer"
            )


def bind(rule: SyncRule, tensors: BoundTensors, options: BindOptions = BindOptions()) -> SyncedState:
    """A rule as a state of this rank."""
    return rule.apply.bind(rule, tensors, options)


def is_elementwise(rule: SyncRule) -> bool:
    """Whether sites that cut their tensors differently can exchange a rule."""
    return _probe(rule).facts.elementwise and rule.wire.aggregation.elementwise


def averages_state(rule: SyncRule) -> bool:
    """Whether a rule replaces an optimizer's state by its mean."""
    return _probe(rule).averages_state


def _probe(rule: SyncRule) -> SyncedState:
    return bind(rule, BoundTensors(ModelView([], []), rule.state, []))


def build_reductions(states: Sequence[SyncedState], topology: str = "flat") -> list[Reduction]:
    """How each state is summed: its own way, or that of its rule's wire, which neighbours of a scope share.

    Args:
        states: the plan's rules bound to this rank.
        topology: the plan's; sums over all sites go through regions where it says so.
    """
    shared: dict[tuple[str, str, Wire, bool], Reduction] = {}
    reductions = []
    for state in states:
        wire, group, own = state.rule.wire, state.rule.group, state.reduction
        through = topology == "regions" and not group and (own is None or isinstance(own, AllReduce))
        key = (state.rule.scope, group, wire, own is None)
        if key not in shared and (own is None or through):
            whole = wire.build_reduction() if own is None else own
            within = WithinGroup(whole, group) if group else whole
            shared[key] = ThroughRegions(whole, wire.bucket_elements) if through else within
        reductions.append(shared[key] if own is None or through else own)
    return reductions


def _pair(
    plan: SyncPlan,
    site: SiteOptions,
    states: Sequence[SyncedState],
    view: ModelView,
    manager: ReplicaManager | None,
) -> tuple[Pairing, ReplicaManager | None]:
    """Who exchanges with whom, and the manager that every rank of the site then has. A collective over the site."""
    if site.pairing != "leader":
        return ByRank(states, site.ranks), manager
    held = {name: view.tensor(name) for name in [*view.parameters, *view.buffers()]}
    shards = SiteShards(held, site.ranks.group, alone=site.ranks.alone)
    bucket_elements = max(rule.wire.bucket_elements for rule in plan.rules)
    return ByLeader(states, shards, bucket_elements), LeaderManager(manager, shards)


def _device(site: SiteOptions, states: Sequence[SyncedState]) -> torch.device:
    if site.outer_state_device == "cpu":
        return torch.device("cpu")
    return next((state.tensors.device for state in states if state.numel), torch.device("cpu"))


def _inner_device(view: ModelView) -> torch.device:
    """Where inner steps run."""
    return next((each.device for each in view.parameters.values()), torch.device("cpu"))


def _as_text(values: Mapping[str, Any] | None) -> dict[str, str]:
    return {key: json.dumps(value, default=str) for key, value in (values or {}).items()}
