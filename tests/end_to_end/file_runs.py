"""One site's part of many files' runs, one after the other in one process: each costs its training and no start."""

import os
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from titan_ext.launcher.placement import free_port


@dataclass(frozen=True)
class FileRun:
    """A configuration file to be trained."""

    path: Path
    sites: tuple[str, ...]
    url: str
    """Of a lighthouse of its own: none waits for the sites of the file before."""
    flags: list[str]
    own_flags: dict[str, list[str]] = field(default_factory=dict)
    """By site."""
    ports: dict[str, int] = field(default_factory=dict)
    """By site, for the store of its ranks; not needed where it has one."""


def train_files(runs: list[FileRun], place: int, folder: Path) -> None:
    """Train the site at ``place`` of every file; dump folders are ``<folder>/<file>/<site>``, complaints beside them.

    Called at every rank of the site.
    """
    import torchtitan.trainer
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from titan_ext.train import _train

    # torchtitan lets other ranks have two seconds at the end of each run; there are none.
    torchtitan.trainer.time = SimpleNamespace(sleep=lambda seconds: None, perf_counter=time.perf_counter)
    for run in runs:
        name, dump = run.sites[place], folder / run.path.stem
        # torch remembers results on meshes of the run before, which equal this one's and are not the same.
        _clear_sharding_prop_cache()
        os.environ.update(MASTER_PORT=str(run.ports.get(name) or free_port()), TORCHFT_LIGHTHOUSE=run.url)
        try:
            _train(str(run.path), name, [*run.flags, f"--dump_folder={dump}", *run.own_flags.get(name, [])])
        except Exception:  # noqa: BLE001 — told to the test
            dump.mkdir(exist_ok=True)
            (dump / f"{name}_failed.txt").write_text(traceback.format_exc())
            traceback.print_exc()
    os._exit(0)
