"""From settings to a plan, once: nothing below the plan sees the configuration."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any

import titan_ext.semi_sync.methods  # noqa: F401  (registration)
from titan_ext.errors import InvalidValue, gather_invalid, refuse, require, require_one_of
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.methods.registry import METHODS, Method, MethodContext, MomentsKept
from titan_ext.semi_sync.plan.box import Box
from titan_ext.semi_sync.plan.plan import (
    LATE_WORK_NEEDS,
    PARAMETERS,
    SOURCES_NEED,
    Lateness,
    OutlierGuard,
    ScopePatterns,
    SiteSampling,
    SourceTraining,
    SyncPlan,
    SyncRule,
    Wire,
)
from titan_ext.semi_sync.plan.regions import REGION
from titan_ext.semi_sync.plan.scopes import OWN_KEYS, ScopeConfig
from titan_ext.semi_sync.plan.weighting import WEIGHTINGS, SiteWeighting
from titan_ext.semi_sync.registry import Registry
from titan_ext.semi_sync.state.group_parameters import WithGroup
from titan_ext.semi_sync.state.outer_optimizers import OUTER_OPTIMIZERS, SHARED_KEYS, OuterOptimizer
from titan_ext.semi_sync.state.region_average import RegionAverage
from titan_ext.semi_sync.state.sparse_tables import SparseRows
from titan_ext.semi_sync.state.synced_parameters import Average, OuterStep
from titan_ext.semi_sync.wire.aggregations import AGGREGATIONS
from titan_ext.semi_sync.wire.codecs import CODECS
from titan_ext.semi_sync.wire.link import bytes_per_second, number_of_streams

NO_OUTER_LOOP = "none"
"""The ``method`` that trains without an outer loop."""

COMPONENTS: tuple[Registry[Any], ...] = (CODECS, AGGREGATIONS, OUTER_OPTIMIZERS, WEIGHTINGS)
"""What has names in ``[semi_sync]`` and settings in ``[semi_sync.NAME]``, besides methods."""

AVERAGE = "average"
"""The ``outer_optimizer`` that takes the mean as it is."""
_SITES_OWN = ("outer_state_device", "pairing")
_OUTER = tuple(SHARED_KEYS.values())


def method_names() -> list[str]:
    """Names that ``method`` accepts."""
    return [NO_OUTER_LOOP, *METHODS.names()]


def fill_defaults(config: SemiSyncConfig) -> SemiSyncConfig:
    """A copy with the method's defaults filled in and every value checked.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    if config.method == NO_OUTER_LOOP:
        return replace(config)
    filled = _filled(config)
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
    config = _filled(config)
    _check(config)
    _check_scopes(config)
    _check_settings(config)
    rules = _rules(config, moments)
    _check_rounds(config, rules)
    _check_weighting(config, rules)
    _check_regions(config, rules)
    shared = [scope for scope in config.scopes if scope.shared != "local"]
    scoped = [rule for scope in shared for rule in _rules_of_scope(config, scope, moments)]
    plan = SyncPlan(
        rules=(*rules, *scoped, *_rules_of_regions(config, rules)),
        num_fragments=config.num_fragments,
        fragments=None if config.fragments is None else tuple(tuple(each) for each in config.fragments),
        scopes=(
            *(
                ScopePatterns(name=each.name, parameters=tuple(each.parameters), shared=each.shared != "local")
                for each in config.scopes
            ),
            *_scopes_of_method(config),
        ),
        sync_point=config.sync_point,
        weighting=_component(WEIGHTINGS, config.weighting, config),
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
        ),
    )
    keeps = config.late_work == "drop" or (plan.keeps_late_work and not shares_sparse_rows(config))
    require(
        keeps,
        "late_work",
        config.late_work,
        f'"drop" with method = "{config.method}" and these settings: {LATE_WORK_NEEDS}',
    )
    for key, default in _SOURCE_KEYS.items():
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
    values = asdict(_filled(config))
    own = values.pop("settings")
    for key in _SITES_OWN:
        del values[key]
    found = {f"semi_sync.{key}": value for key, value in values.items() if key != "scopes"}
    found |= {f"semi_sync.{name}.{key}": value for name, table in own.items() for key, value in table.items()}
    for place, scope in enumerate(values["scopes"]):
        found |= {f"semi_sync.scopes[{place}].{key}": value for key, value in scope.items()}
    return found


def settings_tables(table: Mapping[str, Any]) -> dict[str, type | None]:
    """The ``[semi_sync.NAME]`` tables that a ``[semi_sync]`` table could have: the dataclass of each, by name.

    Importing what the table names by a dotted path registers it; what cannot be imported has no table.
    """
    for registry in (METHODS, *COMPONENTS):
        name = table.get(registry.key)
        if isinstance(name, str) and "." in name:
            with suppress(ValueError):
                registry.get(name)
    found: dict[str, type | None] = {name: method.settings for name, method in METHODS.items()}
    for registry in COMPONENTS:
        found |= dict(registry.items())
    return found


def shares_sparse_rows(config: SemiSyncConfig) -> bool:
    """Whether some tables are shared by row, of which a rank's cut holds other rows at every site."""
    return any(scope.shared == "sparse_rows" for scope in config.scopes)


# -- one set of settings -------------------------------------------------------------------------------


def _filled(config: SemiSyncConfig) -> SemiSyncConfig:
    method = METHODS.get(config.method)
    outer = config.outer_optimizer or method.defaults.get("outer_optimizer")
    defaults = {**method.outer.get(outer, {}), **method.defaults}
    unset = [each.name for each in fields(config) if getattr(config, each.name) is None]
    filled = replace(config, **{key: defaults[key] for key in unset if key in defaults})
    if filled.error_feedback is None:
        filled.error_feedback = CODECS.get(filled.codec).error_feedback
    if filled.weighting is None:
        filled.weighting = "uniform" if filled.round_box == "steps" else "tokens"
    if filled.fragments is not None:
        filled.num_fragments = len(filled.fragments)
    return filled


def _rules(config: SemiSyncConfig, moments: MomentsKept | None) -> list[SyncRule]:
    method = METHODS.get(config.method)
    context = MethodContext(
        sync_every=config.sync_every,
        num_fragments=config.num_fragments,
        delay=config.fragment_sync_delay,
        mixing=config.fragment_update_alpha,
        outer_optimizer=_outer_optimizer(config),
        wire=Wire(
            codec=_component(CODECS, config.codec, config),
            aggregation=_component(AGGREGATIONS, config.aggregation, config),
            error_feedback=config.error_feedback,
            bucket_bytes=int(config.bucket_mib * 2**20),
        ),
        moments=moments,
        settings=_method_settings(method, config),
    )
    return list(method.rules(context))


def _scopes_of_method(config: SemiSyncConfig) -> Sequence[ScopePatterns]:
    method = METHODS.get(config.method)
    return method.scopes(_method_settings(method, config))


def _component(registry: Registry, name: str, config: SemiSyncConfig) -> Any:
    """What a name stands for, with its own settings."""
    return registry.get(name)(**_own_settings(config, registry.resolve(name)))


def _outer_optimizer(config: SemiSyncConfig) -> OuterOptimizer | None:
    given = {name: getattr(config, key) for name, key in SHARED_KEYS.items() if getattr(config, key) is not None}
    if config.outer_optimizer == AVERAGE:
        _refuse_foreign(given, (), 'outer_optimizer = "average"')
        return None
    kind = OUTER_OPTIMIZERS.get(config.outer_optimizer) if config.outer_optimizer in OUTER_OPTIMIZERS else _load(config)
    names = [each.name for each in fields(kind)]
    _refuse_foreign(given, names, f'outer_optimizer = "{config.outer_optimizer}"')
    if "betas" in given:
        given["betas"] = tuple(given["betas"])
    given = {name: value for name, value in given.items() if name in names}
    own = _own_settings(config, OUTER_OPTIMIZERS.resolve(config.outer_optimizer))
    built = None
    try:
        with gather_invalid() as invalid:
            built = kind(**given, **own)
    except ValueError as error:
        name, _, problem = str(error).partition(" = ")
        raise ValueError(f"{SHARED_KEYS.get(name, name)} = {problem}") from None
    for each in invalid:
        refuse(InvalidValue(SHARED_KEYS.get(each.key, each.key), each.value, each.problem))
    return built


def _load(config: SemiSyncConfig) -> type[OuterOptimizer]:
    try:
        return OUTER_OPTIMIZERS.get(config.outer_optimizer)
    except InvalidValue as error:
        raise InvalidValue(error.key, error.value, f'{error.problem} (or "average")') from None


def _refuse_foreign(given: Mapping[str, Any], known: Sequence[str], of: str) -> None:
    """A setting that would be ignored is refused."""
    for name, value in given.items():
        require(name in known, SHARED_KEYS[name], value, f"left out with {of}, which does not take it")


def _method_settings(method: Method, config: SemiSyncConfig) -> Any:
    own = _own_settings(config, METHODS.resolve(config.method))
    if method.settings is None:
        require(not own, f"settings.{config.method}", own, "left out: the method has no settings of its own")
        return None
    return method.settings(**own)


def _own_settings(config: SemiSyncConfig, name: str) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.settings.get(name, {}).items()
    }


# -- scopes --------------------------------------------------------------------------------------------


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
    scoped = _filled(scoped)
    _check(scoped)
    codec, aggregation = _component(CODECS, scoped.codec, scoped), _component(AGGREGATIONS, scoped.aggregation, scoped)
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
    if not all(_is_plain(rule) for rule in rules):
        raise ValueError(
            f'scopes ({scope.name}): shared = "{scope.shared}": cannot be had with method = "{config.method}"'
        )
    if scope.shared == "group":
        return [replace(rule, group=scope.group, apply=WithGroup(inner=rule.apply)) for rule in rules]
    return [replace(rule, apply=SparseRows(inner=rule.apply)) for rule in rules]


def _rules_of_regions(config: SemiSyncConfig, rules: Sequence[SyncRule]) -> list[SyncRule]:
    """The inner level: every fragment of the parameters, averaged within each region."""
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
            apply=RegionAverage(),
        )
        for fragment in fragments
    ]


def _check_regions(config: SemiSyncConfig, rules: Sequence[SyncRule]) -> None:
    """Refuse a tree for what is not a weighted mean of whole tensors, and levels that do not go together."""
    period, method = config.region_sync_every, config.method
    if config.topology == "regions":
        plain = all(_is_plain(rule) or rule.apply.plain_sum for rule in rules) and not shares_sparse_rows(config)
        allowed = f'"flat" with method = "{method}" or rows of tables, which have ways of their own'
        require(plain, "topology", config.topology, allowed)
        allowed = f'"mean" with topology = "{config.topology}"'
        require(config.aggregation == "mean", "aggregation", config.aggregation, allowed)
    if period is None:
        return
    require(
        1 <= period < config.sync_every,
        "region_sync_every",
        period,
        f"from 1 to below sync_every ({config.sync_every})",
    )
    plain = all(_is_plain(rule) and rule.state == PARAMETERS for rule in rules)
    allowed = f'left out with method = "{method}", which exchanges more than parameters'
    require(plain, "region_sync_every", period, allowed)
    apart = not (config.sites_per_round or config.reset_inner_optimizer or config.fragment_sync_delay)
    apart = apart and config.round_box == "steps"
    allowed = "left out with fragment_sync_delay, sites_per_round, round_box or reset_inner_optimizer"
    require(apart, "region_sync_every", period, allowed)
    loss = _component(WEIGHTINGS, config.weighting, config).needs_loss
    require(not loss, "region_sync_every", period, f'left out with weighting = "{config.weighting}"')


def _is_plain(rule: SyncRule) -> bool:
    """Whether the rule is applied by the mean or an outer step, and not in a method's own way."""
    return type(rule.apply) in (Average, OuterStep)


# -- checks --------------------------------------------------------------------------------------------


def _check(config: SemiSyncConfig) -> None:
    method, period = METHODS.get(config.method), config.sync_every
    for key, value in method.fixed.items():
        require(getattr(config, key) == value, key, getattr(config, key), f'{value!r} with method = "{config.method}"')
    require(period >= 1, "sync_every", period, "at least 1")
    for key, allowed in _CHOICES.items():
        require_one_of(key, getattr(config, key), allowed)
    _check_fragments(config)
    threshold = config.outlier_threshold
    require(threshold == 0 or threshold > 1, "outlier_threshold", threshold, "above 1, or 0 to let everything pass")
    _check_lateness(config)
    require(config.bucket_mib > 0, "bucket_mib", config.bucket_mib, "above 0")
    number_of_streams(config.streams)
    bytes_per_second(config.max_rate)
    _check_wire(config)
    _outer_optimizer(config)


_CHOICES = {
    "sync_point": ("after_step", "before_step"),
    "outlier_action": ("clip", "drop"),
    "late_work": ("drop", "keep"),
    "overdue_result": ("wait", "train_on"),
    "pairing": ("auto", "rank", "leader"),
    "topology": ("flat", "regions"),
    "outer_state_device": ("same", "cpu"),
    "round_box": ("steps", "speed", "seconds", "tokens"),
    "source_optimizer": (None, "stateless", "stateful"),
    "source_clock": ("run", "source", "round"),
    "source_placement": ("own", "pollen"),
}


def _check_lateness(config: SemiSyncConfig) -> None:
    exponent, keeps = config.staleness_exponent, config.late_work == "keep"
    require(0 <= exponent <= 16, "staleness_exponent", exponent, "from 0 to 16")
    unset = exponent == SemiSyncConfig.staleness_exponent
    require(keeps or unset, "staleness_exponent", exponent, 'left out with late_work = "drop"')
    waits = config.overdue_result == "wait" or (keeps and config.fragment_sync_delay > 0 and config.pairing != "leader")
    needed = '"wait" unless late_work = "keep", fragment_sync_delay is above 0 and ranks are paired between sites'
    require(waits, "overdue_result", config.overdue_result, needed)


def _check_fragments(config: SemiSyncConfig) -> None:
    count, period, delay = config.num_fragments, config.sync_every, config.fragment_sync_delay
    require(count >= 1, "num_fragments", count, "at least 1")
    even = f"a divisor of sync_every ({period}), so that fragments sync at even distances"
    if count > period:
        # Raised where others are gathered: what follows would make a rule for each.
        raise InvalidValue("num_fragments", count, f"must be {even}")
    require(period % count == 0, "num_fragments", count, even)
    spacing = period // count
    allowed = f"from 0 to {spacing - 1} (below sync_every / num_fragments = {spacing})"
    require(0 <= delay < spacing, "fragment_sync_delay", delay, allowed)
    require(0 <= config.fragment_update_alpha <= 1, "fragment_update_alpha", config.fragment_update_alpha, "0 to 1")


def _check_wire(config: SemiSyncConfig) -> None:
    codec, aggregation = _component(CODECS, config.codec, config), _component(AGGREGATIONS, config.aggregation, config)
    loses = not (config.error_feedback and codec.lossless)
    require(loses, "error_feedback", config.error_feedback, f'false with codec "{config.codec}", which loses nothing')
    fits = aggregation.weighted or not WEIGHTINGS.get(config.weighting).unequal
    require(fits, "aggregation", config.aggregation, f'"mean" with weighting = "{config.weighting}"')
    fits = aggregation.takes_sparse or not codec.sparse
    require(fits, "aggregation", config.aggregation, f'other than with codec = "{config.codec}": "mean"')
    # Its sums over the ranks of a site may not be issued beside an inner step's collectives.
    fits = aggregation.elementwise or config.fragment_sync_delay == 0
    require(fits, "fragment_sync_delay", config.fragment_sync_delay, f'0 with aggregation = "{config.aggregation}"')


def _check_rounds(config: SemiSyncConfig, rules: Sequence[SyncRule]) -> None:
    """Refuse sampling or boxing sites, or forgetting the inner optimizer, where rounds have no common end."""
    count, method = config.sites_per_round, config.method
    require(count is None or count >= 1, "sites_per_round", count, "at least 1, or left out for all sites")
    for key in ("sites_per_round", "reset_inner_optimizer"):
        overlap = config.num_fragments > 1 or config.fragment_sync_delay > 0
        value = getattr(config, key)
        require(not (value and overlap), key, value, "left out with fragments or a delay: rounds overlap")
    averages = any(rule.state != PARAMETERS for rule in rules)
    allowed = f'false with method = "{method}", which averages the states'
    require(not (config.reset_inner_optimizer and averages), "reset_inner_optimizer", True, allowed)
    own_way = config.sync_point == "before_step" or not all(_is_plain(rule) for rule in rules)
    allowed = f'left out with method = "{method}" or sync_point = "before_step"'
    require(count is None or not own_way, "sites_per_round", count, allowed)
    _check_box(config, own_way)
    _check_source_rounds(config)


def _check_box(config: SemiSyncConfig, own_way: bool) -> None:
    box, size, grace = config.round_box, config.round_box_size, config.round_box_grace
    sized = box in ("seconds", "tokens")
    require(sized or size is None, "round_box_size", size, f'left out with round_box = "{box}"')
    require(not sized or (size or 0) > 0, "round_box_size", size, f'above 0 with round_box = "{box}"')
    require(0 <= grace <= 1, "round_box_grace", grace, "from 0 to 1")
    overlap = config.num_fragments > 1 or config.fragment_sync_delay > 0
    require(box == "steps" or not overlap, "round_box", box, '"steps" with fragments or a delay: rounds overlap')
    allowed = f'"steps" with method = "{config.method}" or sync_point = "before_step"'
    require(box == "steps" or not own_way, "round_box", box, allowed)


_SOURCE_KEYS = {
    "sources_per_round": None,
    "source_optimizer": None,
    "source_clock": "run",
    "reset_source_data": False,
    "source_placement": "own",
}
"""Of ``[semi_sync]``, with what stands where nothing is set."""


def _check_source_rounds(config: SemiSyncConfig) -> None:
    """Refuse what cannot be had together of sources."""
    count = config.sources_per_round
    require(count is None or count >= 1, "sources_per_round", count, "at least 1, or left out for all sources")
    both = count is not None and config.sites_per_round is not None
    require(not both, "sources_per_round", count, "left out with sites_per_round, which samples sites instead")
    keeps = config.reset_inner_optimizer and config.source_optimizer == "stateful"
    allowed = '"stateless" with reset_inner_optimizer, which drops a source\'s states after each round'
    require(not keeps, "source_optimizer", config.source_optimizer, allowed)
    moves = config.source_placement == "pollen" and config.source_optimizer == "stateful"
    allowed = '"stateless" with source_placement = "pollen": a source\'s states stay at the site that had it'
    require(not moves, "source_optimizer", config.source_optimizer, allowed)


def _check_weighting(config: SemiSyncConfig, rules: Sequence[SyncRule]) -> None:
    """Refuse weights by the loss of the received model where a site never has it, and by norms that are not measured."""
    weighting: SiteWeighting = _component(WEIGHTINGS, config.weighting, config)
    if weighting.needs_norms:
        norms = f'above 1 with weighting = "{config.weighting}", which needs the updates\' norms'
        require(config.outlier_threshold > 0, "outlier_threshold", config.outlier_threshold, norms)
    if not weighting.needs_loss:
        return
    mixes = config.num_fragments > 1 or config.fragment_update_alpha > 0
    allowed = "other than by loss with fragments or fragment_update_alpha: no site ever has all of the global model"
    require(not mixes, "weighting", config.weighting, allowed)
    own_way = config.sync_point == "before_step" or not all(_is_plain(rule) for rule in rules)
    allowed = f'other than by loss with method = "{config.method}" or sync_point = "before_step"'
    require(not own_way, "weighting", config.weighting, allowed)


def _check_settings(config: SemiSyncConfig) -> None:
    """Settings of something that is not in use would be ignored."""
    chosen: list[tuple[Registry[Any], str]] = [(METHODS, config.method), (AGGREGATIONS, config.aggregation)]
    chosen.append((WEIGHTINGS, config.weighting))
    parts: list[SemiSyncConfig | ScopeConfig] = [config, *config.scopes]
    for part in parts:
        chosen += [(CODECS, part.codec)] if part.codec else []
        chosen += [(OUTER_OPTIMIZERS, part.outer_optimizer)] if part.outer_optimizer not in (None, AVERAGE) else []
    used = set()
    for registry, name in chosen:
        with suppress(InvalidValue):  # has been refused, or noted
            used.add(registry.resolve(name))
    for part in parts:
        for name, own in part.settings.items():
            require(name in used, f"settings.{name}", own, f"left out unless {_owner_key(name)} is in use")


def _owner_key(name: str) -> str:
    for registry in (METHODS, *COMPONENTS):
        if name in registry:
            return f'{registry.key} = "{name}"'
    return f'"{name}", a method, codec, aggregation, outer optimizer or weighting,'
