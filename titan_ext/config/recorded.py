"""The model that a run has recorded in its ``config.json``, beside the model of now.

Shapes of weights tell when sizes differ, but not how many heads they are cut into, what the norms add or how the
rotary embedding turns: with those changed, the same weights are another model.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan_ext.checkpoint_place import checkpoint_folder, files_below, read_text
from titan_ext.config.resolved import FILE_NAME, known_sizes, site_tokenizer
from titan_ext.config.settings import show
from titan_ext.data.resume import changed
from titan_ext.data.tokenizers.traits import identity
from titan_ext.errors import UserError
from titan_ext.models import get_model_spec
from titan_ext.models.llama3.huggingface import differing
from titan_ext.object_store import is_url

# Keys that the shapes of the weights tell of. A tied head is none: checkpoints hold it beside the embedding.
_SHAPED = ("dim", "n_layers", "ffn_dim", "vocab_size")
_OF_EXPERTS = ("top_k", "load_balance_coeff")


def check_resumed(site: Any) -> None:
    """Refuse to go on with a run as another model, or with another tokenizer, than so far.

    Args:
        site: a ``Site`` that is about to be trained.

    Raises:
        UserError: naming what differs, or what is wrong with the place of its checkpoints.
        ReadError: an object store cannot be reached.
    """
    checkpoint = site.config.checkpoint
    folder = checkpoint_folder(site.config.dump_folder, checkpoint.folder)
    if not checkpoint.enable or not _has_checkpoints(folder, checkpoint.retry_seconds):
        return
    record = os.path.join(os.path.dirname(folder) if is_url(folder) else site.config.dump_folder, FILE_NAME)
    recorded = _read(record, checkpoint.retry_seconds)
    if recorded is None:
        return
    name = recorded.get("model", {}).get("name", site.model.name)
    if name != site.model.name:
        problem = f"was {show(name)} in this run so far ({record}); another model needs another dump_folder"
        raise site.settings.error("model.name", problem, site.model.name)
    for key, then, now in changes(recorded, site.config.model_spec.model):
        problem = f"was {show(then)} in this run so far ({record}); another model needs another dump_folder"
        raise site.settings.error(f"model.{key}", problem, now)
    tolerant = site.config.dataloader.on_changed_data == "continue"
    if tolerant or "dataloader" in site.config.checkpoint.exclude_from_loading:
        return
    differing_parts = tokenizer_changes(recorded.get("resolved", {}).get("tokenizer", {}), site.config)
    if differing_parts:
        problem = f"another one than that of this run so far ({'; '.join(differing_parts)})"
        way = "restore it, go on all the same with data.on_changed_data = 'continue', or take another dump_folder"
        raise site.settings.error("tokenizer", f"{problem}: {way}", site.tokenizer)


def tokenizer_changes(then: Mapping[str, Any], config: Any) -> list[str]:
    """In what the tokenizer of a site differs from an earlier one, in words.

    Args:
        then: what is known of the earlier one; what it does not know is not compared.
        config: the site's ``Trainer.Config``.
    """
    now = identity(site_tokenizer(config))
    return [changed(key, then[key], value) for key, value in now.items() if key in then and then[key] != value]


def read_record(checkpoint: str | Path) -> dict[str, Any] | None:
    """The settings that the run of a checkpoint recorded; None where its folder holds no record.

    Args:
        checkpoint: folder or URL of one step, in the run's folder of checkpoints.
    """
    folder = str(checkpoint).rstrip("/") if is_url(checkpoint) else os.path.abspath(checkpoint)
    return _read(os.path.join(os.path.dirname(os.path.dirname(folder)), FILE_NAME))


def _has_checkpoints(folder: str, retry_seconds: float) -> bool:
    """Whether there are any that were finished."""
    if is_url(folder):
        return any(name.endswith("/.metadata") for name in files_below(folder, retry_seconds))
    return any(Path(folder).glob("step-*/.metadata"))


def _read(record: str, retry_seconds: float = 0.0) -> dict[str, Any] | None:
    """What a run has recorded in a file or behind a URL; None where that is not there.

    Raises:
        UserError: the file is damaged.
    """
    try:
        text = read_text(record, retry_seconds)
        found = None if text is None else json.loads(text)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{record}: the run's record is damaged ({error}): restore it, or remove it") from None
    if text is None:
        return None
    if not isinstance(found, dict) or not all(isinstance(found.get(key, {}), dict) for key in ("model", "resolved")):
        raise UserError(f"{record}: the run's record is damaged (no settings): restore it, or remove it")
    return found


def changes_since(checkpoint: str | Path, config: Any) -> list[str]:
    """What a model computes otherwise than the one that the run of a checkpoint trained, as far as that is recorded.

    Args:
        checkpoint: as in ``read_record``.
        config: the model's, of the same shapes.
    """
    return [
        f"model.{key} = {show(now)}: was {show(then)} in the run that saved {checkpoint}"
        for key, then, now in changes(read_record(checkpoint) or {}, config)
    ]


def changes(record: Mapping[str, Any], config: Any) -> list[tuple[str, Any, Any]]:
    """Keys of ``[model]`` that no shape tells of and that differ, each with its value then and now.

    Args:
        record: the settings that a run has recorded.
        config: of the model of now.
    """
    now = known_sizes(config)
    then = record.get("resolved", {}).get("model") or _sizes_before(record)
    return [(key, then[key], now[key]) for key in _differing(then, now) if key not in _SHAPED]


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        *differing(then, now),
        *(key for key in _OF_EXPERTS if key in then and key in now and then[key] != now[key]),
    ]


def _sizes_before(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run recorded that began before sizes were: all models then had the rotary scaling of Llama 3.1."""
    try:
        model = {"rope_scaling_factor": 8.0, **record["model"]}
        return known_sizes(get_model_spec(model.pop("name"), model.pop("flavor"), **model).model)
    except (UserError, KeyError, TypeError):
        return {}
