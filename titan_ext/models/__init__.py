"""Model specs: one package each, with ``model_registry(flavor, **overrides)`` and ``flavors``.

A package whose models Hugging Face's libraries know may also have ``from_huggingface(config, file)``: the overrides
with which a model is the one that the content of a ``config.json`` describes. Names that titan_ext does not have are
those of torchtitan's own packages.
"""

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from titan_ext.errors import InvalidValue, UserError, one_of
from titan_ext.models.upstream import as_model, upstream_names


def own_names() -> list[str]:
    """Models that come with titan_ext."""
    return sorted(each.name for each in pkgutil.iter_modules(__path__) if each.ispkg)


def module_path(name: str) -> str:
    """The module of a model: ours, else torchtitan's package of that name, else the name itself, a dotted path."""
    if name in own_names():
        return f"{__name__}.{name}"
    return f"torchtitan.models.{name}" if name in upstream_names() else name


def get_model_spec(name: str, flavor: str, **overrides: Any):
    """torchtitan's ``ModelSpec`` of a model.

    Args:
        name: a model of ours, of torchtitan's, or the dotted path of a package with ``model_registry``.
        flavor: a flavor of that model.
        **overrides: sizes that differ from the flavor's.

    Raises:
        UserError: no such model, flavor or size.
    """
    path = module_path(name)
    if path == name and "." not in name:
        raise unknown("model.name", name, [*own_names(), *upstream_names()])
    return _imported(path).model_registry(flavor, **overrides)


def unknown(key: str, value: object, allowed: Iterable[object]) -> InvalidValue:
    """The error for a value that is none of those allowed."""
    return InvalidValue(key, value, one_of(value, allowed))


def _imported(path: str) -> Any:
    try:
        module = import_module(path)
    except ImportError as error:
        raise UserError(f"model.name = {path!r}: cannot import it ({error})") from error
    if not callable(getattr(module, "model_registry", None)):
        raise UserError(f"model.name = {path!r}: the module has no model_registry(flavor, **overrides)")
    return as_model(module)
