"""The ``[semi_sync]`` section, whose sub-tables belong to methods, codecs, aggregations, outer optimizers, weightings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from titan_ext.config.binder import Binder, field_types
from titan_ext.config.cost.inner_states import moments_by_size
from titan_ext.config.settings import Settings
from titan_ext.errors import InvalidValue, UserError
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.methods.registry import METHODS
from titan_ext.semi_sync.plan.components import AVERAGE, COMPONENTS, NO_OUTER_LOOP, settings_tables
from titan_ext.semi_sync.plan.plan import SyncPlan
from titan_ext.semi_sync.plan.resolve import resolve
from titan_ext.semi_sync.plan.weighting import WEIGHTINGS
from titan_ext.semi_sync.registry import Registry
from titan_ext.semi_sync.state.outer_optimizers import OUTER_OPTIMIZERS, SHARED_KEYS
from titan_ext.semi_sync.wire.aggregations import AGGREGATIONS
from titan_ext.semi_sync.wire.codecs import CODECS


def bind_semi_sync(settings: Settings, binder: Binder, base: SemiSyncConfig) -> SemiSyncConfig:
    """The section; ``[semi_sync.NAME]`` is checked against the dataclass that NAME is registered with.

    Raises:
        UserError: a key, type or value is wrong.
    """
    table = settings.table("semi_sync")
    known = settings_tables(table)
    own = {name: inner for name, inner in table.items() if name in known and isinstance(inner, Mapping)}
    rest = {name: value for name, value in table.items() if name not in own}
    if rest.pop("settings", None) is not None:
        problem = "unknown key; settings of one method, codec … are [semi_sync.NAME]"
        settings.refuse(settings.error("semi_sync.settings", problem))
    config = binder.table(base, rest, "semi_sync") if rest else base
    bound = dict(config.settings)
    for name, inner in own.items():
        try:
            bound[name] = _bind_own(settings, binder, known[name], inner, f"semi_sync.{name}")
        except UserError as error:
            settings.refuse(error)
    return _with_known_names(settings, replace(config, settings=bound))


def _with_known_names(settings: Settings, config: SemiSyncConfig) -> SemiSyncConfig:
    """The section with a stand-in for each name that stands for nothing, so that the rest of it can be checked.

    What only that name could say is allowed is left out.
    """
    for registry, stand_in in _STAND_INS:
        name = getattr(config, registry.key)
        if name is None or name in _BUILT_IN.get(registry.key, ()):
            continue
        try:
            registry.get(name)
        except InvalidValue as error:
            more = "".join(f' (or "{each}")' for each in _BUILT_IN.get(registry.key, ()))
            settings.refuse(settings.error(f"semi_sync.{registry.key}", error.problem + more, name))
            own = {key: value for key, value in config.settings.items() if key not in registry}
            config = replace(config, settings=own, **stand_in)
    return config


_ADAPTIVE = {key: None for name, key in SHARED_KEYS.items() if name not in field_types(OUTER_OPTIMIZERS.get("sgd"))}
_STAND_INS: tuple[tuple[Registry[Any], dict[str, Any]], ...] = (
    (METHODS, {"method": SemiSyncConfig.method, **_ADAPTIVE}),
    (CODECS, {"codec": SemiSyncConfig.codec, "error_feedback": None}),
    (AGGREGATIONS, {"aggregation": SemiSyncConfig.aggregation}),
    (OUTER_OPTIMIZERS, {"outer_optimizer": None, **dict.fromkeys(SHARED_KEYS.values())}),
    (WEIGHTINGS, {"weighting": SemiSyncConfig.weighting}),
)
_BUILT_IN = {METHODS.key: (NO_OUTER_LOOP,), OUTER_OPTIMIZERS.key: (AVERAGE,)}
"""Names that are no entries of the registries."""


def _bind_own(
    settings: Settings, binder: Binder, kind: type | None, table: Mapping[str, Any], key: str
) -> dict[str, Any]:
    if kind is None:
        raise settings.error(key, "has no settings of its own")
    bound = binder.table(kind, table, key)
    values = {name: getattr(bound, name) for name in table if name in field_types(kind)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def own_tables() -> dict[str, tuple[str, type]]:
    """What has a ``[semi_sync.NAME]`` table, by NAME: the key that selects it, and the dataclass with its keys."""
    found = {name: (METHODS.key, method.settings) for name, method in METHODS.items()}
    for registry in COMPONENTS:
        found |= {name: (registry.key, entry) for name, entry in registry.items()}
    shared = set(SHARED_KEYS)  # keys of [semi_sync] itself
    return {name: each for name, each in found.items() if each[1] and set(field_types(each[1])) - shared}


def plan_of(config: Any) -> SyncPlan:
    """The sync plan of a ``Trainer.Config`` with an outer loop.

    Raises:
        ValueError: naming the key of ``[semi_sync]``, its value and what is allowed.
    """
    return resolve(config.semi_sync, lambda: moments_by_size(config))
