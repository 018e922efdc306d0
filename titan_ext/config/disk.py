"""Whether a run can leave its files, asked before training."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan.tools import filesystem

from titan_ext.error_text import unwritable
from titan_ext.errors import UserError
from titan_ext.instruments.places import FILES

MINIMUM_FREE_BYTES = 64 * 2**20
"""Room for logs and TensorBoard events of a short run; checkpoints need more."""


def check_outputs(config: Any) -> None:
    """Create every folder that a site's run will write to, and write a file in it.

    Args:
        config: the site's ``Trainer.Config``.

    Raises:
        UserError: naming the key of a folder that cannot be created or written, or whose disk is full, or a file of the
            run that cannot be written.
    """
    check_dump_folder(config.dump_folder)
    for name in FILES:
        _check_file(Path(config.dump_folder) / name)
    for key, folder in _outputs(config):
        path = os.path.join(config.dump_folder, folder)
        if not filesystem.is_remote(path):
            _check_writable(key, Path(path))


def _outputs(config: Any) -> Iterator[tuple[str, str]]:
    """Keys and folders that the user may have put elsewhere than into the dump folder, or beneath a file in it."""
    metrics, profiler, checkpoint, record = config.metrics, config.profiler, config.checkpoint, config.debug
    if metrics.enable_tensorboard or metrics.enable_wandb:
        yield "metrics.save_tb_folder", metrics.save_tb_folder
    if profiler.enable_profiling:
        yield "profiler.save_traces_folder", profiler.save_traces_folder
    if profiler.enable_memory_snapshot:
        yield "profiler.save_memory_snapshot_folder", profiler.save_memory_snapshot_folder
    if checkpoint.enable and not checkpoint.load_only:
        yield "checkpoint.folder", checkpoint.folder
    if config.comm.trace_buf_size > 0:
        yield "comm.save_traces_folder", config.comm.save_traces_folder
    if record.save_config_file is not None:
        yield "debug.save_config_file", os.path.dirname(record.save_config_file)


def check_dump_folder(path: str | Path, need_bytes: int = MINIMUM_FREE_BYTES) -> None:
    """Create the folder, write a file in it and look at the free space.

    Args:
        path: the folder a site writes to.
        need_bytes: free space to ask for, in bytes.

    Raises:
        UserError: it cannot be created or written, or the disk is full.
    """
    free = _check_writable("dump_folder", Path(path))
    if free < need_bytes:
        raise UserError(
            f"dump_folder {path}: the disk is full: {free / 2**20:.0f} MiB free, {need_bytes / 2**20:.0f} MiB needed; "
            "make room there, or set dump_folder to a folder on another disk"
        )


def _check_file(path: Path) -> None:
    """Refuse what stands in the way of a file that the run appends to."""
    if path.is_symlink() and not path.exists():
        problem = "is a link to nothing"
    elif path.is_dir():
        problem = "is a folder"
    elif path.exists() and not os.access(path, os.R_OK | os.W_OK):
        problem = "cannot be read and written"
    else:
        return
    raise UserError(f"dump_folder {path.parent}: {path.name}, which the run writes, {problem} there; move it away")


def _check_writable(key: str, folder: Path) -> int:
    """Free bytes of the folder's disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(str(unwritable(f"{key} {folder}", error))) from None
