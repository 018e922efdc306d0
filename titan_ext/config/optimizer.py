"""``[optimizer]``: torchtitan's groups one to one, or the short form that is a single group.

An optimizer's own constructor judges its hyper-parameters. What is bound stays plain data
(``state_dtype`` is a name), so that a run's ``config.json`` loads to the same groups.
"""

import inspect
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch.optim import Optimizer

from titan_ext.config.binder import Binder
from titan_ext.config.settings import UNSET, Settings, hint, one_line
from titan_ext.config.unknown import unknown_key
from titan_ext.errors import InvalidValue, UserError
from titan_ext.semi_sync.config import SemiSyncConfig

_ONE_TO_ONE = ("param_groups", "implementation", "optimizer_factory_kwargs_by_name")
_OPTIMIZERS = ("Adam", "AdamW", "DistMuon")
# Set by optimizer.implementation, or not a user's business.
_NOT_HYPER_PARAMETERS = {"self", "params", "foreach", "fused", "capturable", "differentiable"}
_NOT_NEGATIVE = ("lr", "eps", "weight_decay", "momentum")
# Where an optimizer does not say which type a hyper-parameter has.
_KINDS = {**dict.fromkeys(_NOT_NEGATIVE, float), "betas": list[float]}
_DTYPES = Literal["bfloat16", "float32", "float64"] | None


def bind_optimizer(settings: Settings, binder: Binder, base: Any) -> Any:
    """torchtitan's optimizer config from the one-to-one form, or from the short one (a single group)."""
    from torchtitan.components.optimizer import default_adamw

    base = _with_our_names(base)
    if not base.param_groups:
        base = replace(base, param_groups=default_adamw().param_groups)
    table = settings.table("optimizer")
    allowed = [each.name for each in fields(base)]
    short = {key: value for key, value in table.items() if key not in allowed}
    direct = {key: value for key, value in table.items() if key in allowed}
    config = binder.table(base, direct, "optimizer") if direct else base
    if short and "param_groups" in direct:
        key, problem = next(iter(short)), "give either this short form or [[optimizer.param_groups]], not both"
        settings.refuse(settings.error(f"optimizer.{key}", problem))
        short = {}
    if short:
        config = replace(config, param_groups=[_single_group(settings, binder, base, short)])
    keys = ["optimizer" if short else f"optimizer.param_groups[{place}]" for place in range(len(config.param_groups))]
    pairs = zip(config.param_groups, keys, strict=True)
    groups = [_bind_group(settings, binder, base, group, key) for group, key in pairs]
    return replace(config, param_groups=groups)


def optimizer_names(base: Any) -> list[str]:
    """Names that the optimizer container of ``base`` resolves."""
    named = getattr(base._owner, "optimizer_names", None)
    return list(named()) if callable(named) else list(_OPTIMIZERS)


def hyper_parameters(base: Any, name: str) -> dict[str, Any] | None:
    """Hyper-parameters that an optimizer takes and their defaults; None if it takes any."""
    accepted = _accepted(_factory(base, name))
    return None if accepted is None else {key: each.default for key, each in accepted.items()}


def _with_our_names(base: Any) -> Any:
    """torchtitan's own flavors come with torchtitan's container, which does not know our optimizers."""
    from torchtitan.components.optimizer import OptimizersContainer as Torchtitans

    from titan_ext.trainer.optimizers import OptimizersContainer

    if base._owner is not Torchtitans:
        return base
    return OptimizersContainer.Config(**{each.name: getattr(base, each.name) for each in fields(base)})


def _as_default(base: Any) -> dict[str, Any]:
    """The optimizer of the flavor's last group, a stand-in for one that is unknown."""
    group = base.param_groups[-1]
    return {"optimizer_name": group.optimizer_name, "optimizer_kwargs": dict(group.optimizer_kwargs)}


def _single_group(settings: Settings, binder: Binder, base: Any, short: Mapping[str, Any]) -> Any:
    from torchtitan.components.optimizer import ParamGroupConfig

    names = optimizer_names(base)
    group = base.param_groups[-1]
    name = short.get("name", group.optimizer_name)
    try:
        name = binder.value(str, name, "optimizer.name")
        if name not in names:
            raise settings.error("optimizer.name", f"unknown optimizer; {hint(name, names)}", name)
    except UserError as error:
        settings.refuse(error)
        name = group.optimizer_name
        known = hyper_parameters(base, name) or {}
        # Of the rest only what nearly every optimizer takes can be judged.
        short = {key: value for key, value in short.items() if key in known}
    accepted = hyper_parameters(base, name)
    # Another optimizer starts from its own defaults: AdamW's weight decay is not SGD's.
    kwargs = dict(group.optimizer_kwargs) if group.optimizer_name == name else {}
    for key, value in short.items():
        if key == "name":
            continue
        if accepted is not None and key not in accepted:
            settings.refuse(unknown_key(settings, "optimizer", key, ["name", *accepted, *_ONE_TO_ONE], {}))
        else:
            kwargs[key] = value
    return ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs=kwargs)


def _bind_group(settings: Settings, binder: Binder, base: Any, group: Any, key: str) -> Any:
    """The group with hyper-parameters of the right types, which its optimizer accepts."""
    names = optimizer_names(base)
    if group.optimizer_name not in names:
        problem = f"unknown optimizer; {hint(group.optimizer_name, names)}"
        settings.refuse(settings.error(f"{key}.optimizer_name", problem, group.optimizer_name))
        return replace(group, **_as_default(base))
    factory = _factory(base, group.optimizer_name)
    accepted = _accepted(factory)
    prefix = key if key == "optimizer" else f"{key}.optimizer_kwargs"
    kwargs = {}
    for name, value in group.optimizer_kwargs.items():
        try:
            if accepted is not None and name not in accepted and name not in _NOT_HYPER_PARAMETERS:
                raise settings.error(f"{prefix}.{name}", f"unknown key; {hint(name, accepted)}")
            kwargs[name] = _bind_value(binder, (accepted or {}).get(name), name, value, f"{prefix}.{name}")
        except UserError as error:
            settings.refuse(error)
    _check_values(settings, prefix, factory, accepted, dict(kwargs))
    name_key = "optimizer.name" if key == "optimizer" else f"{key}.optimizer_name"
    _check_method(settings, name_key, group.optimizer_name, factory)
    return replace(group, optimizer_kwargs=kwargs)


def _bind_value(binder: Binder, parameter: inspect.Parameter | None, name: str, value: Any, dotted: str) -> Any:
    kind = Any if parameter is None else _kind_of(parameter.annotation)
    kind = _KINDS.get(name, Any) if kind is Any else kind
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if kind is float and value == "inf":
        return math.inf  # JSON has no infinity
    bound = binder.value(kind, value, dotted)
    # As torchtitan's own defaults have them, and hashable.
    return tuple(bound) if isinstance(bound, list) else bound


def _kind_of(annotation: Any) -> Any:
    """The type that a configuration may give for an annotated parameter; Any where that is unknown."""
    origin, arms = get_origin(annotation), get_args(annotation)
    if origin in (tuple, list, Sequence):
        return types.GenericAlias(list, (_kind_of(arms[0]),))
    if origin in (Union, types.UnionType):
        if torch.dtype in arms:
            return _DTYPES
        known = next((kind for kind in map(_kind_of, arms) if kind is not Any), Any)
        return known | None if types.NoneType in arms and known is not Any else known
    return annotation if annotation in (bool, int, float, str) else Any


def _check_values(
    settings: Settings, prefix: str, factory: Any, accepted: Mapping | None, kwargs: dict[str, Any]
) -> None:
    """Refuse what the optimizer refuses, in its own words where they say what is allowed.

    A value that is refused leaves ``kwargs``, so that the next one shows.
    """
    alone = True
    while (found := _bad_value(factory, accepted, kwargs)) is not None:
        name, problem = found
        if name not in kwargs and not alone:
            return  # the default is refused beside what is left
        value = kwargs.pop(name, _default(accepted, name)) if name else UNSET
        settings.refuse(settings.error(f"{prefix}.{name}" if name else prefix, problem, value))
        if name is None:
            return
        alone = False


def _bad_value(factory: Any, accepted: Mapping | None, kwargs: Mapping[str, Any]) -> tuple[str | None, str] | None:
    """The key and the problem of one value that cannot be; the key is None where several may be to blame."""
    refusal = _refusal(factory, accepted, kwargs)
    if refusal and isinstance(refusal[1], InvalidValue):
        return refusal[1].key, refusal[1].problem
    for name, value in kwargs.items():
        if name in _NOT_NEGATIVE and not value >= 0:
            return name, "must be at least 0"
        if name in _NOT_NEGATIVE and not math.isfinite(value):
            return name, "must be finite"
        if name == "eps" and value == 0:
            return name, "must be above 0: what has had no gradient, such as an unused row, would become 0 / 0"
        two = name == "betas" and "omegas" not in (accepted or {})
        if two and (len(value) != 2 or not all(0 <= beta < 1 for beta in value)):
            return name, "must be two numbers from 0 to below 1"
    return None if refusal is None else (refusal[0], one_line(str(refusal[1])))


def _check_method(settings: Settings, key: str, name: str, factory: Any) -> None:
    method = settings.get("semi_sync.method", SemiSyncConfig.method)
    needed = getattr(factory, "only_with_method", method)
    if method != needed and "semi_sync.method" not in settings.doubtful:
        problem = f'needs semi_sync.method = "{needed}", not "{method}": only its exchange moves the parameters'
        raise settings.error(key, problem, name)


def _refusal(factory: Any, accepted: Mapping | None, kwargs: Mapping[str, Any]) -> tuple[str | None, Exception] | None:
    """Why the optimizer cannot be built with ``kwargs``, and the key to blame if only one can be; None if it can."""
    if not (isinstance(factory, type) and issubclass(factory, Optimizer)):
        return None
    chosen = {key: value for key, value in kwargs.items() if accepted is None or key in accepted}
    problem = _problem(factory, chosen)
    if problem is None:
        return None
    without = {name: {key: value for key, value in chosen.items() if key != name} for name in chosen}
    guilty = [name for name, rest in without.items() if _problem(factory, rest) is None]
    return (guilty[0] if len(guilty) == 1 else None), problem


def _problem(factory: type[Optimizer], kwargs: Mapping[str, Any]) -> Exception | None:
    from titan_ext.trainer.optimizers import as_arguments

    try:
        factory([torch.nn.Parameter(torch.zeros(1, 1))], **as_arguments(kwargs))
    except (ValueError, TypeError, IndexError) as error:
        return error
    return None


def _factory(base: Any, name: str) -> Any:
    return base._owner._resolve_optimizer_factory(name)


def _accepted(factory: Any) -> dict[str, inspect.Parameter] | None:
    parameters = inspect.signature(factory).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return None
    return {key: each for key, each in parameters.items() if key not in _NOT_HYPER_PARAMETERS}


def _default(accepted: Mapping[str, inspect.Parameter] | None, name: str) -> Any:
    return accepted[name].default if accepted and name in accepted else None
