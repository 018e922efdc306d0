"""``[optimizer]``: torchtitan's groups one to one, or the short form that is a single group."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from titan_ext.config.binder import Binder
from titan_ext.config.settings import Settings, hint

_ONE_TO_ONE = ("param_groups", "implementation", "optimizer_factory_kwargs_by_name")
_OPTIMIZERS = ("Adam", "AdamW", "DistMuon")
# Set by optimizer.implementation, or not a user's business.
_NOT_HYPER_PARAMETERS = {"self", "params", "foreach", "fused", "capturable", "differentiable"}


def bind_optimizer(settings: Settings, binder: Binder, base: Any) -> Any:
    """torchtitan's optimizer config from the one-to-one form, or from the short one (a single group)."""
    from torchtitan.components.optimizer import default_adamw

    if not base.param_groups:
        base = replace(base, param_groups=default_adamw().param_groups)
    table = settings.table("optimizer")
    allowed = [each.name for each in fields(base)]
    short = {key: value for key, value in table.items() if key not in allowed}
    direct = {key: value for key, value in table.items() if key in allowed}
    config = binder.table(base, direct, "optimizer") if direct else base
    if short and "param_groups" in direct:
        key = next(iter(short))
        raise settings.error(f"optimizer.{key}", "give either this short form or [[optimizer.param_groups]], not both")
    if short:
        config = replace(config, param_groups=[_single_group(settings, binder, base, short)])
    for place, group in enumerate(config.param_groups):
        key = "optimizer" if short else f"optimizer.param_groups[{place}]"
        _check_group(settings, base, group, key)
    return config


def _single_group(settings: Settings, binder: Binder, base: Any, short: Mapping[str, Any]) -> Any:
    from torchtitan.components.optimizer import ParamGroupConfig

    names = optimizer_names(base)
    group = base.param_groups[-1]
    name = binder.value(str, short.get("name", group.optimizer_name), "optimizer.name")
    if name not in names:
        raise settings.error("optimizer.name", f"unknown optimizer; {hint(name, names)}", name)
    accepted = hyper_parameters(base, name)
    # Another optimizer starts from its own defaults: AdamW's weight decay is not SGD's.
    kwargs = dict(group.optimizer_kwargs) if group.optimizer_name == name else {}
    for key, value in short.items():
        if key == "name":
            continue
        if accepted is not None and key not in accepted:
            raise settings.error(f"optimizer.{key}", f"unknown key; {hint(key, ['name', *accepted, *_ONE_TO_ONE])}")
        kwargs[key] = binder.value(_kind_of(accepted, key), value, f"optimizer.{key}")
    return ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs=kwargs)


def _check_group(settings: Settings, base: Any, group: Any, key: str) -> None:
    names = optimizer_names(base)
    if group.optimizer_name not in names:
        problem = f"unknown optimizer; {hint(group.optimizer_name, names)}"
        raise settings.error(f"{key}.optimizer_name", problem, group.optimizer_name)
    accepted = hyper_parameters(base, group.optimizer_name)
    for name, value in group.optimizer_kwargs.items():
        dotted = f"{key}.{name}" if key == "optimizer" else f"{key}.optimizer_kwargs.{name}"
        if accepted is not None and name not in accepted and name not in _NOT_HYPER_PARAMETERS:
            raise settings.error(dotted, f"unknown key; {hint(name, accepted)}")
        _check_number(settings, dotted, name, value)
        if isinstance(value, list):
            # As torchtitan's own defaults have them, and hashable.
            group.optimizer_kwargs[name] = tuple(value)


def _check_number(settings: Settings, dotted: str, name: str, value: Any) -> None:
    if name in ("lr", "eps", "weight_decay", "momentum"):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise settings.error(dotted, "must be a number", value)
        if not value >= 0:
            raise settings.error(dotted, "must be at least 0", value)
    if name == "betas" and not (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in value)
    ):
        raise settings.error(dotted, "must be two numbers from 0 to below 1", value)


def optimizer_names(base: Any) -> list[str]:
    """Names that the optimizer container of ``base`` resolves."""
    named = getattr(base._owner, "optimizer_names", None)
    return list(named()) if callable(named) else list(_OPTIMIZERS)


def hyper_parameters(base: Any, name: str) -> dict[str, Any] | None:
    """Hyper-parameters that an optimizer takes and their defaults; None if it takes any."""
    factory = base._owner._resolve_optimizer_factory(name)
    parameters = inspect.signature(factory).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return None
    return {key: each.default for key, each in parameters.items() if key not in _NOT_HYPER_PARAMETERS}


def _kind_of(accepted: Mapping[str, Any] | None, key: str) -> Any:
    """The type a hyper-parameter must have, from its default."""
    default = (accepted or {}).get(key)
    if isinstance(default, bool):
        return bool
    if key in ("lr", "eps", "weight_decay", "momentum") or isinstance(default, float):
        return float
    return list[float] if key == "betas" else Any
