"""One site's part of many files' runs, one after the other in one process: each costs its training and no start."""

import os
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.end_to_end.forked import SiteRun, agent_store, end_at_once, lighthouse, start_ranks


@dataclass(frozen=True)
class FileRun:
    """A configuration file to be trained."""

    path: Path
    sites: tuple[str, ...]
    flags: list[str]
    url: str = ""
    """Of a lighthouse of its own: none waits for the sites of the file before."""
    own_flags: dict[str, list[str]] = field(default_factory=dict)
    """By site."""
    ports: dict[str, int] = field(default_factory=dict)
    """By site, of the store of its ranks; filled in."""


def train_in_turn(runs: Sequence[FileRun], folder: Path, ranks: int, timeout: float = 240) -> list[list[SiteRun]]:
    """Train runs one after the other, each site in the same processes; a run's ``url`` is filled in.

    Args:
        runs: where two have the same file, the second goes on in the first's folder.
        folder: dump folders are ``<folder>/<file>/<site>``.
        ranks: of each site.
        timeout: seconds for all.

    Returns:
        the sites of each run, each with its ``failure``.
    """
    # All stores listen from the start: a port that is only chosen may be another's when its run begins.
    stores = [{site: agent_store() for site in run.sites} for run in runs]
    with ExitStack() as stack:
        runs = [
            replace(
                run,
                url=stack.enter_context(lighthouse(len(run.sites))),
                ports={site: store.port for site, store in own.items()},
            )
            for run, own in zip(runs, stores, strict=True)
        ]
        places = range(max(len(run.sites) for run in runs))
        sites = [
            start_ranks(folder / "x", f"site{place}", ranks, "", train_files, runs, place, folder) for place in places
        ]
        ended = [site.wait(timeout) for site in sites]
    assert ended == [[0] * ranks for _ in places], sites[0].log()[-3000:]
    return [[SiteRun(site, folder / run.path.stem, []) for site in run.sites] for run in runs]


def train_files(runs: list[FileRun], place: int, folder: Path) -> None:
    """Train the site at ``place`` of every file; dump folders are ``<folder>/<file>/<site>``, complaints beside them.

    Called at every rank of the site.
    """
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from titan_ext.train import _train

    end_at_once()
    for run in runs:
        if place >= len(run.sites):
            continue
        name, dump = run.sites[place], folder / run.path.stem
        # torch remembers results on meshes of the run before, which equal this one's and are not the same.
        _clear_sharding_prop_cache()
        os.environ.update(MASTER_PORT=str(run.ports[name]), TORCHFT_LIGHTHOUSE=run.url)
        try:
            _train(str(run.path), name, [*run.flags, f"--dump_folder={dump}", *run.own_flags.get(name, [])])
        except Exception:  # noqa: BLE001 — told to the test
            dump.mkdir(exist_ok=True)
            (dump / f"{name}_failed.txt").write_text(traceback.format_exc())
            traceback.print_exc()
    os._exit(0)
