"""The ``[model]`` section: a model spec and its flavor's training defaults, by name."""

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import lru_cache
from typing import Any

import torch

from titan_ext.config import defaults
from titan_ext.config.binder import Binder, field_types
from titan_ext.config.converters import KEY as CONVERTERS
from titan_ext.config.initial import Source, taken_over
from titan_ext.config.settings import UNSET, Settings, hint, one_line
from titan_ext.config.unknown import unknown_key
from titan_ext.errors import InvalidValue, UserError, one_of
from titan_ext.models import module_path, own_names
from titan_ext.models.llama3.huggingface import SHAPES
from titan_ext.models.upstream import as_model, upstream_names
from titan_ext.semi_sync.state.views import kept_buffers

VOCABULARY = "vocab_size"
_MOST_LAYERS, _LARGEST_SIZE = 10_000, 2**31 - 1
_ATTENTION = ("flex", "flex_flash", "varlen")
_HOMES = {"tokenizer": ["tokenizer"], "hf_assets_path": ["hf_assets_path"]}


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What determines a model: equal choices are equal models."""

    name: str
    """Of a model of ours or of torchtitan's, or a dotted module path."""

    flavor: str
    overrides: Mapping[str, Any]
    """Keyword arguments of the spec's ``model_registry`` beyond the flavor, the vocabulary included."""

    vocabulary_derived: bool = field(default=False, compare=False)
    """Whether the vocabulary is the tokenizer's because the user named none."""

    taken: tuple[str, ...] = field(default=(), compare=False)
    """Overrides that are those of the folder from which the weights come."""

    @property
    def label(self) -> str:
        """Name and flavor; without the flavor where the sizes are not that one's."""
        return self.name if set(self.taken) & set(SHAPES) else f"{self.name} {self.flavor}"


def choose_model(
    settings: Settings,
    vocabulary: int | None,
    multiple: int = defaults.VOCABULARY_MULTIPLE,
    source: Source | None = None,
) -> tuple[ModelChoice, Any]:
    """The model of a site and its torchtitan ``ModelSpec``.

    The vocabulary is ``model.vocab_size`` where that is set, else that of the weights, else that of the tokenizer,
    rounded up (or the flavor's own, if the spec takes none, the tokenizer is not known, or weights are loaded that say
    nothing of it).

    Args:
        settings: the site's settings.
        vocabulary: number of ids of the site's tokenizer; None where it is not known.
        multiple: what a vocabulary taken from the tokenizer is rounded up to.
        source: where weights come from; what it says and ``[model]`` does not is taken over.

    Raises:
        UserError: unknown model, flavor or override, or one that the spec refuses.
    """
    module = model_module(settings)
    registry = module.model_registry
    keywords, open_ended = _keywords(module)
    overrides = _overrides(settings, keywords, open_ended)
    taken = {} if source is None else taken_over(settings, source, module, overrides, keywords)
    overrides |= taken
    silent = source is not None and not hasattr(module, "from_huggingface")
    takes = VOCABULARY in keywords or open_ended
    derived = vocabulary is not None and VOCABULARY not in overrides and takes and not silent
    if derived:
        overrides[VOCABULARY] = -(-vocabulary // multiple) * multiple
    flavor = chosen_flavor(settings)
    _check_flavor(settings, module, flavor)
    _check_magnitudes(settings, overrides)
    try:
        spec = registry(flavor, **overrides)
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise _refused(settings, overrides, error) from None
    return ModelChoice(_text(settings, "name", defaults.MODEL), flavor, overrides, derived, tuple(taken)), spec


def _check_magnitudes(settings: Settings, overrides: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has: a slip of the pen is otherwise answered when memory or patience is used up."""
    problems = []
    for key, value in overrides.items():
        most = _MOST_LAYERS if key == "n_layers" else _LARGEST_SIZE
        if isinstance(value, int) and value > most:
            problems.append(settings.error(f"model.{key}", f"must be at most {most}", value))
    for problem in problems[1:]:
        settings.refuse(problem)
    if problems:
        raise problems[0]


def chosen_flavor(settings: Settings) -> str:
    """``model.flavor``, or ours where the user names none."""
    return _text(settings, "flavor", defaults.FLAVOR)


def model_module(settings: Settings) -> Any:
    """The module of ``model.name``: ours, torchtitan's, or another by its dotted path."""
    name = _text(settings, "name", defaults.MODEL)
    if not all(part.isidentifier() for part in name.split(".")):
        raise settings.error("model.name", f"unknown model; {_advice(name)}", name)
    path = module_path(name)
    if path == name and "." not in name and importlib.util.find_spec(name) is None:
        raise settings.error("model.name", f"unknown model; {_advice(name)}", name)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise settings.error("model.name", f"cannot be imported: {error}", name) from None
        raise settings.error("model.name", f"no module {error.name!r} can be imported", name) from None
    except Exception as error:  # noqa: BLE001 - a module of the user's may raise anything
        raise settings.error("model.name", f"cannot be imported: {type(error).__name__}: {error}", name) from None
    if not hasattr(module, "model_registry"):
        problem = f"the module has no function model_registry(flavor, …); {_advice(name)}"
        raise settings.error("model.name", problem, name)
    return as_model(module)


def _advice(name: str) -> str:
    """What a model may be called."""
    return f"{hint(name, dict.fromkeys([*own_names(), *upstream_names()]))}, or the dotted path of another"


def flavor_config(module: Any, flavor: str) -> Any | None:
    """What the module's ``config_registry`` says of a flavor: a ``Trainer.Config``, or None."""
    if not hasattr(module, "__path__") or importlib.util.find_spec(f"{module.__name__}.config_registry") is None:
        return None
    registry = importlib.import_module(f"{module.__name__}.config_registry")
    plain = flavor.lower().replace("-", "_").replace(".", "_")
    last = module.__name__.rsplit(".", 1)[-1]
    for name in (flavor, f"{last}_{flavor}", plain, f"{last}_{plain}"):
        function = getattr(registry, name, None)
        if callable(function) and not inspect.signature(function).parameters:
            return function()
    return None


def _overrides(settings: Settings, keywords: Mapping[str, Any], open_ended: bool) -> dict[str, Any]:
    beside = ("name", "flavor", CONVERTERS)
    given = {key: value for key, value in settings.table("model").items() if key not in beside}
    binder, found = Binder(settings), {}
    for key, value in given.items():
        try:
            if key not in keywords and not open_ended:
                raise unknown_key(settings, "model", key, [*beside, *keywords], _HOMES)
            found[key] = binder.value(keywords.get(key, Any), value, f"model.{key}")
        except UserError as error:
            settings.refuse(error)
    return found


def _keywords(module: Any) -> tuple[dict[str, Any], bool]:
    """Types of the overrides that a model takes, by name, and whether it may take others too.

    They are the keywords of its ``model_registry`` and, where that takes any, the fields of the
    dataclass that its ``flavors`` are made of.
    """
    try:
        parameters = inspect.signature(module.model_registry, eval_str=True).parameters
    except NameError:  # a name that exists only for type checkers
        parameters = inspect.signature(module.model_registry).parameters
    found, open_ended = {}, False
    for name, each in list(parameters.items())[1:]:
        if each.kind is each.VAR_KEYWORD:
            open_ended = True
        else:
            found[name] = Any if each.annotation is each.empty or isinstance(each.annotation, str) else each.annotation
    flavors = getattr(module, "flavors", None)
    sizes = next(iter(flavors.values()), None) if isinstance(flavors, Mapping) else None
    if open_ended and is_dataclass(sizes):
        return field_types(type(sizes)) | found, False
    return found, open_ended


def _check_flavor(settings: Settings, module: Any, flavor: str) -> None:
    allowed = _flavors(module)
    if allowed is not None and flavor not in allowed:
        raise settings.error("model.flavor", f"unknown flavor; {hint(flavor, allowed)}", flavor)


def _flavors(module: Any) -> Mapping[str, Any] | None:
    """A spec's flavors by name, as ours and torchtitan's own keep them; None where nothing says so."""
    configs = [
        value for name, value in vars(module).items() if name.endswith("_configs") and isinstance(value, Mapping)
    ]
    return getattr(module, "flavors", None) or (configs[0] if len(configs) == 1 else None)


def _refused(settings: Settings, overrides: Mapping[str, Any], error: Exception) -> Exception:
    if isinstance(error, InvalidValue):
        return settings.error(error.key, error.problem, settings.get(error.key, UNSET))
    message = one_line(str(error))
    for key in (*overrides, "flavor", "name"):
        if settings.get(f"model.{key}") is not None and key in message:
            return settings.error(f"model.{key}", message, settings.get(f"model.{key}"))
    backend = overrides.get("attn_backend")
    if backend is not None and (backend not in _ATTENTION or "backend" in message.lower()):
        problem = message if backend in _ATTENTION else one_of(backend, _ATTENTION)
        return settings.error("model.attn_backend", problem, backend)
    if isinstance(error, KeyError):
        flavor = chosen_flavor(settings)
        return settings.error("model.flavor", "unknown flavor", flavor)
    return settings.error("model", message)


def _text(settings: Settings, key: str, default: str) -> str:
    return Binder(settings).value(str, settings.get(f"model.{key}", default), f"model.{key}")


def buffer_shapes(config: Any) -> dict[str, torch.Size]:
    """Shape of each buffer that the sites share, by name; every rank holds the whole of it."""
    kept = kept_buffers(_without_memory(config))
    buffers = {name: module.get_buffer(key) for name, (module, key) in kept.items()}
    return {name: buffer.shape for name, buffer in buffers.items() if buffer.is_floating_point()}


def parameter_shapes(config: Any) -> dict[str, torch.Size]:
    """Shape of each parameter of a trainer config's whole model by name, without memory; tied ones once."""
    return {name: parameter.shape for name, parameter in _without_memory(config).named_parameters()}


def block_modules(config: Any) -> dict[str, bool]:
    """Each module of the model's blocks by its whole name, and whether it is a linear layer."""
    blocks = getattr(_without_memory(config), "layers", None)
    if not isinstance(blocks, torch.nn.Module):
        return {}
    return {f"layers.{name}": isinstance(each, torch.nn.Linear) for name, each in blocks.named_modules() if name}


def _without_memory(config: Any) -> torch.nn.Module:
    """The model on the meta device, to be looked at only: configs that read alike share it."""
    return _built(_Described(config.model_spec.model))


class _Described:
    """A model's config, equal to those that read alike. Held by the cache, so that no later function has a name and an
    address of this one's."""

    def __init__(self, model: Any) -> None:
        self.model, self._text = model, repr(model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Described) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=4)
def _built(described: _Described) -> torch.nn.Module:
    """Raises UserError: it cannot be built."""
    try:
        with torch.device("meta"):
            return described.model.build()
    except (RuntimeError, TypeError) as error:  # torch's of sizes whose product is too large, among others
        raise UserError(f"[model]: cannot be built: {one_line(str(error))}") from None
