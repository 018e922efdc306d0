"""What names in the settings stand for, with their own settings: methods, codecs, outer optimizers and the like."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import titan_ext.semi_sync.methods  # noqa: F401  (registration)
from titan_ext.errors import InvalidValue, gather_invalid, refuse, require
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.methods.registry import METHODS, Method
from titan_ext.semi_sync.plan.weighting import WEIGHTINGS
from titan_ext.semi_sync.registry import Registry
from titan_ext.semi_sync.state.outer_optimizers import OUTER_OPTIMIZERS, SHARED_KEYS, OuterOptimizer
from titan_ext.semi_sync.wire.aggregations import AGGREGATIONS
from titan_ext.semi_sync.wire.codecs import CODECS

NO_OUTER_LOOP = "none"
"""The ``method`` that trains without an outer loop."""

COMPONENTS: tuple[Registry[Any], ...] = (CODECS, AGGREGATIONS, OUTER_OPTIMIZERS, WEIGHTINGS)
"""What has names in ``[semi_sync]`` and settings in ``[semi_sync.NAME]``, besides methods."""

AVERAGE = "average"
"""The ``outer_optimizer`` that takes the mean as it is."""


def method_names() -> list[str]:
    """Names that ``method`` accepts."""
    return [NO_OUTER_LOOP, *METHODS.names()]


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


def with_defaults(config: SemiSyncConfig) -> SemiSyncConfig:
    """A copy with the method's defaults and what follows from other settings; nothing is checked."""
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


def component(registry: Registry, name: str, config: SemiSyncConfig) -> Any:
    """What a name stands for, with its own settings."""
    return registry.get(name)(**_own_settings(config, registry.resolve(name)))


def outer_optimizer(config: SemiSyncConfig) -> OuterOptimizer | None:
    """The outer optimizer with its settings; None for the plain mean.

    Raises:
        InvalidValue: one is out of its range, or of another outer optimizer.
    """
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


def method_settings(method: Method, config: SemiSyncConfig) -> Any:
    """The method's own settings; None where it has none."""
    own = _own_settings(config, METHODS.resolve(config.method))
    if method.settings is None:
        require(not own, f"settings.{config.method}", own, "left out: the method has no settings of its own")
        return None
    return method.settings(**own)


def _own_settings(config: SemiSyncConfig, name: str) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.settings.get(name, {}).items()
    }
