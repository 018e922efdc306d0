"""torchtitan's checkpoints for a site that may be cut short at any moment."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from titan_ext.error_text import reason
from titan_ext.errors import RunError, UserError
from titan_ext.trainer.cpu import prepare

prepare()

from torchtitan.components import checkpointer as torchtitan_checkpointer  # noqa: E402
from torchtitan.tools import filesystem  # noqa: E402
from torchtitan.tools.logging import logger  # noqa: E402

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
        super().__init__(config, **parts)

    def save_now(self, step: int) -> bool:
        """Save everything after inner step ``step``, whatever the interval; returns whether it is saved when this returns."""
        if not self.enable or self.load_only:
            return False
        if self._saved_step != step:
            self.interval = 1
            self.save(step)
        self.maybe_wait_for_saving()
        return True

    def load(self, step: int = -1) -> bool:
        """As torchtitan's.

        Raises:
            UserError: what the run is to start from is not there.
        """
        try:
            return super().load(step)
        except (ValueError, FileNotFoundError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"checkpoint: {reason(error)}") from None

    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> Any:
        """As torchtitan's; what an earlier attempt left in the folder goes first, and what a failed one left, at once."""
        # New data under old metadata would pass for a checkpoint. The others write when rank 0 has planned.
        self._remove(checkpoint_id)
        with self._writing(checkpoint_id):
            return super().dcp_save(state_dict, checkpoint_id, *args, **kwargs)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, *args: Any, **kwargs: Any) -> None:
        """As torchtitan's."""
        if problem := damage(checkpoint_id):
            raise UserError(f"checkpoint {checkpoint_id}: {problem}; choose another")
        try:
            super().dcp_load(state_dict, checkpoint_id, *args, **kwargs)
        except CheckpointException as error:
            raise RunError(f"checkpoint {checkpoint_id}: cannot be read: {_cause(error)}") from None

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        saved = super()._save(curr_step, last_step)
        if saved:
            self._saved_step = curr_step
        return saved

    def _wait_for_saving(self) -> None:
        with self._writing(self._create_checkpoint_id(self._saved_step)):
            super()._wait_for_saving()

    def _find_load_step(self, folder: str = "") -> int:
        """The latest checkpoint that is whole; -1 if none has ever been."""
        folder = folder or self.folder
        names = filesystem.listdir(folder) if filesystem.isdir(folder) else []
        steps = [int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name))]
        damaged = []
        for step in sorted(steps, reverse=True):
            checkpoint = self._create_checkpoint_id(step, folder)
            problem = damage(checkpoint)
            if problem is None:
                return step
            logger.warning("checkpoint %s is passed over: %s", checkpoint, problem)
            damaged += [checkpoint] if _has_metadata(checkpoint) else []
        if damaged:
            raise UserError(f"checkpoint {damaged[0]} is damaged and no other is whole: remove it to start anew")
        return -1

    @contextmanager
    def _writing(self, checkpoint: str) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:
            # torch's writer may hide the disk's complaint behind its own.
            room = "" if filesystem.is_remote(checkpoint) else f" ({shutil.disk_usage(self.folder).free >> 20} MiB free)"
            self._remove(checkpoint)  # it is of no use, and a log may need the room
            raise RunError(f"checkpoint {checkpoint}: cannot be written{room}: {_cause(error)}") from None

    def _remove(self, checkpoint: str) -> None:
        if torch.distributed.get_rank() == 0 and filesystem.exists(checkpoint):
            filesystem.rmtree(checkpoint)


def _cause(error: CheckpointException) -> str:
    return reason(next(cause for cause, _ in error.failures.values()))


def damage(checkpoint: str) -> str | None:
    """What is wrong with a checkpoint as far as the sizes of its files tell; None for nothing."""
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
        if not os.path.isfile(path) or os.path.getsize(path) < size:
            return f"{name} is missing or shorter than its {size} bytes"
    return None


def _has_metadata(checkpoint: str) -> bool:
    """DCP writes it last."""
    return filesystem.isfile(filesystem.join(checkpoint, ".metadata"))
