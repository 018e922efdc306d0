"""torchtitan's own model specs by the name of their package, with sizes that can be overridden."""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torchtitan.protocols.model_spec import ModelSpec

from titan_ext.errors import InvalidValue, one_of
from titan_ext.models.sizes import Sizes, resize

_PACKAGE = "torchtitan.models"
# What a model needs beside [model]: converters have tables of their own, and further heads another loss.
_LEFT_OUT = ("converters", "num_mtp_layers")


class UpstreamModel:
    """A package of torchtitan's as ``[model]`` takes it: ``model_registry(flavor, **overrides)`` and ``flavors``.

    Overrides are the keywords of torchtitan's ``model_registry`` and, for a decoder of text, those of ``Sizes``.
    """

    def __init__(self, package: ModuleType) -> None:
        self.__name__ = package.__name__
        self.__path__ = package.__path__
        self.flavors: Mapping[str, Any] = _flavors(package)
        self._registry = package.model_registry
        parameters = inspect.signature(self._registry, eval_str=True).parameters
        self._keywords = {name: each for name, each in parameters.items() if name not in _LEFT_OUT}

    @property
    def model_registry(self) -> Any:
        """torchtitan's spec of a flavor; the signature tells every keyword with its type."""

        def registry(flavor: str, **overrides: Any) -> ModelSpec:
            if flavor not in self.flavors:
                raise InvalidValue("model.flavor", flavor, one_of(flavor, self.flavors))
            spec = self._registry(flavor, **{key: overrides.pop(key) for key in self._keywords if key in overrides})
            resize(spec.model, Sizes(**overrides))
            return spec

        sizes = inspect.signature(Sizes, eval_str=True).parameters if self._has_sizes else {}
        keywords = [each.replace(kind=each.KEYWORD_ONLY) for each in list(self._keywords.values())[1:]]
        first = next(iter(self._keywords.values()))
        registry.__signature__ = inspect.Signature([first, *keywords, *sizes.values()])  # type: ignore[attr-defined]
        return registry

    @property
    def _has_sizes(self) -> bool:
        # torchtitan's one model that is no decoder of text takes nothing else either.
        return len(self._keywords) > 1


def upstream_names() -> list[str]:
    """Packages of torchtitan that hold a model; where we have one of that name too, a dotted path is needed."""
    package = importlib.import_module(_PACKAGE)
    return sorted(each.name for each in pkgutil.iter_modules(package.__path__) if each.ispkg and each.name != "common")


def as_model(module: ModuleType) -> Any:
    """A module that holds a model, with its sizes where it is torchtitan's own."""
    package, _, name = module.__name__.rpartition(".")
    return UpstreamModel(module) if package == _PACKAGE and name in upstream_names() else module


def _flavors(package: ModuleType) -> Mapping[str, Any]:
    """torchtitan keeps them in the only mapping whose name says so."""
    return next(value for name, value in vars(package).items() if name.endswith("_configs") and isinstance(value, dict))
