"""The methods: one file each, which turns settings into a sync plan.

A method is a function of the configuration that returns the rows of its plan. Registering it makes
``method = "name"`` work everywhere: TOML, ``titan-ext check``, the engine.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from titan_ext.semi_sync.plan import SyncPlan

if TYPE_CHECKING:
    from titan_ext.semi_sync.config import SemiSyncConfig

Method = Callable[["SemiSyncConfig"], SyncPlan]
_METHODS: dict[str, tuple[Method, dict[str, object]]] = {}


def register_method(name: str, **defaults: object) -> Callable[[Method], Method]:
    """Decorate the function that builds a method's plan.

    Args:
        name: the value of ``method`` that selects it.
        **defaults: values of ``SemiSyncConfig`` fields that the method takes where the user set none.

    Raises:
        ValueError: the name is taken.
    """
    if name in _METHODS:
        raise ValueError(f"method {name!r} is already registered")

    def register(method: Method) -> Method:
        _METHODS[name] = (method, defaults)
        return method

    return register


def method_names() -> list[str]:
    """Names that ``method`` accepts; ``none`` trains without an outer loop."""
    return ["none", *sorted(_METHODS)]


def build_plan(config: "SemiSyncConfig") -> SyncPlan:
    """The sync plan of a configuration whose defaults are filled in."""
    return _METHODS[config.method][0](config)


def method_defaults(name: str) -> dict[str, object]:
    """The defaults a method brings for fields the user left unset."""
    return dict(_METHODS[name][1])


from titan_ext.semi_sync.methods import des_loc, diloco, local_sgd  # noqa: E402, F401  (registration)
