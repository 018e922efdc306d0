"""One site's full trainer config from its settings."""

import dataclasses
import math
import os
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchtitan.tools.utils import device_type

from titan_ext.config import defaults
from titan_ext.config import dept as dept_variants
from titan_ext.config.binder import Binder, field_types
from titan_ext.config.choices import bind_activation_checkpoint, bind_loss
from titan_ext.config.converters import KEY as CONVERTERS
from titan_ext.config.converters import convert_model
from titan_ext.config.flags import FlagText
from titan_ext.config.fomoe import expert_scopes
from titan_ext.config.initial import Source, check_source, initial_source, open_source, tokenizer_notes
from titan_ext.config.losses import loss_tables
from titan_ext.config.model import ModelChoice, choose_model, chosen_flavor, flavor_config, model_module
from titan_ext.config.nodes import NODE_KEYS
from titan_ext.config.optimizer import bind_optimizer
from titan_ext.config.outer_loop import bind_semi_sync, own_tables
from titan_ext.config.resolved import FILE_NAME as RECORD
from titan_ext.config.sections import DeptConfig, FoMoEConfig, SiteConfig, SiteHeader
from titan_ext.config.settings import Origin, Settings
from titan_ext.config.tokenizer import TokenizerChoice, choose_tokenizer
from titan_ext.data import TextDataLoader
from titan_ext.errors import InvalidValue, UserError
from titan_ext.models.held_experts import hold
from titan_ext.object_store import is_url
from titan_ext.trainer.trainer import Trainer

# Fields of the trainer's config that are not sections: other keys of ours decide them.
_DECIDED = {"model_spec", "hf_assets_path", "dump_folder", "tokenizer", "dataloader", "site"}
_CHOSEN = {"loss", "activation_checkpoint", "optimizer", "semi_sync", "dept", "fomoe"}


@dataclass(frozen=True, slots=True)
class Built:
    """What became of a site's settings."""

    config: Trainer.Config
    model: ModelChoice | None
    """None where the user named none that can be built."""
    tokenizer: TokenizerChoice | None
    """None where it is not on this machine, or is none."""
    vocabulary: str
    """File of the part of the tokenizer that the site holds; empty for all of it."""
    derived: dict[str, Origin]
    """Layer of the values that the user did not set and torchtitan did not either, by dotted key."""
    source: Source | None
    """Folder of the weights, where that is in Hugging Face's format."""
    notes: list[str]
    """What a user should know though it is no mistake."""


def section_names() -> list[str]:
    """Sections that map onto torchtitan's dataclasses and ours, by name."""
    return [name for name in field_types(Trainer.Config) if name not in _DECIDED]


def keys_by_name() -> dict[str, list[str]]:
    """Dotted keys of all sections by the name of the key, to point at the right section."""
    from titan_ext.config.choices import LossSection

    plain = Trainer.Config()
    homes: dict[str, list[str]] = {}
    owners = {name: type(getattr(plain, name)) for name in section_names()}
    owners |= {"loss": LossSection, "data": TextDataLoader.Config, "validator.dataloader": TextDataLoader.Config}
    owners |= {f"loss.{name}": type(config) for name, config in loss_tables().items()}
    owners |= {f"semi_sync.{name}": owner for name, (_, owner) in own_tables().items()}
    for section, owner in owners.items():
        for name in field_types(owner) if dataclasses.is_dataclass(owner) else ():
            homes.setdefault(name, []).append(f"{section}.{name}")
    for name in ("name", "lr", "betas", "eps", "weight_decay"):
        homes.setdefault(name, []).append(f"optimizer.{name}")
    for name in ("flavor", "vocab_size"):
        homes.setdefault(name, []).append(f"model.{name}")
    for name in ("dump_folder", "hf_assets_path", "tokenizer", "vocabulary", *NODE_KEYS):
        homes.setdefault(name, []).append(name)
    # A section's own key is meant more often than that of a table within one.
    return {name: sorted(found, key=lambda home: home.count(".")) for name, found in homes.items()}


def build_config(settings: Settings, site: SiteConfig, header: SiteHeader, weights: Path | None = None) -> Built:
    """The trainer config of one site, ready to build; reads only this site's tokenizer.

    Complaints go to the settings' findings. What they leave open has a stand-in: a model without a known tokenizer has
    the flavor's own vocabulary, and ``config.model_spec`` is None where there is no model at all.

    Args:
        settings: what the user set for the site.
        site: who it is.
        header: its keys that are not sections.
        weights: a folder in Hugging Face's format that the model is of, in place of the one that training starts from.
    """
    findings = settings.findings
    binder = Binder(settings, keys_by_name())
    dept, fomoe = DeptConfig(), FoMoEConfig()
    with findings.catch():
        dept = binder.section("dept", dept)
    with findings.catch():
        fomoe = binder.section("fomoe", fomoe)
    folder = os.path.join(dump_root(settings), site.name)
    chosen, vocabulary = _tokenizer(settings, dept, header, folder)
    base, derived = _defaults(settings, site)
    changes = _sections(settings, binder, base)
    with findings.catch():
        changes["semi_sync"].scopes = dept_variants.variant_scopes(settings, dept, changes["semi_sync"].scopes)
    assets = header.hf_assets_path or (chosen.assets_path if chosen else header.tokenizer)
    source, model, spec = None, None, None
    with findings.catch():
        record = Path(folder) / RECORD
        source = open_source(weights) if weights else initial_source(settings, changes["checkpoint"], assets, record)
    part = dept_variants.asked_vocabulary(dept, header.vocabulary)
    if source is not None and weights is None and part:
        problem = f"a part of the tokenizer's, and {source.folder} has rows for all of it"
        settings.refuse(settings.error("vocabulary", problem, part))
    with findings.catch():
        model, spec = _model(settings, dept, chosen, source)
        if converters := settings.get(f"model.{CONVERTERS}"):
            spec = convert_model(settings, spec, changes["compile"])
            model = dataclasses.replace(model, overrides={**model.overrides, CONVERTERS: converters})
        spec = _hold_experts(settings, fomoe, site, spec, changes["semi_sync"])
    changes |= {
        "model_spec": spec,
        "site": site,
        "dept": dept,
        "fomoe": fomoe,
        "tokenizer": chosen.config if chosen else base.tokenizer,
        "dump_folder": folder,
        "hf_assets_path": assets or _export_folder(folder, changes["checkpoint"]),
    }
    rows = getattr(spec.model, "vocab_size", chosen.vocabulary if chosen else 1) if spec else 1
    with findings.catch():
        length, taught = max(1, changes["training"].seq_len), changes["regularizer"].teaches
        changes["loss"] = bind_loss(settings, binder, base.loss, rows, length, taught)
    config = _assembled(settings, base, changes)
    derived |= {f"model.{key}": Origin.WEIGHTS for key in (model.taken if model else ())}
    if model is not None and model.vocabulary_derived:
        derived["model.vocab_size"] = Origin.TOKENIZER
    notes = [] if source is None or spec is None else _source_notes(settings, source, spec, chosen is not None, header)
    return Built(config, model, chosen, vocabulary, derived, source, notes)


def _defaults(settings: Settings, site: SiteConfig) -> tuple[Trainer.Config, dict[str, Origin]]:
    """What holds where the user says nothing, and the layer of what is not torchtitan's."""
    base = Trainer.Config()
    with settings.findings.catch():
        base = _base_config(settings)
    derived = _flavored(base)
    if base.validator.dataloader == type(base.validator)().dataloader:
        # torchtitan's default reads C4 from the network; ours needs a dataset only once validation is on.
        base.validator.dataloader = TextDataLoader.Config(infinite=False)
    own = defaults.apply_defaults(base, _situation(settings, base, site), settings.origins)
    return base, derived | dict.fromkeys(own, Origin.TITAN_EXT)


def _source_notes(settings: Settings, source: Source, spec: Any, has_tokenizer: bool, header: SiteHeader) -> list[str]:
    notes: list[str] = []
    with settings.findings.check():
        notes += check_source(settings, source, model_module(settings), spec)
    return notes + (tokenizer_notes(source, header.tokenizer) if has_tokenizer else [])


def _tokenizer(
    settings: Settings, dept: DeptConfig, header: SiteHeader, folder: str
) -> tuple[TokenizerChoice | None, str]:
    """The site's tokenizer, None where it cannot be had, and the file of the part of it that the site holds."""
    vocabulary = ""
    with settings.findings.catch():
        vocabulary = dept_variants.vocabulary_file(settings, dept, header.vocabulary, site_folder=Path(folder))
    with settings.findings.catch():
        return choose_tokenizer(settings, header.tokenizer, vocabulary), vocabulary
    return None, vocabulary


def _sections(settings: Settings, binder: Binder, base: Trainer.Config) -> dict[str, Any]:
    """Every section as the user set it; one that cannot be bound at all as it was."""
    found: dict[str, Any] = {name: getattr(base, name) for name in section_names()}
    # Its method first: what another section says of one that is unknown is no news.
    bindings = {"semi_sync": partial(bind_semi_sync, settings, binder, base.semi_sync)}
    bindings |= {name: partial(binder.section, name, found[name]) for name in found if name not in _CHOSEN}
    bindings |= {
        "dataloader": partial(_dataloader, settings, binder, base),
        "optimizer": partial(bind_optimizer, settings, binder, base.optimizer),
        "activation_checkpoint": partial(bind_activation_checkpoint, settings, binder, base.activation_checkpoint),
    }
    found["dataloader"] = TextDataLoader.Config()
    for name, bind in bindings.items():
        with settings.findings.catch():
            found[name] = bind()
    found["semi_sync"] = copy(found["semi_sync"])  # what follows writes into it
    return found


def _model(
    settings: Settings, dept: DeptConfig, tokenizer: TokenizerChoice | None, source: Source | None
) -> tuple[ModelChoice, Any]:
    """The model; under a variant of DEPT its padding rows have no part in the softmax."""
    if dept.variant == "none" or tokenizer is None:
        return choose_model(settings, tokenizer.vocabulary if tokenizer else None, source=source)
    from titan_ext.models.dept import decouple

    multiple = math.lcm(max(1, dept.vocabulary_multiple), defaults.VOCABULARY_MULTIPLE)
    model, spec = choose_model(settings, tokenizer.vocabulary, multiple, source)
    dept_variants.check_dept(settings, dept, spec.model)
    if tokenizer.vocabulary > spec.model.vocab_size:
        return model, spec  # refused with the other checks of the vocabulary
    return model, decouple(spec, tokenizer.vocabulary)


def _hold_experts(settings: Settings, fomoe: FoMoEConfig, site: SiteConfig, spec: Any, outer: Any) -> Any:
    """The model with the site's share of the experts, whose scopes are added to the outer loop's."""
    copies, key = fomoe.sites_per_expert, "fomoe.sites_per_expert"
    if copies == 0:
        return spec
    if not 1 <= copies <= site.count:
        raise settings.error(key, f"must be from 1 to the {site.count} sites of the run, or 0", copies)
    if outer.method == "none":
        raise settings.error(
            key, 'must be 0 with semi_sync.method = "none": experts of other sites would be lost', copies
        )
    try:
        spec = hold(spec, copies, site.index, site.count)
    except InvalidValue as error:
        raise settings.error(key, error.problem, copies) from None
    outer.scopes = expert_scopes(settings, fomoe, spec.model, outer.scopes)
    return spec


def dump_root(settings: Settings) -> str:
    """The run's ``dump_folder``, which holds a folder for each site."""
    stem = os.path.splitext(os.path.basename(settings.file))[0]
    default = defaults.DUMP_FOLDER.format(stem=stem)
    folder = settings.get("dump_folder", default)
    try:
        folder = Binder(settings).value(str, folder, "dump_folder")
        if not folder.strip():
            raise settings.error("dump_folder", "must name a folder", folder)
        if is_url(folder):
            problem = (
                "must be a folder of this machine; checkpoints and copies of logs go to the URL in checkpoint.folder"
            )
            raise settings.error("dump_folder", problem, folder)
    except UserError as error:
        settings.refuse(error)
        folder = default
    return os.path.expanduser(folder)


def _base_config(settings: Settings) -> Trainer.Config:
    """What the flavor's config registry says, as our trainer's config."""
    try:
        found = flavor_config(model_module(settings), chosen_flavor(settings))
    except ImportError as error:
        problem = f"its config_registry cannot be imported: {error}"
        raise settings.error("model.name", problem, settings.get("model.name")) from None
    if found is None:
        return Trainer.Config()
    if not isinstance(found, Trainer.Config):
        # A spec of torchtitan's own: its trainer's sections are ours too, but for those that we derive from.
        plain = Trainer.Config()
        shared = {name: getattr(found, name) for name in field_types(Trainer.Config) if hasattr(found, name)}
        for name, section in shared.items():
            own = type(getattr(plain, name))
            if own is not type(section) and issubclass(own, type(section)):
                shared[name] = _as(section, own)
        found = Trainer.Config(**shared)
    return found


def _flavored(base: Trainer.Config) -> dict[str, Origin]:
    """Keys in which the flavor's config is not torchtitan's default."""
    sections = {name: getattr(base, name) for name in section_names() if dataclasses.is_dataclass(getattr(base, name))}
    return {
        f"{name}.{key}": Origin.FLAVOR
        for name, section in sections.items()
        for key, default in defaults.own_defaults(type(section)).items()
        if getattr(section, key) != default
    }


def _as(config: Any, owner: type) -> Any:
    return owner(**{name: getattr(config, name) for name in field_types(type(config)) if name in field_types(owner)})


def _situation(settings: Settings, base: Trainer.Config, site: SiteConfig) -> defaults.Situation:
    def get(key: str) -> Any:
        value = settings.get(key)
        if value is None:
            section, name = key.split(".")
            value = getattr(getattr(base, section), name)
        return value.literal() if hasattr(value, "literal") else value

    return defaults.Situation(device_type=device_type, site_count=site.count, site_index=site.index, get=get)


def _dataloader(settings: Settings, binder: Binder, base: Trainer.Config) -> Any:
    if not any(_is_given(settings.get(f"data.{key}")) for key in ("dataset", "source", "sources")):
        with settings.findings.check():
            raise settings.error("data", 'is missing: give the site data = "PATH", a dataset id or "builtin:code"')
    start = base.dataloader if isinstance(base.dataloader, TextDataLoader.Config) else TextDataLoader.Config
    if isinstance(start, TextDataLoader.Config) and (settings.get("data.source") or settings.get("data.sources")):
        start = dataclasses.replace(start, dataset="")  # the flavor's
    return binder.section("data", start)


def _is_given(value: Any) -> bool:
    value = value.literal() if isinstance(value, FlagText) else value
    return bool(value.strip() if isinstance(value, str) else value)


def _export_folder(folder: str, checkpoint: Any) -> str:
    # torchtitan's adapter to Hugging Face's format is incomplete without a folder, and reads it otherwise.
    return folder if checkpoint.last_save_in_hf else ""


def _assembled(settings: Settings, base: Trainer.Config, changes: dict[str, Any]) -> Trainer.Config:
    """The whole config; torchtitan's own refusal of a combination is noted at the key that it speaks of."""
    try:
        return dataclasses.replace(base, **changes)
    except (ValueError, AssertionError) as error:
        with settings.findings.check():
            raise _combination(settings, str(error)) from None
    # A stand-in for further checks, which torchtitan's never sees.
    config = copy(base)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _combination(settings: Settings, message: str) -> UserError:
    for word in message.replace("(", " ").replace(")", " ").split():
        key = word.strip(",.-'`").removeprefix("--")
        if settings.get(key) is not None and "." in key:
            return settings.error(key, message, settings.get(key))
    return settings.error("", message)
