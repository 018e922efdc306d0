"""The weights of a checkpoint, as the trainer or Hugging Face's libraries write them."""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, StorageReader
from torch.distributed.checkpoint.api import CheckpointException

from titan_ext.config.resolved import FILE_NAME
from titan_ext.errors import RunError, UserError
from titan_ext.trainer.cpu import prepare

prepare()

from torchtitan.components.checkpoint import ModelWrapper  # noqa: E402
from torchtitan.protocols.model_spec import ModelSpec  # noqa: E402

Weights = Literal["site", "global"]
"""A site's own parameters, or the last ones that all sites agreed on."""

LATEST = "latest"
_STEP = re.compile(r"^step-(\d+)$")
_GLOBAL = re.compile(r"^semi_sync\.states\.[^.]+\.(.+)\.global$")
# What may stand in a checkpoint beside the weights: the trainer's other states, and in Hugging Face's files a buffer
# and a tied head.
_BESIDE = re.compile(r"^(optimizer|lr_scheduler|dataloader|train_state|semi_sync)\b|\.inv_freq$|^lm_head\.weight$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished checkpoint."""

    path: Path
    huggingface: bool
    """Whether it is Hugging Face's safetensors; else torch's distributed checkpoint."""

    @property
    def step(self) -> int | None:
        """The training step that the folder's name tells."""
        match = _STEP.match(self.path.name)
        return int(match.group(1)) if match else None

    def trained_with(self) -> dict[str, Any] | None:
        """The settings that the run of this checkpoint recorded; None where its folder holds no record."""
        record = self.path.absolute().parent.parent / FILE_NAME
        return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None


def find_checkpoint(asked: str, folder: Path) -> Checkpoint:
    """The checkpoint that the user means.

    Args:
        asked: "latest", a checkpoint's folder, or a folder of ``step-N`` folders, whose latest is taken.
        folder: where "latest" is looked for.

    Raises:
        UserError: there is none.
    """
    path = folder if asked == LATEST else Path(asked).expanduser()
    if asked != LATEST and not path.is_dir():
        raise UserError(f"--checkpoint {asked}: no such folder")
    steps = sorted((each for each in path.glob("step-*") if _STEP.match(each.name)), key=_step_number)
    for candidate in (path, *reversed(steps)):
        if (candidate / ".metadata").is_file():
            return Checkpoint(candidate, huggingface=False)
        if any(candidate.glob("*.safetensors")):
            return Checkpoint(candidate, huggingface=True)
    if asked == LATEST:
        raise UserError(
            f"--checkpoint latest: no finished checkpoint in {folder}; train with checkpoint.enable = true, "
            "or give --checkpoint PATH"
        )
    raise UserError(
        f"--checkpoint {asked}: must hold a checkpoint (.metadata or *.safetensors), or step-N folders with one"
    )


def load_weights(model: nn.Module, spec: ModelSpec, checkpoint: Checkpoint, weights: Weights = "site") -> None:
    """Read the model's weights, whatever layout wrote them, in place.

    Args:
        model: whole on one device.
        spec: the model's.
        checkpoint: where from.
        weights: "site", or "global" for the copy that the outer loop keeps.

    Raises:
        UserError: the checkpoint is of another model, or has no such weights.
        RunError: it cannot be read.
    """
    if weights == "global":
        _read_global(model, checkpoint)
        return
    own = ModelWrapper(model)
    if checkpoint.huggingface:
        own.load_state_dict(_from_huggingface(own.state_dict(), spec, checkpoint))
    else:
        state = own.state_dict()
        _read(state, FileSystemReader(checkpoint.path), checkpoint)
        own.load_state_dict(state)


def _read_global(model: nn.Module, checkpoint: Checkpoint) -> None:
    reader = FileSystemReader(checkpoint.path)
    sizes = {} if checkpoint.huggingface else _sizes(reader, checkpoint)
    keys = {match.group(1): key for key in sizes if (match := _GLOBAL.match(key))}
    if not keys:
        raise UserError(
            f"--weights global: {checkpoint.path} holds no global parameters: it was saved without the outer loop's "
            "state, or by a method whose sites share none; --weights site reads the site's own"
        )
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # What a site shares with nobody is its own alone.
    keys |= {name: name for name in parameters if name not in keys and name in sizes}
    _check_same_model(parameters, {name: sizes[key] for name, key in keys.items()}, checkpoint)
    _load({keys[name]: parameter for name, parameter in parameters.items()}, reader, checkpoint)


def _from_huggingface(state: dict[str, torch.Tensor], spec: ModelSpec, checkpoint: Checkpoint) -> dict[str, Any]:
    if spec.state_dict_adapter is None:
        raise UserError(f"--checkpoint {checkpoint.path}: {spec.name} {spec.flavor} has no Hugging Face format")
    adapter = spec.state_dict_adapter(spec.model, None)
    theirs = adapter.to_hf(state)
    _read(theirs, adapter.get_hf_storage_reader(str(checkpoint.path)), checkpoint)
    return adapter.from_hf(theirs)


def _read(state: dict[str, torch.Tensor], reader: StorageReader, checkpoint: Checkpoint) -> None:
    """Fill all of the state's tensors, which must be all weights of the checkpoint."""
    _check_same_model(state, _sizes(reader, checkpoint), checkpoint)
    _load(state, reader, checkpoint)


def _load(state: dict[str, torch.Tensor], reader: StorageReader, checkpoint: Checkpoint) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError) as error:
        raise RunError(f"checkpoint {checkpoint.path}: cannot be read: {_first_line(error)}") from error


def _sizes(reader: StorageReader, checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """Shapes of the tensors in a checkpoint."""
    try:
        entries = reader.read_metadata().state_dict_metadata
    except Exception as error:  # noqa: BLE001 — pickle and safetensors each have errors of their own
        raise RunError(f"checkpoint {checkpoint.path}: cannot be read: {_first_line(error)}") from error
    return {name: entry.size for name, entry in entries.items() if hasattr(entry, "size")}


def _check_same_model(
    wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Size], checkpoint: Checkpoint
) -> None:
    advice = "[model] and tokenizer must be those of the run"
    for name, tensor in wanted.items():
        if name not in found:
            raise UserError(f"checkpoint {checkpoint.path}: has no {name}, which the model has; {advice}")
        if found[name] != tensor.shape:
            theirs, ours = list(found[name]), list(tensor.shape)
            raise UserError(f"checkpoint {checkpoint.path}: {name} is {theirs}, in the model {ours}; {advice}")
    for name in found:
        if name not in wanted and not _BESIDE.search(name):
            raise UserError(f"checkpoint {checkpoint.path}: has {name}, which the model has not; {advice}")


def _step_number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
