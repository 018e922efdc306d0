"""Whether all ranks of a site that spans nodes see one disk."""

import os
import secrets
import time
from pathlib import Path

import torch

from titan_ext.errors import UserError
from titan_ext.semi_sync.site.ranks import SiteRanks

_PATIENCE_SECONDS = 15.0  # what a network file system may take to show a file to another node
_POLL_SECONDS = 0.2


def check_shared(folder: str) -> None:
    """Refuse a folder for checkpoints that is another one at another node. A collective over the site.

    Each node would hold a part of every checkpoint, and none could be loaded.

    Raises:
        UserError: naming the folder and the ranks that do not see what rank 0 writes there.
    """
    ranks = torch.distributed.get_world_size()
    if int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) >= ranks:
        return
    rank, site = torch.distributed.get_rank(), SiteRanks()
    probe = Path(folder) / f".shared_{site.gather(secrets.token_hex(8))[0]}"
    if rank == 0:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    site.gather(None)
    seen = site.gather(_appears(probe))
    if rank == 0:
        probe.unlink()
    blind = [str(rank) for rank, sees in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"checkpoint.folder {folder}: rank(s) {', '.join(blind)} do not see what rank 0 writes there: the nodes of a "
            "site need one file system for its checkpoints; set dump_folder to one, checkpoint.folder to an address such "
            "as s3://…, or checkpoint.enable = false"
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
