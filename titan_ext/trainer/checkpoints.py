"""torchtitan's checkpoints for a site that may be cut short at any moment."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components import checkpointer as torchtitan_checkpointer
from torchtitan.components.checkpointer.base import LR_SCHEDULER, MODEL, OPTIMIZER
from torchtitan.components.checkpointer.dcp import AsyncMode
from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger

from titan_ext.config.recorded import changes_since
from titan_ext.error_text import first_failure, reason
from titan_ext.errors import RunError, UserError
from titan_ext.huggingface.description import write_description
from titan_ext.huggingface.fit import check_weights
from titan_ext.models.fit import check_tensors, model_tensors
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.views import with_own_storage
from titan_ext.trainer.disks import Disks, StoredFile, find_disks, stored_files
from titan_ext.trainer.optimizers import OptimizersContainer
from titan_ext.trainer.resuming import PartialLoadPlanner, Stored, flattened, fresh_words, stored_shapes
from titan_ext.trainer.split_checkpoint import SplitReader
from titan_ext.trainer.stored_bytes import broken_part

_Found = TypeVar("_Found")
_HUGGING_FACE = ("model.safetensors.index.json", "model.safetensors")


class CheckpointManager(torchtitan_checkpointer.CheckpointManager):
    """torchtitan's manager, which loads only what is whole and says in one line why it cannot save or load.

    Raises:
        RunError: a checkpoint cannot be written or read.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan_checkpointer.CheckpointManager.Config):
        pass

    def __init__(self, config: Config, **parts: Any) -> None:
        self._saved_step: int | None = None
        self._now = False
        self._last_step: int | None = None
        self._disks = Disks()
        self.held = False
        """Whether a step is not to be saved, because another data source of the round has yet to take it."""
        self.notes: list[str] = []
        """What a user should know of the checkpoint that was loaded."""
        self._sound: set[str] = set()
        self.loaded = ""
        """The checkpoint that was loaded; empty where there was none."""
        self.model_config: Any = None
        """Config of the whole model, whose tensors a checkpoint must hold; the trainer's to set before a load."""
        self.description: dict[str, Any] = {}
        """What a checkpoint in Hugging Face's format says of the model: its ``config.json``."""
        super().__init__(config, **parts)

    def save_now(self, step: int) -> bool:
        """Save everything after inner step ``step``, whatever the interval; returns whether it is saved when this returns."""
        if not self.enable or self.load_only:
            return False
        if self._saved_step != step or self.held:
            self.interval, self._now = 1, True
            self.save(step)
        self.maybe_wait_for_saving()
        return True

    def load(self, step: int = -1) -> bool:
        """As torchtitan's.

        Raises:
            UserError: what the run is to start from is not there.
        """
        if self.enable and not filesystem.is_remote(self.folder):
            self._look_at_disks()
        try:
            return super().load(step)
        except (ValueError, FileNotFoundError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"checkpoint: {reason(error)}") from None

    def _look_at_disks(self) -> None:
        self._disks = find_disks(self.folder)
        if self._disks.are_one:
            return
        if self.last_save_in_hf:
            raise UserError(
                "checkpoint.last_save_in_hf = true: the nodes of the site have disks of their own, and files in this format "
                "are written by all ranks: set checkpoint.folder to one that all nodes see, or leave it to titan-ext export"
            )
        self.notes.append(
            f"nodes of this site have disks of their own: {self.folder} holds the part of their ranks at each; "
            "titan-ext eval, generate and export need all parts in one folder"
        )

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        """As torchtitan's; what an earlier attempt left in the folder goes first, and what a failed one left, at once."""
        # New data under old metadata would pass for a checkpoint. The others write when rank 0 has planned.
        self._remove(checkpoint_id)
        if "semi_sync" in state_dict and self.async_mode is not AsyncMode.DISABLED:
            state_dict = state_dict | {"semi_sync": with_own_storage(state_dict["semi_sync"].state_dict())}
        with self._writing(checkpoint_id):
            saved = super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)
            if kwargs.get("to_hf") and self.description and torch.distributed.get_rank() == 0:
                write_description(Path(checkpoint_id), self.description)
            return saved

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """As torchtitan's; what a run can do without starts fresh where the checkpoint does not hold it.

        Raises:
            UserError: the checkpoint is of another model, or damaged.
        """
        from_hf = from_hf or self._first_rank(lambda: not _has_metadata(checkpoint_id))
        files = self._files(checkpoint_id)
        if from_hf:
            if self.sd_adapter is None:
                raise UserError(f"checkpoint {checkpoint_id}: the model has no Hugging Face format")
            # Every rank looks for itself, and all come to the same end.
            check_weights(Path(checkpoint_id), self.model_config, type(self.sd_adapter), quantised=from_quantized)
        elif problem := (self._first_rank(lambda: damage(checkpoint_id, files)) or self._broken(checkpoint_id, files)):
            raise UserError(f"checkpoint {checkpoint_id}: {problem}; choose another")
        states = {name: state_dict[name] for name in self.states if name in state_dict}
        weights = {key: value for key, value in state_dict.items() if key not in states}
        try:
            if from_hf:
                super().dcp_load(weights, checkpoint_id, True, from_quantized)
                fresh = {name: fresh_words(name) for name in states}
            else:
                fresh = self._load_what_is_there(weights, states, checkpoint_id, files)
        except CheckpointException as error:
            raise RunError(f"checkpoint {checkpoint_id}: cannot be read: {reason(first_failure(error))}") from None
        self._begin_fresh(fresh, checkpoint_id)
        self.loaded = checkpoint_id

    def _load_what_is_there(
        self, weights: dict[str, Any], states: dict[str, Any], checkpoint: str, files: Mapping[str, StoredFile] | None
    ) -> dict[str, str]:
        """Weights and states in place; returns what is to be said of the states that were not in the checkpoint."""
        remote = filesystem.is_remote(checkpoint)
        shapes = self._first_rank(lambda: stored_shapes(checkpoint, remote))
        tensors = {key: torch.Size(shape) for key, shape in shapes.items() if shape is not None}
        check_tensors(model_tensors(self.model_config), tensors, f"checkpoint {checkpoint}")
        for change in () if remote else changes_since(Path(checkpoint), self.model_config):
            logger.warning("%s", change)
        stored = Stored(shapes)
        wanted = {name: dict(flattened(name, state.state_dict())) for name, state in states.items()}
        lacking = {name: words for name, keys in wanted.items() if (words := stored.lacks(name, keys))}
        fresh = _merged(SiteRanks().gather(lacking))
        loaded = {name: state for name, state in states.items() if name not in fresh}
        moved = _merged(stored.moved(wanted[name]) for name in loaded)
        state_dict = weights | loaded
        reader = None
        if files is not None:
            metadata = self._first_rank(lambda: FileSystemReader(checkpoint).read_metadata())
            reader = SplitReader(checkpoint, metadata, files)
        dcp.load(state_dict, storage_reader=reader, checkpoint_id=checkpoint, planner=PartialLoadPlanner(moved))
        self.states[MODEL].load_state_dict(state_dict)
        return fresh | {part: part for name in loaded for part in sorted(stored.lacks_parts(wanted[name]))}

    def not_gone_on_from(self, dump_folder: str) -> str | None:
        """What is to be said of what a user may think that the run goes on from, and it does not; None for nothing.

        Args:
            dump_folder: the site's.
        """
        if self.loaded and self.initial_load_path and os.path.dirname(self.loaded) == os.path.normpath(self.folder):
            return f"checkpoint.initial_load_path is not read: this run goes on from its own {self.loaded}"
        folders = [path for path in Path(dump_folder).glob("*/step-*") if path.name.removeprefix("step-").isdigit()]
        found = sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))
        if self.loaded or not found:
            return None
        if not self.enable:
            why = "checkpoint.enable is false"
        elif all(path.parent.name != os.path.basename(self.folder) for path in found):
            why = f"checkpoint.folder is another, {self.folder}"
        else:
            why = "none is whole"
        return f"this run does not go on from the checkpoints in {dump_folder}, such as {found[-1]}: {why}"

    def _begin_fresh(self, fresh: Mapping[str, str], checkpoint: str) -> None:
        """Note what was not in the checkpoint; inner steps count on where this is the run's own."""
        if not fresh:
            return
        if OPTIMIZER in fresh and isinstance(self.states[OPTIMIZER], OptimizersContainer):
            self.states[OPTIMIZER].begin_anew()
        step = re.fullmatch(r"step-(\d+)", os.path.basename(checkpoint))
        if step and checkpoint == self._create_checkpoint_id(int(step[1])):
            if "train_state" in fresh:
                self.states["train_state"].load_state_dict({"step": int(step[1]), "ntokens_seen": 0})
            if LR_SCHEDULER in fresh:
                self.states[LR_SCHEDULER].load_state_dict(
                    {"last_epoch": self.states["train_state"].state_dict()["step"]}
                )
        self.notes.append(f"checkpoint {checkpoint}: starts fresh: {'; '.join(fresh.values())}")

    def _files(self, folder: str) -> dict[str, StoredFile] | None:
        """What nodes with disks of their own have in a folder; None where one disk tells all. A collective."""
        return None if self._disks.are_one or filesystem.is_remote(folder) else stored_files(folder, self._disks)

    def _should_purge(self) -> bool:
        """At each disk there is a rank that removes what is old."""
        keeps_order = self._disks.keeps_order(torch.distributed.get_rank())
        return self.keep_latest_k > 0 and keeps_order and filesystem.isdir(self.folder)

    def _first_rank(self, find: Callable[[], _Found]) -> _Found:
        """What rank 0 finds, at every rank: a disk that all share may show them different things for a moment.

        Raises:
            UserError, OSError: as ``find`` at rank 0.
        """
        found: Any = None
        if torch.distributed.get_rank() == 0:
            try:
                found = find()
            except (UserError, OSError) as error:
                found = error
        found = SiteRanks().gather(found)[0]
        if isinstance(found, Exception):
            raise found
        return found

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if self.held and not (self._now or last_step):
            return False
        if curr_step == self._last_step:
            return False  # torchtitan does not know that the run ended before training.steps
        saved = super()._save(curr_step, last_step)
        if saved:
            self._saved_step = curr_step
            self._last_step = curr_step if last_step else None
        return saved

    def _wait_for_saving(self) -> None:
        with self._writing(self._create_checkpoint_id(self._saved_step)):
            super()._wait_for_saving()

    def _find_load_step(self, folder: str = "") -> int:
        """The latest checkpoint that is whole; -1 if none has ever been."""
        folder = folder or self.folder
        files = self._files(folder)
        broken: dict[int, str] = {}
        while (step := self._first_rank(lambda: self._latest_whole(folder, files, broken))) >= 0:
            problem = self._broken(self._create_checkpoint_id(step, folder), files)
            if problem is None:
                break
            broken[step] = problem
        return step

    def _broken(self, checkpoint: str, files: Mapping[str, StoredFile] | None) -> str | None:
        """What is wrong with the bytes of a checkpoint, of which every rank reads a part; None for nothing, or where they
        are not all within reach. A collective."""
        if checkpoint in self._sound or files is not None or filesystem.is_remote(checkpoint):
            return None
        if not self._first_rank(lambda: _has_metadata(checkpoint)):
            return None
        try:
            own = broken_part(checkpoint, torch.distributed.get_rank(), torch.distributed.get_world_size())
        except OSError as error:
            own = reason(error)
        problem = next(filter(None, SiteRanks().gather(own)), None)
        if problem is None:
            self._sound.add(checkpoint)
        return problem

    def _latest_whole(self, folder: str, files: Mapping[str, StoredFile] | None, broken: Mapping[int, str]) -> int:
        names = set(filesystem.listdir(folder)) if filesystem.isdir(folder) else set()
        names |= {path.partition("/")[0] for path in files or ()}  # what other nodes have may be all that is left
        steps = [int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name))]
        damaged, cut_short = [], []
        for step in sorted(steps, reverse=True):
            checkpoint = self._create_checkpoint_id(step, folder)
            of_sizes = None if files is None else _below(files, f"step-{step}")
            problem = broken.get(step) or damage(checkpoint, of_sizes)
            if problem is None:
                return step
            logger.warning("checkpoint %s is passed over: %s", checkpoint, problem)
            damaged += [checkpoint] if _has_metadata(checkpoint) else []
            cut_short += [checkpoint] if not _has_metadata(checkpoint) else []
        if damaged:
            raise UserError(f"checkpoint {damaged[0]} is damaged and no other is whole: remove it to start anew")
        if len(cut_short) > 1:
            # A stop while the first is saved leaves one; of several somebody has lost what a copy easily leaves out.
            raise UserError(
                f"checkpoint {cut_short[0]} and {len(cut_short) - 1} more have no file .metadata, which is written last: "
                f"restore it, or remove {folder} to start anew"
            )
        return -1

    @contextmanager
    def _writing(self, checkpoint: str) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:
            # torch's writer may hide the disk's complaint behind its own.
            room = (
                "" if filesystem.is_remote(checkpoint) else f" ({shutil.disk_usage(self.folder).free >> 20} MiB free)"
            )
            self._remove(checkpoint)  # it is of no use, and a log may need the room
            raise RunError(
                f"checkpoint {checkpoint}: cannot be written{room}: {reason(first_failure(error))}"
            ) from None

    def _remove(self, checkpoint: str) -> None:
        if self._disks.keeps_order(torch.distributed.get_rank()) and filesystem.exists(checkpoint):
            filesystem.rmtree(checkpoint)


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _below(files: Mapping[str, StoredFile], folder: str) -> dict[str, StoredFile]:
    return {path[len(folder) + 1 :]: file for path, file in files.items() if path.startswith(f"{folder}/")}


def damage(checkpoint: str, files: Mapping[str, StoredFile] | None = None) -> str | None:
    """What is wrong with a checkpoint as far as the sizes of its files tell; None for nothing.

    Args:
        checkpoint: its folder.
        files: what it consists of, where that is on several disks.
    """
    if any(filesystem.isfile(filesystem.join(checkpoint, name)) for name in _HUGGING_FACE):
        return None
    if not _has_metadata(checkpoint):
        return "its saving was cut short"
    if filesystem.is_remote(checkpoint):
        return None
    try:
        stored = FileSystemReader(checkpoint).read_metadata().storage_data.values()
    except Exception as error:  # noqa: BLE001 - unpickling what is damaged may raise anything
        return f".metadata cannot be read ({reason(error)})"
    sizes: dict[str, int] = {}
    for part in stored:
        sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), part.offset + part.length)
    for name, size in sizes.items():
        path = os.path.join(checkpoint, name)
        if files is None and (not os.path.isfile(path) or os.path.getsize(path) < size):
            return f"{name} is missing or shorter than its {size} bytes"
        if files is not None and (name not in files or files[name].size < size):
            return f"{name} is missing at every node, or shorter than its {size} bytes"
    return None


def _has_metadata(checkpoint: str) -> bool:
    """DCP writes it last."""
    return filesystem.isfile(filesystem.join(checkpoint, ".metadata"))
