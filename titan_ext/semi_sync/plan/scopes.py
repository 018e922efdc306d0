"""Parameter scopes: which parameters the sites share whole, by row, or not at all, each with settings of its own.

A parameter belongs to the first scope of which a pattern fits its name, or else to the rest of the model, which
``[semi_sync]`` itself speaks of. Optimizer states go where their parameter goes. A scope is only more rows of
the one sync plan; DEPT's variants (arXiv 2410.05021) are settings of one scope.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from titan_ext.semi_sync.plan.fragments import deal_by_bytes, deal_by_modules
from titan_ext.semi_sync.plan.plan import PARAMETERS, SyncRow
from titan_ext.semi_sync.state.sparse_tables import ParametersByRow, StateByRow

if TYPE_CHECKING:
    from titan_ext.semi_sync.config import SemiSyncConfig

REST = ""
"""Name of the scope of all parameters that no other scope claims."""

_OWN = ("sync_every", "codec", "topk_density", "outer_optimizer", "outer_lr", "outer_momentum", "nesterov")


@dataclass(kw_only=True)
class ScopeConfig:
    """Parameters that the sites share in a way of their own: a ``[[semi_sync.scopes]]`` table.

    Fields left at None are those of ``[semi_sync]``.
    """

    name: str
    """Told apart by this from other scopes."""

    parameters: list[str]
    """Patterns of names, with ``*`` and ``?``: ``tok_embeddings.*``."""

    shared: Literal["whole", "rows", "no"] = "whole"
    """Every element with every site; each row of a table with the sites that hold it; or with nobody."""

    sync_every: int | None = None
    """Inner steps between two syncs of the scope's parameters."""

    codec: Literal["fp32", "bf16", "int8", "int4", "topk"] | None = None
    """How its values travel."""

    topk_density: float | None = None
    """Share of the elements that "topk" sends."""

    outer_optimizer: str | None = None
    """What takes its averaged pseudo-gradient."""

    outer_lr: float | None = None
    """Learning rate of that."""

    outer_momentum: float | None = None
    """Momentum of that, where it is "sgd"."""

    nesterov: bool | None = None
    """Nesterov momentum in that."""

    def settings(self, config: "SemiSyncConfig") -> "SemiSyncConfig":
        """The outer loop's settings for this scope.

        Args:
            config: resolved settings of ``[semi_sync]``.

        Raises:
            ValueError: naming the key.
        """
        own = {key: getattr(self, key) for key in _OWN if getattr(self, key) is not None}
        whole = replace(config, scopes=[], fragments=None, num_fragments=1, sites_per_round=None, **own)
        if "codec" in own:
            whole.error_feedback = None
        if self.shared == "rows":
            _check_by_row(whole)
        return whole.resolved()


def check_scopes(config: "SemiSyncConfig") -> None:
    """Refuse scopes that cannot be.

    Args:
        config: resolved settings.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    names = [scope.name for scope in config.scopes]
    for place, scope in enumerate(config.scopes):
        key = f"scopes = [{place}]"
        if not scope.name.isidentifier() or names.count(scope.name) > 1:
            raise ValueError(f"{key}.name = {scope.name!r}: must be a name of its own, of letters, digits and '_'")
        if not scope.parameters:
            raise ValueError(f"{key}.parameters = []: must name parameters, such as 'tok_embeddings.*'")
        if scope.shared not in ("whole", "rows", "no"):
            raise ValueError(f"{key}.shared = {scope.shared!r}: must be one of whole, rows, no")
        try:
            settings = scope.settings(config)
            if scope.shared != "no":
                scope_rows(scope, settings)
        except ValueError as error:
            raise ValueError(f"{key} ({scope.name}): {error}") from None


def settings_by_scope(config: "SemiSyncConfig") -> dict[str, "SemiSyncConfig"]:
    """Resolved settings of every scope that is shared, the rest of the model included."""
    return {REST: config} | {scope.name: scope.settings(config) for scope in config.scopes if scope.shared != "no"}


def scope_rows(scope: ScopeConfig, settings: "SemiSyncConfig") -> list[SyncRow]:
    """The rows of the method's plan for the parameters of a scope.

    Raises:
        ValueError: the method has ways of its own with what is to be shared by row.
    """
    rows = [replace(row, scope=scope.name) for row in settings.plan().rows]
    if scope.shared != "rows":
        return rows
    if any(row.kind is not None for row in rows):
        raise ValueError(f'shared = "rows": cannot be had with method = "{settings.method}"')
    return [replace(row, kind=ParametersByRow if row.state == PARAMETERS else StateByRow) for row in rows]


def deal(sizes: Mapping[str, int], config: "SemiSyncConfig") -> dict[str, tuple[str, int]]:
    """Scope and fragment of every parameter that is shared.

    Args:
        sizes: elements by name, of the whole model (every pipeline stage), in model order.
        config: resolved settings.

    Raises:
        ValueError: a scope without a parameter, or fragments that do not fit.
    """
    homes: dict[str, tuple[str, int]] = {}
    left = dict(sizes)
    for scope in config.scopes:
        claimed = {name: left.pop(name) for name in list(left) if matches(name, scope.parameters)}
        if not claimed:
            raise ValueError(f"scopes ({scope.name}): {scope.parameters} fit no parameter of the model")
        if scope.shared != "no":
            homes |= {name: (scope.name, 0) for name in claimed}
    if not left:
        raise ValueError("scopes: no parameter is left for the rest of the model")
    by_modules = config.fragments is not None
    dealt = deal_by_modules(left, config.fragments) if by_modules else deal_by_bytes(left, config.num_fragments)
    return homes | {name: (REST, fragment) for name, fragment in dealt.items()}


def shares_rows(config: "SemiSyncConfig") -> bool:
    """Whether some tables are shared by row, of which a rank's cut holds other rows at every site."""
    return any(scope.shared == "rows" for scope in config.scopes)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns fits a parameter's name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def rows_of_scopes(config: "SemiSyncConfig") -> Sequence[SyncRow]:
    """The rows that the scopes add to the method's plan; call it on resolved settings."""
    return [
        row for scope in config.scopes if scope.shared != "no" for row in scope_rows(scope, scope.settings(config))
    ]


def _check_by_row(settings: "SemiSyncConfig") -> None:
    if settings.codec == "topk":
        raise ValueError('codec = "topk": must be another where shared = "rows"')
    if settings.aggregation != "mean":
        raise ValueError(f'aggregation = "{settings.aggregation}": must be "mean" where shared = "rows"')
