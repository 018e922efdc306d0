"""Whether a run can leave its files, asked before training."""

import os
import shutil
import tempfile
from pathlib import Path

from titan_ext.errors import UserError

MINIMUM_FREE_BYTES = 64 * 2**20
"""Room for logs and TensorBoard events of a short run; checkpoints need more."""


def check_dump_folder(path: str | Path, need_bytes: int = MINIMUM_FREE_BYTES) -> None:
    """Create the folder, write a file in it and look at the free space.

    Args:
        path: the folder a site writes to.
        need_bytes: free space to ask for, in bytes.

    Raises:
        UserError: it cannot be created or written, or the disk is full.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"dump_folder {folder}: cannot be written: {error.strerror or error}") from None
    if free < need_bytes:
        raise UserError(
            f"dump_folder {folder}: the disk is full: {free / 2**20:.0f} MiB free, {need_bytes / 2**20:.0f} MiB needed"
        )
