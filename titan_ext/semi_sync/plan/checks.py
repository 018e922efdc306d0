"""Refuses settings that cannot be, or that would come to nothing beside others, each by its key."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from titan_ext.errors import InvalidValue, require, require_one_of
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.methods.registry import METHODS
from titan_ext.semi_sync.plan.components import AVERAGE, COMPONENTS, component, outer_optimizer, shares_sparse_rows
from titan_ext.semi_sync.plan.rule import PARAMETERS, SyncRule
from titan_ext.semi_sync.plan.scopes import ScopeConfig
from titan_ext.semi_sync.plan.weighting import WEIGHTINGS, SiteWeighting
from titan_ext.semi_sync.registry import Registry
from titan_ext.semi_sync.state.outer_optimizers import OUTER_OPTIMIZERS
from titan_ext.semi_sync.state.synced_parameters import Average, OuterStep
from titan_ext.semi_sync.wire.aggregations import AGGREGATIONS
from titan_ext.semi_sync.wire.codecs import CODECS
from titan_ext.semi_sync.wire.link import bytes_per_second, number_of_streams

_CHOICES = {
    "sync_point": ("after_step", "before_step"),
    "outlier_action": ("clip", "drop"),
    "late_work": ("drop", "keep"),
    "overdue_result": ("wait", "train_on"),
    "pairing": ("auto", "rank", "leader"),
    "topology": ("flat", "regions"),
    "region_average": ("parameters", "gradients"),
    "outer_state_device": ("same", "cpu"),
    "round_box": ("steps", "speed", "seconds", "tokens"),
    "source_optimizer": (None, "stateless", "stateful"),
    "source_clock": ("run", "source", "round"),
    "source_placement": ("own", "pollen"),
}

_FEW = 1000
"""Fragments of which rules can be made, to go on looking for mistakes."""

SOURCE_KEYS = {
    "sources_per_round": None,
    "source_optimizer": None,
    "source_clock": "run",
    "reset_source_data": False,
    "source_placement": "own",
}
"""Of ``[semi_sync]``, with what stands where nothing is set."""


def check(config: SemiSyncConfig) -> None:
    """Refuse values out of their range, and what cannot be had together whatever rules come of it."""
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
    outer_optimizer(config)


def _check_lateness(config: SemiSyncConfig) -> None:
    exponent, keeps = config.staleness_exponent, config.late_work == "keep"
    require(0 <= exponent <= 16, "staleness_exponent", exponent, "from 0 to 16")
    unset = exponent == SemiSyncConfig.staleness_exponent
    require(keeps or unset, "staleness_exponent", exponent, 'left out with late_work = "drop"')
    waits = config.overdue_result == "wait" or (keeps and config.fragment_sync_delay > 0 and config.pairing != "leader")
    needed = '"wait" unless late_work = "keep", fragment_sync_delay is above 0 and ranks are paired between sites'
    require(waits, "overdue_result", config.overdue_result, needed)
    grace, delayed = config.quorum_grace, config.fragment_sync_delay > 0
    require(0 <= grace <= 1, "quorum_grace", grace, "from 0 to 1")
    require(
        delayed or grace == 0,
        "quorum_grace",
        grace,
        "0 without a fragment_sync_delay: no inner steps hide the exchange",
    )


def _check_fragments(config: SemiSyncConfig) -> None:
    count, period, delay = config.num_fragments, config.sync_every, config.fragment_sync_delay
    require(count >= 1, "num_fragments", count, "at least 1")
    even = f"a divisor of sync_every ({period}), so that fragments sync at even distances"
    if count > max(period, _FEW):
        # Raised where others are gathered: what follows would make a rule for each.
        raise InvalidValue("num_fragments", count, f"must be {even}")
    require(period % count == 0, "num_fragments", count, even)
    spacing = period // count
    allowed = f"from 0 to {spacing - 1} (below sync_every / num_fragments = {spacing})"
    require(0 <= delay < spacing, "fragment_sync_delay", delay, allowed)
    require(0 <= config.fragment_update_alpha <= 1, "fragment_update_alpha", config.fragment_update_alpha, "0 to 1")


def _check_wire(config: SemiSyncConfig) -> None:
    codec, aggregation = component(CODECS, config.codec, config), component(AGGREGATIONS, config.aggregation, config)
    loses = not (config.error_feedback and codec.lossless)
    require(loses, "error_feedback", config.error_feedback, f'false with codec "{config.codec}", which loses nothing')
    fits = aggregation.weighted or not WEIGHTINGS.get(config.weighting).unequal
    require(fits, "aggregation", config.aggregation, f'"mean" with weighting = "{config.weighting}"')
    fits = aggregation.takes_sparse or not codec.sparse
    require(fits, "aggregation", config.aggregation, f'other than with codec = "{config.codec}": "mean"')
    # Its sums over the ranks of a site may not be issued beside an inner step's collectives.
    fits = aggregation.elementwise or config.fragment_sync_delay == 0
    require(fits, "fragment_sync_delay", config.fragment_sync_delay, f'0 with aggregation = "{config.aggregation}"')


def check_rounds(config: SemiSyncConfig, rules: Sequence[SyncRule]) -> None:
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
    own_way = config.sync_point == "before_step" or not all(is_plain(rule) for rule in rules)
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


def check_weighting(config: SemiSyncConfig, rules: Sequence[SyncRule]) -> None:
    """Refuse weights by the loss of the received model where a site never has it, and by norms that are not measured."""
    weighting: SiteWeighting = component(WEIGHTINGS, config.weighting, config)
    if weighting.needs_norms:
        norms = f'above 1 with weighting = "{config.weighting}", which needs the updates\' norms'
        require(config.outlier_threshold > 0, "outlier_threshold", config.outlier_threshold, norms)
    if not weighting.needs_loss:
        return
    mixes = config.num_fragments > 1 or config.fragment_update_alpha > 0
    allowed = "other than by loss with fragments or fragment_update_alpha: no site ever has all of the global model"
    require(not mixes, "weighting", config.weighting, allowed)
    own_way = config.sync_point == "before_step" or not all(is_plain(rule) for rule in rules)
    allowed = f'other than by loss with method = "{config.method}" or sync_point = "before_step"'
    require(not own_way, "weighting", config.weighting, allowed)


def check_regions(config: SemiSyncConfig, rules: Sequence[SyncRule]) -> None:
    """Refuse a tree for what is not a weighted mean of whole tensors, and levels that do not go together."""
    period, method = config.region_sync_every, config.method
    if config.topology == "regions":
        plain = all(is_plain(rule) or rule.apply.plain_sum for rule in rules) and not shares_sparse_rows(config)
        allowed = f'"flat" with method = "{method}" or rows of tables, which have ways of their own'
        require(plain, "topology", config.topology, allowed)
        allowed = f'"mean" with topology = "{config.topology}"'
        require(config.aggregation == "mean", "aggregation", config.aggregation, allowed)
    if config.region_average == "gradients":
        allowed = '"parameters" unless region_sync_every = 1 and sync_point = "after_step"'
        fits = period == 1 and config.sync_point == "after_step"
        require(fits, "region_average", config.region_average, allowed)
    if period is None:
        return
    require(
        1 <= period < config.sync_every,
        "region_sync_every",
        period,
        f"from 1 to below sync_every ({config.sync_every})",
    )
    plain = all(is_plain(rule) and rule.state == PARAMETERS for rule in rules)
    allowed = f'left out with method = "{method}", which exchanges more than parameters'
    require(plain, "region_sync_every", period, allowed)
    apart = not (config.sites_per_round or config.reset_inner_optimizer or config.fragment_sync_delay)
    apart = apart and config.round_box == "steps"
    allowed = "left out with fragment_sync_delay, sites_per_round, round_box or reset_inner_optimizer"
    require(apart, "region_sync_every", period, allowed)
    loss = component(WEIGHTINGS, config.weighting, config).needs_loss
    require(not loss, "region_sync_every", period, f'left out with weighting = "{config.weighting}"')


def check_settings(config: SemiSyncConfig) -> None:
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


def is_plain(rule: SyncRule) -> bool:
    """Whether the rule is applied by the mean or an outer step, and not in a method's own way."""
    return type(rule.apply) in (Average, OuterStep)
