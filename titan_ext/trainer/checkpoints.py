"""torchtitan's checkpoints for a site that may be cut short at any moment."""

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components import checkpointer as torchtitan_checkpointer
from torchtitan.components.checkpointer.base import LR_SCHEDULER, MODEL, OPTIMIZER
from torchtitan.components.checkpointer.dcp import AsyncMode
from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger

from titan_ext.checkpoint_place import checkpoint_folder
from titan_ext.config.recorded import changes_since
from titan_ext.error_text import first_failure, reason
from titan_ext.errors import RunError, UserError, require
from titan_ext.files import is_full
from titan_ext.huggingface.description import write_description
from titan_ext.huggingface.fit import check_weights
from titan_ext.models.fit import check_tensors, model_tensors
from titan_ext.object_store import is_url
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.state.views import with_own_storage
from titan_ext.trainer.disks import find_disks
from titan_ext.trainer.optimizers import OptimizersContainer
from titan_ext.trainer.other_sites import checkpoints_beside, take_shared_state
from titan_ext.trainer.ownership import TakenOver
from titan_ext.trainer.resuming import Stored, flattened, fresh_words, stored_shapes
from titan_ext.trainer.site_reader import SiteReader
from titan_ext.trainer.site_store import SiteStore
from titan_ext.trainer.store_ranks import StoreRanks
from titan_ext.trainer.whole_checkpoints import Files, has_metadata

_Found = TypeVar("_Found")


class CheckpointManager(torchtitan_checkpointer.CheckpointManager):
    """torchtitan's manager, which loads only what is whole and says in one line why it cannot save or load.

    Raises:
        RunError: a checkpoint cannot be written or read.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(torchtitan_checkpointer.CheckpointManager.Config):
        retry_seconds: float = 60.0
        """How long a site tries again while the object store of ``folder`` is away; training stands still for so long.
        A checkpoint of the interval is then given up, the one at the end of a run fails it. Nothing that fails in the
        background is tried again."""

        def __post_init__(self) -> None:
            torchtitan_checkpointer.CheckpointManager.Config.__post_init__(self)
            require(self.retry_seconds >= 0, "retry_seconds", self.retry_seconds, "at least 0 seconds")

    def __init__(self, config: Config, **parts: Any) -> None:
        folder = checkpoint_folder(parts.get("base_folder", ""), config.folder)
        self._dump_folder: str = parts.get("base_folder", "")
        stores = StoreRanks(config.retry_seconds)
        self._reader = SiteReader(stores)
        self._store = SiteStore(folder, self._dump_folder, stores) if is_url(folder) else None
        self._saved_step: int | None = None
        self._now = False
        self._last_step: int | None = None
        self.held = False
        """Whether a step is not to be saved, because another data source of the round has yet to take it."""
        self.notes: list[str] = []
        """What a user should know of the checkpoint that was loaded."""
        self.loaded = ""
        """The checkpoint that was loaded; empty where there was none."""
        self.model_config: Any = None
        """Config of the whole model, whose tensors a checkpoint must hold; the trainer's to set before a load."""
        self.description: dict[str, Any] = {}
        """What a checkpoint in Hugging Face's format says of the model: its ``config.json``."""
        self.say: Callable[[str], None] = logger.warning
        """Tells a user of a checkpoint that is lost while training goes on; the trainer's to set."""
        self.heals = False
        """Whether a site without a checkpoint of its own takes the shared state of another's; likewise."""
        self.own_logs: list[str] = []
        """Names of the files that this rank writes in the dump folder, which an object store has copies of; likewise."""
        if self._store is not None:
            whole: Any = config  # mypy knows no fields of configs that torchtitan's __init_subclass__ makes
            config = replace(whole, folder=folder)
            warnings.filterwarnings("ignore", message="fsync not supported for this stream")
        super().__init__(config, **parts)

    def save_now(self, step: int) -> bool:
        """Save everything after inner step ``step``, whatever the interval; returns whether it is saved when this returns."""
        if not self.enable or self.load_only:
            return False
        self._now = True
        self.maybe_wait_for_saving()
        if self._saved_step != step or self.held:
            self.interval = 1
            self.save(step)
        self.maybe_wait_for_saving()
        return True

    def load(self, step: int = -1) -> bool:
        """As torchtitan's.

        Raises:
            UserError: what the run is to start from is not there.
        """
        if self.enable and self._store is not None:
            if not self.load_only and (note := self._store.take()):
                self.notes.append(note)
            if step == -1:  # torchtitan would take a store that does not answer for an empty one
                step = self._find_load_step()
        elif self.enable:
            self._look_at_disks()
        if self.enable and step == -1 and "semi_sync" in self.states and self._begin_with_others():
            return True
        try:
            return super().load(step)
        except (ValueError, FileNotFoundError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"checkpoint: {reason(error)}") from None

    def _begin_with_others(self) -> bool:
        """Whether the site begins with the shared state of another one's checkpoint. A collective."""
        if not self.heals and self._store is None:
            return False
        if not self._reader.disks.are_one or (self._store is None and self._find_load_step() >= 0):
            return False
        found = self._reader.look(self.folder, lambda: checkpoints_beside(self.folder, self._dump_folder))
        if found and not self.heals:
            self.notes.append(
                f"this site has no checkpoint of its own in {self.folder}, and others have some, such as {found[0]}: it joins "
                "sites that train, or begins anew; replica.heal_from_checkpoints = true would take their shared state"
            )
        if not found or not self.heals:
            return False
        self.loaded = take_shared_state(self._reader, found, self.states["semi_sync"], self.states[MODEL])
        self.notes.append(
            f"this site has no checkpoint of its own: it begins with the shared state of {self.loaded}, as if it joined that "
            "site; its inner optimizer and its place in the data start fresh"
        )
        return True

    def _look_at_disks(self) -> None:
        self._reader.disks = find_disks(self.folder)
        if self._reader.disks.are_one:
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
        if "semi_sync" in state_dict and self.async_mode is not AsyncMode.DISABLED:
            state_dict = state_dict | {"semi_sync": with_own_storage(state_dict["semi_sync"].state_dict())}
        if self._store is not None:
            save = super().dcp_save
            return self._store.save(checkpoint_id, lambda: save(state_dict, checkpoint_id, *args, **kwargs))
        # New data under old metadata would pass for a checkpoint. The others write when rank 0 has planned.
        self._remove(checkpoint_id)
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
        files = self._reader.files(checkpoint_id)
        from_hf = from_hf or self._reader.look(checkpoint_id, lambda: not has_metadata(checkpoint_id, files))
        if from_hf and is_url(checkpoint_id):
            raise UserError(
                f"checkpoint {checkpoint_id}: its saving was cut short, or it is none: it has no file .metadata"
            )
        if from_hf:
            if self.sd_adapter is None:
                raise UserError(f"checkpoint {checkpoint_id}: the model has no Hugging Face format")
            # Every rank looks for itself, and all come to the same end.
            check_weights(Path(checkpoint_id), self.model_config, type(self.sd_adapter), quantised=from_quantized)
        elif problem := self._reader.problem(checkpoint_id, files):
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
        self, weights: dict[str, Any], states: dict[str, Any], checkpoint: str, files: Files | None
    ) -> dict[str, str]:
        """Weights and states in place; returns what is to be said of the states that were not in the checkpoint."""
        shapes = self._reader.look(checkpoint, lambda: stored_shapes(checkpoint))
        tensors = {key: torch.Size(shape) for key, shape in shapes.items() if shape is not None}
        check_tensors(model_tensors(self.model_config), tensors, f"checkpoint {checkpoint}")
        for change in self._reader.look(checkpoint, lambda: changes_since(checkpoint, self.model_config)):
            logger.warning("%s", change)
        stored = Stored(shapes)
        wanted = {name: dict(flattened(name, state.state_dict())) for name, state in states.items()}
        lacking = {name: words for name, keys in wanted.items() if (words := stored.lacks(name, keys))}
        fresh = _merged(SiteRanks().gather(lacking))
        loaded = {name: state for name, state in states.items() if name not in fresh}
        moved = _merged(stored.moved(wanted[name]) for name in loaded)
        state_dict = weights | loaded
        self._reader.read(state_dict, checkpoint, files, moved)
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

    def _should_purge(self) -> bool:
        """At each disk there is a rank that removes what is old."""
        keeps_order = self._reader.disks.keeps_order(torch.distributed.get_rank())
        return self.keep_latest_k > 0 and keeps_order and filesystem.isdir(self.folder)

    def _purge_stale_checkpoints(self) -> None:
        if self._store is None:
            super()._purge_stale_checkpoints()
        elif self.keep_latest_k > 0 and torch.distributed.get_rank() == 0:
            self._store.hand_over_old(self.keep_latest_k, self.purge_queue.put)

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if self.held and not (self._now or last_step):
            return False
        if curr_step == self._last_step:
            return False  # torchtitan does not know that the run ended before training.steps
        try:
            saved = super()._save(curr_step, last_step)
        except (UserError, RunError) as error:
            if self._store is None or last_step or self._now or isinstance(error, TakenOver):
                raise
            self._lost(curr_step, str(error))
            return False
        if saved:
            self._saved_step = curr_step
            self._last_step = curr_step if last_step else None
            self.mirror_logs()
        return saved

    def _lost(self, step: int, why: str) -> None:
        self.say(
            f"checkpoint {self._create_checkpoint_id(step)} is lost, training goes on to the next one "
            f"(checkpoint.interval = {self.interval}): {why}"
        )

    def mirror_logs(self) -> None:
        """Copy the site's logs to its part of the object store, if it has one."""
        if self.enable and self._store is not None:
            self._store.mirror_logs(self.own_logs)

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()  # it may hand over what is to be removed
        super()._close()

    def _wait_for_saving(self) -> None:
        checkpoint = self._create_checkpoint_id(self._saved_step)
        if self._store is None:
            with self._writing(checkpoint):
                super()._wait_for_saving()
            return
        try:
            super()._wait_for_saving()
        except CheckpointException as error:
            step, self._saved_step, self.save_future = self._saved_step, None, None
            if self._now:
                raise RunError(f"checkpoint {checkpoint}: cannot be written: {reason(first_failure(error))}") from None
            self._lost(step, reason(first_failure(error)))

    def _find_load_step(self, folder: str = "") -> int:
        return self._reader.latest_step(folder or self.folder)

    @contextmanager
    def _writing(self, checkpoint: str) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:
            # torch's writer may hide the disk's complaint behind its own.
            room, full = f" ({shutil.disk_usage(self.folder).free >> 20} MiB free)", is_full(self.folder)
            self._remove(checkpoint)  # it is of no use, and a log may need the room
            cure = "; make room there, or keep fewer with checkpoint.keep_latest_k" if full else ""
            raise RunError(
                f"checkpoint {checkpoint}: cannot be written{room}: {reason(first_failure(error))}{cure}"
            ) from None

    def _remove(self, checkpoint: str) -> None:
        if self._reader.disks.keeps_order(torch.distributed.get_rank()) and filesystem.exists(checkpoint):
            filesystem.rmtree(checkpoint)


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}
