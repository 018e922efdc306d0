"""What an outer loop needs of the model, its optimizer, its data and its layout."""

import math
from collections.abc import Collection
from typing import Any

from titan_ext.config.binder import Binder
from titan_ext.config.cost.inner_states import InnerStates
from titan_ext.config.layout import Layout
from titan_ext.config.losses import name_of
from titan_ext.config.model import parameter_shapes
from titan_ext.config.outer_loop import plan_of
from titan_ext.config.settings import Settings
from titan_ext.models.power_linear import PowerLinear
from titan_ext.semi_sync.bind import averages_state, is_elementwise
from titan_ext.semi_sync.methods.registry import METHODS
from titan_ext.semi_sync.methods.sparsyfed import SparseAverage
from titan_ext.semi_sync.plan.components import shares_sparse_rows
from titan_ext.semi_sync.plan.fragments import matches
from titan_ext.semi_sync.plan.plan import SOURCES_NEED, SyncPlan
from titan_ext.semi_sync.plan.regions import REGION
from titan_ext.semi_sync.plan.rule import PARAMETERS
from titan_ext.semi_sync.plan.scopes import assign
from titan_ext.semi_sync.plan.weighting import WEIGHTINGS, OwnWork

_FEW_STEPS = 4
_STRONG_GAIN = 2.0
"""Of the outer step, with its momentum: part "short" of ``titan-ext bench tiny`` is what says so."""

_NO_TEXT = (
    'must be "train", with data.holdout_fraction or files that are called "validation" or "test", for semi_sync.weighting = '
    '"{weighting}": it needs text that the site does not train on'
)


def check_outer_loop(settings: Settings, config: Any, num_sites: int) -> list[str]:
    """Refuse an outer loop that its method, its plan or the model does not allow.

    Args:
        num_sites: sites of the file; others may join them.

    Returns:
        notes for the user.
    """
    binder, outer = Binder(settings), config.semi_sync
    if outer.method == "none":
        if getattr(config.dataloader, "has_sources", False):
            raise settings.error("semi_sync.method", "must be an outer loop with data sources", "none")
        return []
    plan = binder.guard("semi_sync", type(outer), lambda: plan_of(config))
    if plan.num_fragments > 1 or plan.fragments is not None or plan.scopes:
        binder.guard("semi_sync", type(outer), lambda: _assign(config, plan))
    patterns = config.dept.embeddings
    if config.dept.variant != "none" and not any(matches(name, patterns) for name in parameter_shapes(config)):
        raise settings.error("dept.embeddings", "fit no parameter of the model", patterns)
    _check_pruned(settings, config, plan)
    _check_states(settings, config, plan)
    _check_sources(settings, config, plan)
    if plan.weighting.needs_loss and config.dataloader.held_out() is None:
        raise settings.error("data.split", _NO_TEXT.format(weighting=outer.weighting), config.dataloader.split)
    for group in plan.groups:
        if group.split("/")[0] not in config.site.labels:
            if group.startswith(REGION):
                raise settings.error(REGION, "is missing: [semi_sync] speaks of regions, so every site needs one")
            problem = f'has no "{group}", by which a scope of [semi_sync] is shared; every site needs one'
            raise settings.error("labels", problem, config.site.labels)
    if config.training.dtype != "float32" and any(rule.apply.needs_fp32 for rule in plan.rules):
        problem = f'must be "float32" with semi_sync.method = "{outer.method}"'
        raise settings.error("training.dtype", problem, config.training.dtype)
    return _without_effect(config, plan, num_sites)


def _check_pruned(settings: Settings, config: Any, plan: SyncPlan) -> None:
    """Refuse patterns of what is pruned that fit nothing."""
    shapes = parameter_shapes(config)
    for patterns in (list(rule.apply.parameters) for rule in plan.rules if isinstance(rule.apply, SparseAverage)):
        if not any(len(shape) > 1 and matches(name, patterns) for name, shape in shapes.items()):
            raise settings.error("semi_sync.sparsyfed.parameters", "fit no matrix of the model", patterns)


def notes_on_rounds(config: Any, layout: Layout) -> list[str]:
    """What a user should know of boxes that end no round, and of phases that no round has."""
    steps, outer = config.training.steps, config.semi_sync
    if outer.method == "none":
        rounds = 1  # the received model is the one that training starts from
    else:
        rounds = math.ceil(steps / plan_of(config).round_spacing)
    notes = [
        f"training.steps ({steps}) ends before round {phase.from_round}, from which on there is regularizer.phases[{place}] "
        f"({phase.name}): the run has rounds 0 to {rounds - 1}"
        for place, phase in enumerate(config.regularizer.phases)
        if phase.from_round >= rounds
    ]
    sequences = max(config.training.global_batch_size, config.training.local_batch_size * layout.batch)
    tokens = sequences * config.training.seq_len * (outer.sync_every or 0)
    if outer.method != "none" and outer.round_box == "tokens" and outer.round_box_size >= tokens:
        notes.append(
            f"semi_sync.round_box_size = {outer.round_box_size:.0f} tokens ends no round of this site: its "
            f"semi_sync.sync_every = {outer.sync_every} steps are {tokens:,} tokens, and no site takes more steps"
        )
    return notes


def _without_effect(config: Any, plan: SyncPlan, num_sites: int) -> list[str]:
    """Notes on settings that come to nothing, or to less than they say."""
    outer, steps = config.semi_sync, config.training.steps
    notes = METHODS.get(outer.method).notes([group.optimizer_kwargs for group in config.optimizer.param_groups])
    first = min(rule.period for rule in plan.rules if not rule.final)
    if steps < first:
        notes.append(f"training.steps ({steps}) ends before the first sync (every {first} steps)")
    notes += _short_rounds(outer)
    if outer.sites_per_round is not None and outer.sites_per_round >= num_sites:
        notes.append(
            f"semi_sync.sites_per_round = {outer.sites_per_round} of {num_sites} sites: all take part in each round"
        )
    needed = max(rule.wire.aggregation.sites_needed for rule in plan.rules)
    if needed > num_sites:
        notes.append(
            f'semi_sync.aggregation = "{outer.aggregation}" needs {needed} sites to do what it says; of {num_sites} it '
            "leaves out fewer"
        )
    if any(rule.apply.prunes for rule in plan.rules) and not any(config.model_spec.model.traverse(PowerLinear.Config)):
        notes.append(
            f'semi_sync.method = "{outer.method}" prunes a model without layers under a power, in which weights at zero '
            'grow again: plain top-k; for SparsyFed add [[model.converters]] with name = "power_linear"'
        )
    if weights := _unread_weights(config, plan):
        policy = next(
            (name for name in WEIGHTINGS if isinstance(plan.weighting, WEIGHTINGS.get(name))), outer.weighting
        )
        notes.append(f'without effect, because semi_sync.weighting is "{policy}": {", ".join(weights)}')
    if outer.sampling_seed and outer.sites_per_round is None and outer.sources_per_round is None:
        notes.append(
            "without effect, because neither semi_sync.sites_per_round nor semi_sync.sources_per_round is set: "
            "semi_sync.sampling_seed"
        )
    inner = METHODS.get(outer.method).inner
    optimizers = sorted({group.optimizer_name for group in config.optimizer.param_groups})
    if inner and inner not in optimizers:
        notes.append(
            f'semi_sync.method = "{outer.method}" is made for optimizer.name = "{inner}", not {", ".join(optimizers)}'
        )
    return notes


def _unread_weights(config: Any, plan: SyncPlan) -> list[str]:
    """Keys of fixed weights that are set, where the policy does not look at them."""
    light, heavy = (plan.weighting.own_weight(OwnWork(fixed=fixed, tokens=1, steps=1)) for fixed in (1.0, 2.0))
    if light != heavy:
        return []
    sources = getattr(config.dataloader, "source", [])
    own = ["weight"] if config.site.weight != 1.0 else []
    return own + [f"data.source[{place}].weight" for place, each in enumerate(sources) if each.weight != 1.0]


def _check_sources(settings: Settings, config: Any, plan: SyncPlan) -> None:
    """Refuse data sources with what cannot be had of a site that trains several models in turn."""
    data = config.dataloader
    key = "data.source" if data.source else "data.sources"
    if not data.has_sources:
        if plan.sources.placement == "pollen":
            problem = "needs data sources that all sites can read: [[source]] tables, or data.sources"
            raise settings.error("semi_sync.source_placement", problem, "pollen")
        return
    if not plan.takes_sources:
        raise settings.error(key, SOURCES_NEED)
    if plan.weighting.needs_loss:
        problem = "weighs by the loss on held-out text of one corpus, and the site has data sources"
        raise settings.error("semi_sync.weighting", problem, config.semi_sync.weighting)
    if (name := name_of(config.loss)) is not None:
        # Where it is not by its name that the loss looks at tokens, it is by one of these.
        keys = [key for key in ("z_loss", "unigram_documents", "by_source") if name == "cross_entropy"]
        loss_key, value = next(
            ((f"loss.{key}", set_to) for key in keys if (set_to := getattr(config.loss, key))), ("loss.name", name)
        )
        raise settings.error(loss_key, "must be left out with data sources: it keeps statistics of one corpus", value)
    if config.regularizer.phases:
        problem = "must be left out with data sources, which take turns"
        raise settings.error("regularizer.phases", problem, [phase.name for phase in config.regularizer.phases])
    if config.batch_warmup.steps and plan.sources.placement == "pollen":
        problem = 'must be 0 with semi_sync.source_placement = "pollen": a source\'s place in its data follows from equal steps'
        raise settings.error("batch_warmup.steps", problem, config.batch_warmup.steps)
    if config.optimizer_switch.step:
        raise settings.error(
            "optimizer_switch.step",
            "must be left out with data sources, which take turns",
            config.optimizer_switch.step,
        )


def _short_rounds(outer: Any) -> list[str]:
    """A note where the outer momentum carries the parameters much further than the few inner steps between two syncs did."""
    if outer.outer_optimizer != "sgd":
        return []
    every = outer.sync_every
    gain = outer.outer_lr / (1 - outer.outer_momentum) if outer.outer_momentum < 1 else math.inf
    if every > _FEW_STEPS or gain <= _STRONG_GAIN:
        return []
    return [
        f"semi_sync.sync_every = {every}: the outer optimizer (outer_lr {outer.outer_lr:g}, outer_momentum "
        f"{outer.outer_momentum:g}) takes the sites' steps up to {gain:.3g} times as far, which is made for tens of inner steps; "
        f"with {every} of them it overshoots: raise sync_every, or lower outer_lr"
    ]


def notes_on_quorum(config: Any, sites: int) -> list[str]:
    """What a user should know of a quorum below a majority, who may mean it for Decoupled DiLoCo's K.

    Args:
        config: a site's ``Trainer.Config``.
        sites: of the run.
    """
    least, most_of = config.replica.min_sites, sites // 2 + 1
    if config.semi_sync.method == "none" or config.semi_sync.late_work != "keep" or least >= most_of:
        return []
    return [
        f'replica.min_sites = {least}: with semi_sync.late_work = "keep" too a round waits for more than half of the sites that '
        f"are alive ({most_of} of {sites}); the lighthouse forms no smaller quorum, so that no two parts of a run go on from one "
        "commit"
    ]


def _check_states(settings: Settings, config: Any, plan: Any) -> None:
    """Refuse an inner optimizer without the states that the method exchanges."""
    states = InnerStates(config.optimizer)
    kept = states.kept(parameter_shapes(config))
    names = ", ".join(sorted({group.optimizer_name for group in config.optimizer.param_groups}))
    for rule in plan.rules:
        having = [rule.state == PARAMETERS or not keys.isdisjoint(rule.state.split("|")) for keys in kept.values()]
        if (rule.required == "all" and not all(having)) or (rule.required == "some" and not any(having)):
            problem = f"exchanges the inner optimizer's {rule.state.replace('|', ' or ')}, which {names} does not keep"
            raise settings.error("semi_sync.method", problem, config.semi_sync.method)
    _check_covered(settings, config, plan, set().union(*kept.values()) - states.own_keys(), names)


def _check_covered(settings: Settings, config: Any, plan: Any, kept: Collection[str], optimizers: str) -> None:
    """Refuse a method that averages some of the inner optimizer's states and leaves others out."""
    averaged = {key for rule in plan.rules if averages_state(rule) for key in rule.state.split("|")}
    left = sorted({*kept} - averaged)
    if averaged and left:
        problem = f"averages the inner optimizer's states, but knows nothing of {left[0]!r}, which {optimizers} keeps"
        raise settings.error("semi_sync.method", problem, config.semi_sync.method)


def check_pairing(settings: Settings, config: Any) -> None:
    """Refuse leaders for a method that works on each rank's own shards.

    Raises:
        UserError: naming the method.
    """
    outer = config.semi_sync
    if outer.method == "none" or outer.pairing != "leader":
        return
    if not all(is_elementwise(rule) for rule in plan_of(config).rules):
        problem = "works on each rank's own shards and needs one parallel layout at all sites"
        raise settings.error("semi_sync.method", problem, outer.method)


def check_rows(settings: Settings, config: Any, layout: Any) -> None:
    """Refuse to pair ranks that hold different rows of a table which is shared by row.

    Raises:
        UserError: naming the pairing.
    """
    outer, cut = config.semi_sync, layout.shard * layout.context * layout.tensor > 1
    if outer.method != "none" and outer.pairing == "rank" and cut and shares_sparse_rows(outer):
        problem = 'must be "leader" where embeddings are shared by row and cut over ranks'
        raise settings.error("semi_sync.pairing", problem, "rank")


def _assign(config: Any, plan: SyncPlan) -> None:
    assign({name: shape.numel() for name, shape in parameter_shapes(config).items()}, plan)
