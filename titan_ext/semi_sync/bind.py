"""The plan's rules bound to the tensors of a rank, and how each is summed."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.optim import Optimizer

from titan_ext.semi_sync.options import SiteOptions
from titan_ext.semi_sync.plan.fragments import matches
from titan_ext.semi_sync.plan.plan import SyncPlan
from titan_ext.semi_sync.plan.rule import PARAMETERS, SyncRule, Wire
from titan_ext.semi_sync.plan.scopes import assign
from titan_ext.semi_sync.state.group_parameters import WithGroup
from titan_ext.semi_sync.state.sparse_tables import SparseRows, SparseTable, reduce_by_row
from titan_ext.semi_sync.state.synced_state import BindOptions, SyncedState
from titan_ext.semi_sync.state.tensors import BoundTensors
from titan_ext.semi_sync.state.untrained import FROZEN, AverageBuffers
from titan_ext.semi_sync.state.views import ModelView
from titan_ext.semi_sync.wire.reductions import AllReduce, Reduction
from titan_ext.semi_sync.wire.some_sites import WithinGroup
from titan_ext.semi_sync.wire.through_regions import ThroughRegions
from titan_ext.semi_sync.wire.token_row_map import TokenRowMap


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
