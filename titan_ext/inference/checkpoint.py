"""The weights of a checkpoint, as the trainer or Hugging Face's libraries write them."""

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.protocols.model_spec import ModelSpec

from titan_ext.checkpoint_place import files_below, reader, steps_in
from titan_ext.config.recorded import changes_since, read_record, tokenizer_changes
from titan_ext.error_text import first_failure, reason
from titan_ext.errors import RunError, UserError
from titan_ext.huggingface.fit import check_weights
from titan_ext.huggingface.weights import what_instead
from titan_ext.models.fit import check_tensors, stored_shapes
from titan_ext.object_store import is_url

Weights = Literal["site", "global", "average"]
"""A site's own parameters, the last ones that all sites agreed on, or the mean of those over the rounds."""

LATEST = "latest"
_TEXT = "dataloader.settings"
_STEP = re.compile(r"^step-(\d+)$")
_SHARED = re.compile(r"^semi_sync\.states\.[^.]+\.(.+)\.(global|average)$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished checkpoint."""

    path: Path | str
    """Its folder, or a URL."""
    huggingface: bool
    """Whether it is Hugging Face's safetensors; else torch's distributed checkpoint."""

    @property
    def step(self) -> int | None:
        """The training step that the folder's name tells."""
        match = _STEP.match(os.path.basename(self.path))
        return int(match.group(1)) if match else None

    def trained_with(self) -> dict[str, Any] | None:
        """The settings that the run of this checkpoint recorded; None where its folder holds no record."""
        return read_record(self.path)

    def changes(self, config: Any) -> list[str]:
        """What a model computes otherwise than the one that its run trained; empty for Hugging Face's format.

        Args:
            config: the model's, of the same shapes.
        """
        return [] if self.huggingface else changes_since(self.path, config)

    def check_tokenizer(self, config: Any) -> None:
        """Refuse another tokenizer than the one that the model was trained with, as far as that is recorded.

        Args:
            config: the site's ``Trainer.Config``.

        Raises:
            UserError: naming what differs.
        """
        then = self._tokenizer()
        changed = [] if then is None else tokenizer_changes(then, config)
        if changed:
            raise UserError(
                f"checkpoint {self.path}: was trained with another tokenizer ({'; '.join(changed)}), by whose tokens the "
                "model would read and write other text; give that one"
            )

    def _tokenizer(self) -> Mapping[str, Any] | None:
        """What the checkpoint holds of its tokenizer, beside its place in the text, or else the record of its run."""
        if self.step is None:
            return None  # no run's
        if not self.huggingface and _TEXT in _metadata(reader(self.path), self).state_dict_metadata:
            found: dict[str, Any] = {_TEXT: ""}
            _load(found, reader(self.path), self)
            return json.loads(found[_TEXT])
        return (self.trained_with() or {}).get("resolved", {}).get("tokenizer")


def find_checkpoint(asked: str, folder: Path | str) -> Checkpoint:
    """The checkpoint that the user means.

    Args:
        asked: "latest", a checkpoint's folder, or a folder of ``step-N`` folders, whose latest is taken; or a URL of such.
        folder: where "latest" is looked for, or a URL.

    Raises:
        UserError: there is none.
        ReadError: an object store cannot be reached.
    """
    place = str(folder) if asked == LATEST else asked
    found = _at_url(place.rstrip("/")) if is_url(place) else _in_folder(asked, Path(folder))
    if found is None and asked == LATEST:
        raise UserError(
            f"--checkpoint latest: no finished checkpoint in {folder}; train with checkpoint.enable = true, "
            "or give --checkpoint PATH"
        )
    if found is None:
        held = None if is_url(place) else what_instead(Path(asked).expanduser())
        must = "must hold a checkpoint (.metadata or *.safetensors), or step-N folders with one"
        raise UserError(f"--checkpoint {asked}: {held or must}")
    return found


def _at_url(url: str) -> Checkpoint | None:
    names = files_below(url)
    steps = sorted(steps_in(url, names), reverse=True)
    finished = (name for name in ("", *(f"step-{step}/" for step in steps)) if f"{name}.metadata" in names)
    name = next(finished, None)
    return None if name is None else Checkpoint(f"{url}/{name}".rstrip("/"), huggingface=False)


def _in_folder(asked: str, folder: Path) -> Checkpoint | None:
    path = folder if asked == LATEST else Path(asked).expanduser()
    if asked != LATEST and not path.is_dir():
        raise UserError(f"--checkpoint {asked}: no such folder")
    steps = sorted((each for each in path.glob("step-*") if _STEP.match(each.name)), key=_step_number)
    for candidate in (path, *reversed(steps)):
        if (candidate / ".metadata").is_file():
            return Checkpoint(candidate, huggingface=False)
        if any(candidate.glob("*.safetensors")):
            return Checkpoint(candidate, huggingface=True)
    return None


def load_weights(model: nn.Module, spec: ModelSpec, checkpoint: Checkpoint, weights: Weights = "site") -> None:
    """Read the model's weights, whatever layout wrote them, in place.

    Args:
        model: whole on one device.
        spec: the model's.
        checkpoint: where from.
        weights: "site", or "global" or "average" for what the outer loop keeps.

    Raises:
        UserError: the checkpoint is of another model, or has no such weights.
        RunError: it cannot be read.
    """
    if weights != "site":
        _read_shared(model, checkpoint, weights)
        return
    own = ModelWrapper(model)
    if checkpoint.huggingface:
        own.load_state_dict(_from_huggingface(own.state_dict(), spec, checkpoint))
    else:
        state, storage = own.state_dict(), reader(checkpoint.path)
        _check_same_model(state, _sizes(storage, checkpoint), checkpoint)
        _load(state, storage, checkpoint)
        own.load_state_dict(state)


def _read_shared(model: nn.Module, checkpoint: Checkpoint, weights: Weights) -> None:
    storage = reader(checkpoint.path)
    sizes = {} if checkpoint.huggingface else _sizes(storage, checkpoint)
    keys = {match[1]: key for key in sizes if (match := _SHARED.match(key)) and match[2] == weights}
    if not keys and weights == "average":
        raise UserError(
            f"--weights average: {checkpoint.path} holds no running average of the global parameters, which "
            'semi_sync.weighting = "agnostic" keeps; --weights global reads the last ones'
        )
    if not keys:
        raise UserError(
            f"--weights global: {checkpoint.path} holds no global parameters: it was saved without the outer loop's "
            "state, or by a method whose sites share none; --weights site reads the site's own"
        )
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # What a site shares with nobody is its own alone.
    keys |= {name: name for name in parameters if name not in keys and name in sizes}
    _check_same_model(parameters, {name: sizes[key] for name, key in keys.items()}, checkpoint)
    _load({keys[name]: parameter for name, parameter in parameters.items()}, storage, checkpoint)


def _from_huggingface(state: dict[str, torch.Tensor], spec: ModelSpec, checkpoint: Checkpoint) -> dict[str, Any]:
    if spec.state_dict_adapter is None:
        raise UserError(f"--checkpoint {checkpoint.path}: {spec.name} {spec.flavor} has no Hugging Face format")
    check_weights(Path(checkpoint.path), spec.model, spec.state_dict_adapter)
    adapter = spec.state_dict_adapter(spec.model, None)
    theirs = adapter.to_hf(state)
    _load(theirs, adapter.get_hf_storage_reader(str(checkpoint.path)), checkpoint)
    return adapter.from_hf(theirs)


def _load(state: dict[str, Any], storage: StorageReader, checkpoint: Checkpoint) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=storage, no_dist=True)
    except (CheckpointException, OSError) as error:
        raise RunError(f"checkpoint {checkpoint.path}: cannot be read: {reason(first_failure(error))}") from error


def _sizes(storage: StorageReader, checkpoint: Checkpoint) -> dict[str, torch.Size]:
    """Shapes of the tensors in a checkpoint."""
    return stored_shapes(_metadata(storage, checkpoint))


def _metadata(storage: StorageReader, checkpoint: Checkpoint) -> Metadata:
    try:
        return storage.read_metadata()
    except Exception as error:  # unpickling what is damaged may raise anything
        raise RunError(f"checkpoint {checkpoint.path}: cannot be read: {reason(first_failure(error))}") from error


def _check_same_model(
    wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Size], checkpoint: Checkpoint
) -> None:
    check_tensors({name: tensor.shape for name, tensor in wanted.items()}, found, f"checkpoint {checkpoint.path}")


def _step_number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
