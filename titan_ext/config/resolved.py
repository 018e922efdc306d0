"""The resolved configuration of a site as plain data, which loads to the same site again."""

import dataclasses
import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from torchtitan.components.tokenizer import BaseTokenizer

from titan_ext.config.choices import activation_modes
from titan_ext.config.losses import name_in_file, name_of, own_fields
from titan_ext.config.settings import Origin
from titan_ext.data.tokenizers.traits import identity
from titan_ext.files import write_whole
from titan_ext.semi_sync.plan.regions import REGION

FILE_NAME = "config.json"
# Keys whose default is ours because torchtitan has no such key.
_OURS = {
    "dump_folder",
    "tokenizer",
    "vocabulary",
    "model.name",
    "model.flavor",
    "loss.name",
    "loss.chunked",
    "loss.num_chunks",
}


def dump_resolved(site: Any) -> dict[str, Any]:
    """Every setting of a ``Site`` in the shape of a configuration file, ready for JSON.

    ``load_site`` of a JSON file with this content gives an equal site. The key ``resolved`` adds
    facts that are not settings (file, ranks, layout, what the flavor's name stands for).
    """
    config = site.config
    sections = {
        each.name: plain(getattr(config, each.name))
        for each in dataclasses.fields(config)
        if each.name not in ("model_spec", "site", "tokenizer", "dataloader", "dump_folder", "hf_assets_path")
    }
    # Settings of a method, codec, aggregation or outer optimizer are tables of their own in a file.
    sections["semi_sync"] |= sections["semi_sync"].pop("settings")
    sections["optimizer"] = _finite(sections["optimizer"])
    sections["loss"] = _loss(config.loss)
    sections["activation_checkpoint"] = _activation_checkpoint(config.activation_checkpoint)
    return {
        "dump_folder": site.dump_root,
        "model": {"name": site.model.name, "flavor": site.model.flavor, **plain(site.model.overrides)},
        **sections,
        "data": plain(config.dataloader),
        "site": [
            {
                "name": site.name,
                "index": site.index,
                "count": site.count,
                "weight": site.weight,
                **_labels(config.site.labels),
                "nproc": site.nproc,
                "nodes": site.nodes.count,
                **({"rendezvous_port": site.nodes.port} if site.nodes.port else {}),
                "tokenizer": site.tokenizer,
                **({"vocabulary": site.vocabulary} if site.vocabulary else {}),
                **({"hf_assets_path": config.hf_assets_path} if site.settings.get("hf_assets_path") else {}),
            }
        ],
        "resolved": {
            "file": site.settings.file,
            "layout": dataclasses.asdict(site.layout),
            "notes": site.notes,
            "model": known_sizes(config.model_spec.model),
        },
    }


def site_tokenizer(config: Any) -> BaseTokenizer:
    """The tokenizer that a site trains with, from its ``Trainer.Config``."""
    return config.tokenizer.build(tokenizer_path=config.hf_assets_path)


def known_sizes(model: Any) -> dict[str, Any]:
    """What a model's config comes to, in keys of ``[model]``, whatever its flavor means in this version."""
    from titan_ext.models.capabilities import capabilities

    return dict(capabilities(model).sizes())


def save_resolved(site: Any) -> Path:
    """Write ``<dump_folder>/<site>/config.json``; the folder must exist.

    Returns:
        the file's path.
    """
    path = Path(site.config.dump_folder) / FILE_NAME
    content = dump_resolved(site)
    content["resolved"]["tokenizer"] = identity(site_tokenizer(site.config))
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_whole(path, text + "\n")
    return path


def origin_of(site: Any, key: str) -> Origin:
    """The layer that a resolved key's value comes from."""
    settings = site.settings
    if site.derived.get(key) is Origin.PLATFORM:
        return Origin.PLATFORM
    spelled = _spelling(site, key)
    if spelled is not None and settings.origin(spelled) is not None:
        return settings.origin(spelled)
    known = next((site.derived[each] for each in (key, ".".join(key.split(".")[:2])) if each in site.derived), None)
    return known or (Origin.TITAN_EXT if key in _OURS else Origin.TORCHTITAN)


def plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as what JSON knows; functions by their name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            each.name: plain(getattr(value, each.name))
            for each in dataclasses.fields(value)
            if each.init and not each.name.startswith("_")
        }
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return getattr(value, "__qualname__", str(value))


def _finite(value: Any) -> Any:
    """Plain data with infinity by its name, which JSON does not have as a number and an optimizer may be given."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return "inf" if value == math.inf else value


def _spelling(site: Any, key: str) -> str | None:
    """The key under which the user may have set a resolved key."""
    if key.startswith("optimizer.param_groups") and site.settings.get("optimizer.param_groups") is None:
        return "optimizer" if site.settings.get("optimizer") else None
    return key


def _loss(loss: Any) -> dict[str, Any]:
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

    name = name_of(loss)
    if name is not None:
        own = {key: plain(getattr(loss, key)) for key in own_fields(type(loss))}
        return {
            "name": name_in_file(loss, name),
            "chunked": True,
            "num_chunks": loss.num_chunks,
            "z_loss": loss.z_loss,
            "unigram_documents": loss.unigram_documents,
            "by_source": loss.by_source,
            **({name: own} if own else {}),
        }
    if isinstance(loss, ChunkedLossWrapper.Config) and type(loss.loss_fn) is CrossEntropyLoss.Config:
        return {"chunked": True, "num_chunks": loss.num_chunks}
    return {"chunked": False} if type(loss) is CrossEntropyLoss.Config else plain(loss)


def _activation_checkpoint(policy: Any) -> dict[str, Any]:
    kind = None if policy is None else type(policy)
    mode = next(mode for mode, owner in activation_modes().items() if owner is kind)
    return {"mode": mode, **(plain(policy) if policy is not None else {})}


def _labels(labels: Mapping[str, str]) -> dict[str, Any]:
    """A site's region and its other labels as keys of its table."""
    others = {key: label for key, label in labels.items() if key != REGION}
    region = {REGION: labels[REGION]} if REGION in labels else {}
    return {**region, **({"labels": others} if others else {})}
