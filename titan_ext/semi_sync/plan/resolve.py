"""From settings to a plan, once: nothing below the plan sees the configuration."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from titan_ext.errors import InvalidValue, gather_invalid, refuse, require, require_one_of
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.methods.registry import METHODS, MethodContext, MomentsKept
from titan_ext.semi_sync.plan.box import Box
from titan_ext.semi_sync.plan.checks import (
    SOURCE_KEYS,
    check,
    check_regions,
    check_rounds,
    check_settings,
    check_weighting,
    is_plain,
)
from titan_ext.semi_sync.plan.components import (
    NO_OUTER_LOOP,
    component,
    method_settings,
    outer_optimizer,
    shares_sparse_rows,
    with_defaults,
)
from titan_ext.semi_sync.plan.plan import (
    LATE_WORK_NEEDS,
    SOURCES_NEED,
    Lateness,
    OutlierGuard,
    ScopePatterns,
    SiteSampling,
    SourceTraining,
    SyncPlan,
)
from titan_ext.semi_sync.plan.regions import REGION
from titan_ext.semi_sync.plan.rule import PARAMETERS, SyncRule, Wire
from titan_ext.semi_sync.plan.scopes import OWN_KEYS, ScopeConfig
from titan_ext.semi_sync.plan.weighting import WEIGHTINGS
from titan_ext.semi_sync.state.group_parameters import WithGroup
from titan_ext.semi_sync.state.outer_optimizers import SHARED_KEYS
from titan_ext.semi_sync.state.region_average import RegionAverage, RegionGradients
from titan_ext.semi_sync.state.sparse_tables import SparseRows
from titan_ext.semi_sync.wire.aggregations import AGGREGATIONS
from titan_ext.semi_sync.wire.codecs import CODECS

_SITES_OWN = ("outer_state_device", "pairing")
_OUTER = tuple(SHARED_KEYS.values())


def fill_defaults(config: SemiSyncConfig) -> SemiSyncConfig:
    """A copy with the method's defaults filled in and every value checked.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    if config.method == NO_OUTER_LOOP:
        return replace(config)
    filled = with_defaults(config)
    resolve(filled)
    return filled


def resolve(config: SemiSyncConfig, moments: MomentsKept | None = None) -> SyncPlan:
    """The sync plan of a configuration.

    Args:
        config: with or without its method's defaults.
        moments: those of the inner optimizer, for rules that follow from them; without, a method takes its defaults.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    if config.method == NO_OUTER_LOOP:
        raise ValueError('method = "none": there is no outer loop to build')
    config = with_defaults(config)
    check(config)
    _check_scopes(config)
    check_settings(config)
    rules = _rules(config, moments)
    check_rounds(config, rules)
    check_weighting(config, rules)
    check_regions(config, rules)
    shared = [scope for scope in config.scopes if scope.shared != "local"]
    scoped = [rule for scope in shared for rule in _rules_of_scope(config, scope, moments)]
    plan = SyncPlan(
        rules=(*rules, *scoped, *_rules_of_regions(config, rules)),
        num_fragments=config.num_fragments,
        fragments=None if config.fragments is None else tuple(tuple(each) for each in config.fragments),
        own_fragment=_own_fragment(config),
        scopes=(
            *(
                ScopePatterns(name=each.name, parameters=tuple(each.parameters), shared=each.shared != "local")
                for each in config.scopes
            ),
            *_scopes_of_method(config),
        ),
        sync_point=config.sync_point,
        weighting=component(WEIGHTINGS, config.weighting, config),
        outlier_guard=OutlierGuard(threshold=config.outlier_threshold, action=config.outlier_action),
        sampling=SiteSampling(
            sites_per_round=config.sites_per_round, seed=config.sampling_seed, period=config.sync_every
        ),
        box=Box(
            kind=config.round_box,
            steps=config.sync_every,
            size=config.round_box_size or 0.0,
            grace=config.round_box_grace,
        ),
        sources=_source_training(config),
        reset_inner_optimizer=config.reset_inner_optimizer,
        topology=config.topology,
        lateness=Lateness(
            keeps_work=config.late_work == "keep",
            exponent=config.staleness_exponent,
            trains_on=config.overdue_result == "train_on",
            grace=config.quorum_grace,
        ),
    )
    keeps = config.late_work == "drop" or (plan.keeps_late_work and not shares_sparse_rows(config))
    require(
        keeps,
        "late_work",
        config.late_work,
        f'"drop" with method = "{config.method}" and these settings: {LATE_WORK_NEEDS}',
    )
    for key, default in SOURCE_KEYS.items():
        value = getattr(config, key)
        allowed = f'left out with method = "{config.method}" and these settings: {SOURCES_NEED}'
        require(value == default or plan.takes_sources, key, value, allowed)
    return plan


def _source_training(config: SemiSyncConfig) -> SourceTraining:
    sampled = config.sources_per_round is not None or config.source_placement != "own"
    return SourceTraining(
        per_round=config.sources_per_round,
        seed=config.sampling_seed,
        optimizer=config.source_optimizer or ("stateless" if sampled else "stateful"),
        clock=config.source_clock,
        reset_data=config.reset_source_data,
        placement=config.source_placement,
    )


def settings_by_key(config: SemiSyncConfig) -> dict[str, Any]:
    """What a plan is made of, by configuration key, with the method's defaults."""
    values = asdict(with_defaults(config))
    own = values.pop("settings")
    for key in _SITES_OWN:
        del values[key]
    found = {f"semi_sync.{key}": value for key, value in values.items() if key != "scopes"}
    found |= {f"semi_sync.{name}.{key}": value for name, table in own.items() for key, value in table.items()}
    for place, scope in enumerate(values["scopes"]):
        found |= {f"semi_sync.scopes[{place}].{key}": value for key, value in scope.items()}
    return found


def _rules(config: SemiSyncConfig, moments: MomentsKept | None) -> list[SyncRule]:
    method = METHODS.get(config.method)
    context = MethodContext(
        sync_every=config.sync_every,
        num_fragments=config.num_fragments,
        delay=config.fragment_sync_delay,
        mixing=config.fragment_update_alpha,
        outer_optimizer=outer_optimizer(config),
        wire=Wire(
            codec=component(CODECS, config.codec, config),
            aggregation=component(AGGREGATIONS, config.aggregation, config),
            error_feedback=config.error_feedback,
            bucket_bytes=int(config.bucket_mib * 2**20),
        ),
        moments=moments,
        settings=method_settings(method, config),
    )
    return list(method.rules(context))


def _own_fragment(config: SemiSyncConfig) -> tuple[str, ...]:
    method = METHODS.get(config.method)
    return tuple(method.own_fragment(method_settings(method, config)))


def _scopes_of_method(config: SemiSyncConfig) -> Sequence[ScopePatterns]:
    method = METHODS.get(config.method)
    return method.scopes(method_settings(method, config))


def _check_scopes(config: SemiSyncConfig) -> None:
    """Refuse scopes that cannot be; each value of theirs by its place in the list."""
    names = [scope.name for scope in config.scopes]
    for place, scope in enumerate(config.scopes):
        key = f"scopes[{place}]"
        unique = scope.name.isidentifier() and names.count(scope.name) == 1
        require(unique, f"{key}.name", scope.name, "a name of its own, of letters, digits and '_'")
        patterns = "a list of patterns of parameters' names, such as 'tok_embeddings.*'"
        require(bool(scope.parameters), f"{key}.parameters", scope.parameters, patterns)
        require_one_of(f"{key}.shared", scope.shared, ("full", "group", "sparse_rows", "local"))
        _check_group(key, scope)
        with gather_invalid() as invalid:
            _of_scope(config, scope)
        for each in invalid:
            if getattr(scope, each.key, None) is not None:  # others are those of the whole, and told of it
                refuse(InvalidValue(f"{key}.{each.key}", each.value, each.problem))


def _check_group(key: str, scope: ScopeConfig) -> None:
    if scope.shared != "group":
        require(scope.group is None, f"{key}.group", scope.group, 'left out unless shared = "group"')
    else:
        allowed = '"region", or a key of the sites\' labels, such as "language"'
        require(bool(scope.group), f"{key}.group", scope.group, allowed)


def _of_scope(config: SemiSyncConfig, scope: ScopeConfig) -> SemiSyncConfig:
    """The outer loop's settings for a scope."""
    own = {key: getattr(scope, key) for key in OWN_KEYS if getattr(scope, key) is not None}
    if own.get("outer_optimizer", config.outer_optimizer) != config.outer_optimizer:
        own = dict.fromkeys(_OUTER) | own
    scoped = replace(
        config, scopes=[], fragments=None, num_fragments=1, sites_per_round=None, sources_per_round=None, **own
    )
    scoped.settings = config.settings | scope.settings
    if "codec" in own:
        scoped.error_feedback = None
    scoped = with_defaults(scoped)
    check(scoped)
    codec, aggregation = component(CODECS, scoped.codec, scoped), component(AGGREGATIONS, scoped.aggregation, scoped)
    if scope.shared == "sparse_rows":
        require(not codec.sparse, "shared", scope.shared, f'"full" or "local" with codec = "{scoped.codec}"')
        fits = f'"full" or "local" with aggregation = "{scoped.aggregation}"'
        require(aggregation.takes_sparse, "shared", scope.shared, fits)
    return scoped


def _rules_of_scope(config: SemiSyncConfig, scope: ScopeConfig, moments: MomentsKept | None) -> list[SyncRule]:
    """The rules of the method for the parameters of a scope.

    Raises:
        ValueError: the method has ways of its own with what is to be shared by row.
    """
    rules = _rules(_of_scope(config, scope), moments)
    rules = [
        replace(rule, scope=scope.name) for rule in rules if not rule.scope
    ]  # others are of the method's own scopes
    if scope.shared == "full":
        return rules
    if not all(is_plain(rule) for rule in rules):
        raise ValueError(
            f'scopes ({scope.name}): shared = "{scope.shared}": cannot be had with method = "{config.method}"'
        )
    if scope.shared == "group":
        return [replace(rule, group=scope.group, apply=WithGroup(inner=rule.apply)) for rule in rules]
    return [replace(rule, apply=SparseRows(inner=rule.apply)) for rule in rules]


def _rules_of_regions(config: SemiSyncConfig, rules: Sequence[SyncRule]) -> list[SyncRule]:
    """The inner level: every fragment of the parameters or of their gradients, averaged within each region."""
    if config.region_sync_every is None:
        return []
    wire = Wire(bucket_bytes=int(config.bucket_mib * 2**20))
    fragments = sorted({rule.fragment for rule in rules if rule.state == PARAMETERS})
    return [
        SyncRule(
            name=REGION,
            group=REGION,
            fragment=fragment,
            period=config.region_sync_every,
            wire=wire,
            apply=RegionGradients() if config.region_average == "gradients" else RegionAverage(),
        )
        for fragment in fragments
    ]
