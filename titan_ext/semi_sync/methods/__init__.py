"""The methods: one file each, which turns settings into a sync plan.

A method is a function of the configuration that returns the rows of its plan. Registering it makes
``method = "name"`` work everywhere: TOML, ``titan-ext check``, the engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from titan_ext.semi_sync.plan.plan import SyncPlan

if TYPE_CHECKING:
    from titan_ext.semi_sync.config import SemiSyncConfig

Method = Callable[["SemiSyncConfig"], SyncPlan]


@dataclass(frozen=True, slots=True)
class _Registered:
    plan: Method
    fixed: Mapping[str, object]
    defaults: Mapping[str, object]


_METHODS: dict[str, _Registered] = {}


def register_method(
    name: str, *, fixed: Mapping[str, object] | None = None, **defaults: object
) -> Callable[[Method], Method]:
    """Decorate the function that builds a method's plan.

    Args:
        name: the value of ``method`` that selects it.
        fixed: values of ``SemiSyncConfig`` fields that the method does not let the user choose.
        **defaults: values that the method takes where the user set none. A field that is None unless a
            method brings it (also as None) is that method's own, and refused with others.

    Raises:
        ValueError: the name is taken.
    """
    if name in _METHODS:
        raise ValueError(f"method {name!r} is already registered")

    def register(method: Method) -> Method:
        _METHODS[name] = _Registered(method, fixed or {}, defaults)
        return method

    return register


def method_names() -> list[str]:
    """Names that ``method`` accepts; ``none`` trains without an outer loop."""
    return ["none", *sorted(_METHODS)]


def build_plan(config: "SemiSyncConfig") -> SyncPlan:
    """The sync plan of a configuration whose defaults are filled in."""
    return _METHODS[config.method].plan(config)


def method_defaults(name: str) -> dict[str, object]:
    """The defaults a method brings for fields the user left unset."""
    return dict(_METHODS[name].defaults)


def method_fixed(name: str) -> dict[str, object]:
    """Values that a method does not let the user choose."""
    return dict(_METHODS[name].fixed)


from titan_ext.semi_sync.methods import (  # noqa: E402, F401  (registration)
    demo,
    des_loc,
    diloco,
    eager,
    local_sgd,
    lordo,
    mt_dao,
    noloco,
    sparta,
)
