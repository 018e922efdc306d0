"""Every key that a configuration may have: type, default, text and where it is defined, from the dataclasses."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

from titan_ext.config import defaults
from titan_ext.config.binder import describe, field_types
from titan_ext.config.build import section_names
from titan_ext.config.choices import LossSection, activation_modes
from titan_ext.config.converters import KNOWN as CONVERTERS
from titan_ext.config.losses import loss_tables, own_fields
from titan_ext.config.model import VOCABULARY
from titan_ext.config.optimizer import hyper_parameters, optimizer_names
from titan_ext.config.outer_loop import own_tables
from titan_ext.config.reference.torchtitan_keys import OPTIMIZER_TEXTS, TEXTS
from titan_ext.config.sections import RegionHeader, SiteHeader
from titan_ext.config.toml_text import toml_value
from titan_ext.data import TextDataLoader
from titan_ext.models import own_names
from titan_ext.models.sizes import Sizes
from titan_ext.models.upstream import upstream_names
from titan_ext.semi_sync.methods.registry import METHODS
from titan_ext.semi_sync.plan.regions import REGION
from titan_ext.trainer.trainer import Trainer

SITE = "site"
TABLES: dict[str, type] = {SITE: SiteHeader, REGION: RegionHeader}
"""Dataclasses of the keys of ``[[NAME]]`` tables that are not sections."""
"""Keys of a ``[[site]]`` table; those that may also stand at the top of a file, for all sites, are among them."""

_HIDDEN = {
    "data.dataset_path",
    "validator.dataloader.dataset_path",
    "validator.dataloader.mix",
    "validator.dataloader.mix_changes",
    "validator.dataloader.mix_changes.step",
    "validator.dataloader.mix_changes.mix",
    "profiler.trace_post_processor",
    "semi_sync.settings",
    *(f"validator.dataloader.{key}" for key in ("sources", "source", "source.name", "source.dataset", "source.weight")),
}
_TOP = {"dump_folder": "Folder of the run, with a folder for each site; by default runs/ and the file's name."}
_BY_MODEL, _BY_TOKENIZER = "the flavor's", "the tokenizer's"
_ARGUMENT = re.compile(r"^ {4}(\w[\w, ]*): (.*)$")


@dataclass(frozen=True, slots=True)
class Key:
    """One key."""

    name: str
    """Dotted."""

    type: str
    default: str
    """As TOML writes it, or in words."""

    text: str
    """What it does, in our words."""

    file: str
    """Where it is defined, below the package that has it."""

    torchtitan: str = ""
    """torchtitan's own text, where the key is torchtitan's."""

    @property
    def section(self) -> str:
        """The table that it stands in."""
        return self.name.rpartition(".")[0]


def sections() -> dict[str, str]:
    """What each section is for, by its name, in the order of a file."""
    plain = Trainer.Config()
    names = [*TABLES, "model", "data", *(name for name in section_names())]
    found = {name: _purpose(name, getattr(plain, name, None)) for name in names}
    found |= {"validator.dataloader": "Data of the validation; keys as in [data]."} | _LISTED
    found |= {f"loss.{name}": f'Settings of name = "{name}".' for name in loss_tables()}
    return found | {f"semi_sync.{name}": f'Settings of {key} = "{name}".' for name, (key, _) in own_tables().items()}


@cache
def all_keys() -> tuple[Key, ...]:
    """Every key, by section."""
    plain = Trainer.Config()
    file = "titan_ext/config/build.py"
    keys = [Key(name, "a string", toml_value("runs/FILE"), text, file) for name, text in _TOP.items()]
    for table, header in TABLES.items():
        keys += [_key(f"{table}.{name}", header, name, _DEFAULT) for name in field_types(header)]
    for section in sections():
        if section == "model":
            keys += _model_keys()
        elif section == "optimizer":
            keys += _optimizer_keys(plain.optimizer)
        elif section == "activation_checkpoint":
            keys += _activation_keys()
        elif "." not in section and section not in TABLES:
            keys += _section_keys(section, _owner(section, plain))
    keys += _section_keys("validator.dataloader", TextDataLoader.Config(infinite=False))
    for name, config in loss_tables().items():
        keys += [_key(f"loss.{name}.{field}", type(config), field, _DEFAULT) for field in own_fields(type(config))]
    for name, (_, owner) in own_tables().items():
        keys += [_key(f"semi_sync.{name}.{field}", owner, field, _DEFAULT) for field in field_types(owner)]
    return tuple(key for key in keys if key.name not in _HIDDEN)


def _owner(section: str, plain: Trainer.Config) -> Any:
    own = {"data": TextDataLoader.Config, "loss": LossSection}
    return own[section]() if section in own else getattr(plain, section)


def _section_keys(section: str, config: Any) -> Iterator[Key]:
    for name, kind in field_types(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            continue
        yield _key(f"{section}.{name}", type(config), name, value)
        inner = next(iter(get_args(kind)), None) if get_origin(kind) is list else None
        if dataclasses.is_dataclass(inner):  # a list of tables
            yield from (_key(f"{section}.{name}.{field}", inner, field, _DEFAULT) for field in field_types(inner))


def _model_keys() -> Iterator[Key]:
    """Keys of our own models, each with the models that take it."""
    yield Key("model.name", "a string", toml_value(defaults.MODEL), _model_text(), "titan_ext/config/model.py")
    text = "A size of the model by name; every key of it can be overridden beside it."
    yield Key("model.flavor", "a string", toml_value(defaults.FLAVOR), text, "titan_ext/config/model.py")
    takers: dict[str, list[tuple[str, type]]] = {}
    for model in own_names():
        owner = type(next(iter(importlib.import_module(f"titan_ext.models.{model}").flavors.values())))
        for name in field_types(owner):
            takers.setdefault(name, []).append((model, owner))
    for name in field_types(Sizes):
        takers.setdefault(name, []).append(("torchtitan's own", Sizes))
    for name, taken in takers.items():
        key = _key(f"model.{name}", taken[0][1], name, dataclasses.MISSING)
        only = "" if len(taken) > len(own_names()) else f" ({', '.join(model for model, _ in taken)})"
        yield dataclasses.replace(key, default=_BY_TOKENIZER if name == VOCABULARY else _BY_MODEL, text=key.text + only)
    yield Key("model.converters", "a list of tables", "[]", _CONVERTERS, "titan_ext/config/converters.py")
    text = 'torchtitan\'s name of the attention: "flex", "flex_flash" or "varlen".'
    yield Key("model.attn_backend", "a string", '"flex"', text, "titan_ext/models/llama3/__init__.py")


_CONVERTERS = (
    "[[model.converters]] tables, applied in turn: other layers in the place of the model's, by name "
    f"({', '.join(CONVERTERS)}, or the dotted path of a class), with the converter's own settings beside it."
)


def _model_text() -> str:
    theirs = ", ".join(name for name in upstream_names() if name not in own_names())
    return f"{', '.join(own_names())}; torchtitan's {theirs}; or the dotted path of a module with model_registry(flavor, …)."


def _optimizer_keys(base: Any) -> Iterator[Key]:
    """The short form, with the optimizers that take each key, then torchtitan's own form."""
    names = optimizer_names(base)
    file = "titan_ext/trainer/optimizers.py"
    yield Key("optimizer.name", "a string", '"AdamW"', f"The inner optimizer: {', '.join(names)}.", file)
    takers: dict[str, list[tuple[str, Any]]] = {}
    for optimizer in names:
        for name, default in (hyper_parameters(base, optimizer) or {}).items():
            takers.setdefault(name, []).append((optimizer, default))
    for name, taken in takers.items():
        values = dict.fromkeys(toml_value(_plain(value)) for _, value in taken)
        default = next(iter(values)) if len(values) == 1 else "the optimizer's"
        text = next(filter(None, (_argument_text(base, name, optimizer) for optimizer, _ in taken)), "")
        text = f"{text or OPTIMIZER_TEXTS.get(name, '')} ({', '.join(optimizer for optimizer, _ in taken)})"
        whole = all(type(value) is int for _, value in taken) and name not in OPTIMIZER_TEXTS
        kind = "a number" if type(taken[0][1]) is int and not whole else _kind(taken[0][1])
        yield Key(f"optimizer.{name}", kind, default, text.strip(), file)
    yield from _section_keys("optimizer", base)


def _argument_text(base: Any, name: str, optimizer: str) -> str:
    """What the docstring of one of our optimizers says of an argument itself; empty where it says nothing."""
    factory = base._owner._resolve_optimizer_factory(optimizer)
    if name in OPTIMIZER_TEXTS or not factory.__module__.startswith("titan_ext"):
        return ""
    found, text = False, ""
    for line in (inspect.getdoc(factory) or "").splitlines():
        match = _ARGUMENT.match(line)
        if match:
            found = name in match.group(1).split(", ")
            text = match.group(2) if found else text
        elif found and line.startswith(" " * 8):
            text += " " + line.strip()
        elif found:
            break
    text = re.sub(r":class:`(\w+)`", r"\1", text)
    return "" if text.startswith("as for") else text[:1].upper() + text[1:]


def _activation_keys() -> Iterator[Key]:
    modes = activation_modes()
    text = "What is recomputed in the backward pass instead of kept."
    kind = "one of " + ", ".join(modes)
    yield Key("activation_checkpoint.mode", kind, '"selective"', text, "titan_ext/config/choices.py")
    takers: dict[str, list[tuple[str, Any]]] = {}
    for mode, owner in modes.items():
        for name in field_types(owner) if owner is not None else ():
            takers.setdefault(name, []).append((mode, owner))
    for name, taken in takers.items():
        owner = taken[0][1]
        key = _key(f"activation_checkpoint.{name}", owner, name, getattr(owner(), name))
        only = "" if len(taken) == len(modes) - 1 else f" (mode {', '.join(mode for mode, _ in taken)})"
        yield dataclasses.replace(key, text=key.text + only)


_DEFAULT = object()
"""The dataclass's own default."""


def _file(owner: type) -> str:
    """The source file of a class, below the folder of its package."""
    path = Path(inspect.getsourcefile(owner))
    return path.relative_to(path.parents[owner.__module__.count(".") + (path.name == "__init__.py")]).as_posix()


def _key(dotted: str, owner: Any, name: str, value: Any) -> Key:
    definer = next(each for each in owner.__mro__ if name in vars(each).get("__annotations__", {}))
    written = _docstrings(definer).get(name, "")
    theirs = definer.__module__.startswith("torchtitan")
    text = TEXTS.get(dotted.replace("validator.dataloader.", "data."), "") if theirs else written
    value = defaults.own_defaults(owner)[name] if value is _DEFAULT else value
    return Key(
        name=dotted,
        type=describe(field_types(owner)[name]),
        default="" if value is dataclasses.MISSING else _default(dotted, value),
        text=text,
        file=_file(definer),
        torchtitan=written if theirs else "",
    )


def _default(dotted: str, value: Any) -> str:
    """The default: ours where we have one, in words where it depends; else the dataclass's."""
    own = next((each for each in defaults.DEFAULTS if each.key == dotted), None)
    if own is not None:
        return own.said or toml_value(own.value)
    by_method = _method_defaults(dotted.removeprefix("semi_sync.")) if dotted.startswith("semi_sync.") else {}
    if value is None and by_method:
        return "by method: " + ", ".join(f"{method} {toml_value(_plain(each))}" for method, each in by_method.items())
    return toml_value(_plain(value))


def _method_defaults(name: str) -> dict[str, Any]:
    methods = {method: METHODS.get(method) for method in METHODS}
    filled = {
        method: {**entry.outer.get(entry.defaults.get("outer_optimizer"), {}), **entry.defaults}
        for method, entry in methods.items()
    }
    return {method: values[name] for method, values in filled.items() if name in values}


@cache
def _docstrings(owner: type) -> dict[str, str]:
    """The text under each field of a dataclass, from its source."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _purpose(name: str, config: Any) -> str:
    if name in _PURPOSES:
        return _PURPOSES[name]
    return _docstrings(Trainer.Config).get(name) or (inspect.getdoc(type(config)) or "").splitlines()[0]


_LISTED = {
    "data.mix_changes": "[[data.mix_changes]] tables, [[site.data.mix_changes]] in a site's: other shares from a step on.",
    "optimizer.param_groups": "[[optimizer.param_groups]] tables, instead of the short form.",
    "data.source": "[[source]] tables, at the top or in a [[site]] as [[site.source]]: data sources of a site.",
    "regularizer.phases": "[[regularizer.phases]] tables: rounds in which inner steps are kept near the received model.",
    "semi_sync.scopes": "[[semi_sync.scopes]] tables: parameters that the sites share in a way of their own.",
}
"""Sections that are lists of tables."""

_PURPOSES = {
    SITE: "A [[site]] table for each site. All but name, index and count may also stand at the top, for all sites.",
    REGION: "A [[region]] table for each region of a tree of sites; its sections count for all sites of the region.",
    "model": "The model and its sizes.",
    "data": 'The site\'s corpus; data = "PATH" is short for its dataset.',
    "profiler": "torch's profiler and memory snapshots.",
    "lr_scheduler": "The learning rate over the steps.",
    "training": "Batches, steps and number formats of the inner loop.",
    "parallelism": "How a site's ranks share the model and the batch.",
    "activation_checkpoint": "What is recomputed in the backward pass instead of kept.",
    "compile": "torch.compile.",
    "comm": "Collectives inside the site.",
    "validator": "Loss on other data, now and then.",
    "debug": "Seeds, determinism and what helps to find faults.",
    "override": "Other implementations of torchtitan's parts.",
    "loss": "Cross-entropy over the model's vocabulary.",
}


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list, tuple, dict, type(None))) else str(value)


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "a list of numbers" if all(isinstance(each, (int, float)) for each in value) else "a list of strings"
    return describe(type(value)) if isinstance(value, (bool, int, float, str)) else 'a name or "none"'
