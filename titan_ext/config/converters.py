"""``[[model.converters]]``: other layers in the place of the model's, such as float8 ones or LoRA's, by name."""

import dataclasses
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from titan_ext.config.binder import Binder, field_types
from titan_ext.config.findings import Need
from titan_ext.config.settings import Settings, hint, one_line

KEY = "converters"
TORCHTITANS = {
    "float8": "torchtitan.components.quantization.Float8LinearConverter",
    "float8_experts": "torchtitan.components.quantization.Float8GroupedExpertsConverter",
    "mxfp8": "torchtitan.components.quantization.MXFP8LinearConverter",
    "mxfp8_experts": "torchtitan.components.quantization.MXFP8GroupedExpertsConverter",
    "nvfp4": "torchtitan.components.quantization.NVFP4LinearConverter",
    "lora": "torchtitan.components.lora.LoRAConverter",
}
OURS = {
    "mup": "titan_ext.models.mup.MupConverter",
    "power_linear": "titan_ext.models.power_linear.PowerLinearConverter",
}
KNOWN = TORCHTITANS | OURS
_COMPILED = "model_compile_enabled"


def convert_model(settings: Settings, spec: Any, compile_config: Any) -> Any:
    """The model spec with its converters applied in the order of the file.

    Args:
        settings: of the site.
        spec: torchtitan's ``ModelSpec``.
        compile_config: torchtitan's, which converters of quantised layers want to know.

    Raises:
        Missing: a converter needs a package that is not installed.
        UserError: an unknown converter or key, or the converter refuses.
    """
    tables = settings.get(f"model.{KEY}", [])
    if not isinstance(tables, list) or not all(isinstance(each, dict) for each in tables):
        raise settings.error(f"model.{KEY}", "must be [[model.converters]] tables, one for each", tables)
    configs = [_bound(settings, f"model.{KEY}[{place}]", table, compile_config) for place, table in enumerate(tables)]
    model, keeps_weights = spec.model, True
    with _told_as(settings, f"model.{KEY}"):
        _check_order(configs)
    for place, config in enumerate(configs):
        with _told_as(settings, f"model.{KEY}[{place}]"):
            converter = config.build()
            model = converter.convert(model)
            keeps_weights = keeps_weights and getattr(converter, "keeps_weights", True)
    if not keeps_weights:
        spec = dataclasses.replace(spec, state_dict_adapter=None)
    return dataclasses.replace(spec, model=model) if configs else spec


@contextmanager
def _told_as(settings: Settings, key: str) -> Iterator[None]:
    """Turn what a converter complains of into a line about its table."""
    try:
        yield
    except ImportError as error:
        raise settings.missing(Need.MODEL, key, one_line(str(error))) from None
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise settings.error(key, one_line(str(error))) from None


def _check_order(configs: list[Any]) -> None:
    from torchtitan.models.utils import validate_converter_order

    validate_converter_order(configs)


def _bound(settings: Settings, key: str, table: dict[str, Any], compile_config: Any) -> Any:
    name = table.get("name")
    if not isinstance(name, str):
        problem = f"is missing: one of {', '.join(KNOWN)}, or the dotted path of a converter's class"
        raise settings.error(f"{key}.name", problem)
    owner = _class_of(settings, f"{key}.name", name).Config
    given = {each: value for each, value in table.items() if each != "name"}
    config = Binder(settings).table(owner, given, key)
    if _COMPILED in field_types(owner) and _COMPILED not in given:
        compiled = compile_config.enable and "model" in compile_config.components
        config = dataclasses.replace(config, **{_COMPILED: compiled})
    return config


def _class_of(settings: Settings, key: str, name: str) -> Any:
    path = KNOWN.get(name, name)
    module, _, attribute = path.rpartition(".")
    if not module:
        raise settings.error(key, f"unknown converter; {hint(name, KNOWN)}, or the dotted path of a class", name)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise settings.error(key, f"cannot be imported: {one_line(str(error))}", name) from None
    if not hasattr(found, "Config"):
        raise settings.error(key, "is no converter: it has no Config", name)
    return found
