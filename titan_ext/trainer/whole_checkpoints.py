"""Which of a site's checkpoints are whole, as far as the sizes of their files tell."""

import os
from collections.abc import Collection, Mapping

from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger

from titan_ext.checkpoint_place import reader, steps_in
from titan_ext.error_text import may_pass, reason
from titan_ext.errors import UserError
from titan_ext.object_store import is_url
from titan_ext.trainer.disks import StoredFile

_HUGGING_FACE = ("model.safetensors.index.json", "model.safetensors")

Files = Mapping[str, StoredFile]
"""By path, where one disk does not tell all: what is on several, or behind a URL."""


def latest_whole(folder: str, files: Files | None, broken: Mapping[int, str]) -> int:
    """The step of the latest whole checkpoint in a folder; -1 if none has ever been.

    Args:
        folder: of checkpoints.
        files: in it.
        broken: by step what is wrong with the bytes of a checkpoint, where that is known.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    damaged, cut_short = [], []
    for step in sorted(steps_in(folder, files), reverse=True):
        checkpoint = filesystem.join(folder, f"step-{step}")
        own = None if files is None else below(files, f"step-{step}")
        problem = broken.get(step) or damage(checkpoint, own)
        if problem is None:
            return step
        logger.warning("checkpoint %s is passed over: %s", checkpoint, problem)
        damaged += [checkpoint] if has_metadata(checkpoint, own) else []
        cut_short += [checkpoint] if not has_metadata(checkpoint, own) else []
    if damaged:
        raise UserError(f"checkpoint {damaged[0]} is damaged and no other is whole: remove it to start anew")
    if len(cut_short) > 1:
        # A stop while the first is saved leaves one; of several somebody has lost what a copy easily leaves out.
        raise UserError(
            f"checkpoint {cut_short[0]} and {len(cut_short) - 1} more have no file .metadata, which is written last: "
            f"restore it, or remove {folder} to start anew"
        )
    return -1


def below(files: Files, folder: str) -> dict[str, StoredFile]:
    """Those in a folder of them, by their path in it."""
    return {path[len(folder) + 1 :]: file for path, file in files.items() if path.startswith(f"{folder}/")}


def damage(checkpoint: str, files: Files | None = None) -> str | None:
    """What is wrong with a checkpoint as far as the sizes of its files tell; None for nothing.

    Args:
        checkpoint: its folder.
        files: in it.

    Raises:
        Exception: an object store does not answer, and may do so later.
    """
    if not is_url(checkpoint) and any(os.path.isfile(os.path.join(checkpoint, name)) for name in _HUGGING_FACE):
        return None
    if not has_metadata(checkpoint, files):
        return "its saving was cut short"
    try:
        stored = reader(checkpoint).read_metadata().storage_data.values()
    except Exception as error:  # unpickling what is damaged may raise anything
        if is_url(checkpoint) and may_pass(error) and not isinstance(error, EOFError):
            raise
        return f".metadata cannot be read ({reason(error)})"
    sizes: dict[str, int] = {}
    for part in stored:
        sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), part.offset + part.length)
    for name, size in sizes.items():
        path = os.path.join(checkpoint, name)
        if files is None and (not os.path.isfile(path) or os.path.getsize(path) < size):
            return f"{name} is missing or shorter than its {size} bytes"
        if files is not None and (name not in files or files[name].size < size):
            where = "" if is_url(checkpoint) else " at every node,"
            return f"{name} is missing{where} or shorter than its {size} bytes"
    return None


def has_metadata(checkpoint: str, files: Collection[str] | None = None) -> bool:
    """Whether there is what DCP writes last."""
    if is_url(checkpoint):
        return files is not None and ".metadata" in files
    return os.path.isfile(os.path.join(checkpoint, ".metadata"))
