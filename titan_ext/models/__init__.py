"""Model specs: one package each, with ``model_registry(flavor, **overrides)`` and ``flavors``.

A package whose models Hugging Face's libraries know may also have ``from_huggingface(config, file)``: the overrides
with which a model is the one that the content of a ``config.json`` describes.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from titan_ext.errors import InvalidValue, UserError, one_of

MODELS = ("abbie", "dept", "llama3")


def get_model_spec(name: str, flavor: str, **overrides: Any):
    """torchtitan's ``ModelSpec`` of a model.

    Args:
        name: one of ``MODELS``, or the dotted path of a package with ``model_registry``.
        flavor: a flavor of that model.
        **overrides: sizes that differ from the flavor's.

    Raises:
        UserError: no such model, flavor or size.
    """
    if name in MODELS:
        module = import_module(f"{__name__}.{name}")
    elif "." in name:
        module = _import_own(name)
    else:
        raise unknown("model.name", name, MODELS)
    return module.model_registry(flavor, **overrides)


def unknown(key: str, value: object, allowed: Iterable[object]) -> InvalidValue:
    """The error for a value that is none of those allowed."""
    return InvalidValue(key, value, one_of(value, allowed))


def _import_own(name: str):
    try:
        module = import_module(name)
    except ImportError as error:
        raise UserError(f"model.name = {name!r}: cannot import it ({error})") from error
    if not callable(getattr(module, "model_registry", None)):
        raise UserError(f"model.name = {name!r}: the module has no model_registry(flavor, **overrides)")
    return module
