"""Real sites of real processes, without paying for the imports of each.

A server process imports torchtitan once; every rank is a fork of it that runs ``titan_ext.train`` as
torchrun would have started it.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer

from tests.forkserver import forking

_context = forking(
    "titan_ext.train", "titan_ext.trainer.trainer", "titan_ext.config.load", "titan_ext.models.llama3", "titan_ext.data"
)


@dataclass
class SiteRun:
    """A site's processes and what they left behind."""

    name: str
    folder: Path
    ranks: list[Any]
    store: TCPStore | None = None
    """What torchrun's agent keeps for the ranks."""

    def wait(self, timeout: float = 240) -> list[int]:
        """Exit codes of the ranks; those that hang are killed and count as -9."""
        deadline = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(max(0, deadline - time.monotonic()))
            if rank.is_alive():
                rank.kill()
                rank.join()
        return [rank.exitcode for rank in self.ranks]

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"rank_{self.name}_*.txt")))

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / self.name / "summary.json").read_text())

    def lines(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / self.name / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["kind"] == kind]

    def failure(self) -> str:
        """What ended it where it ran one of several files in turn; empty where it ended well."""
        path = self.folder / f"{self.name}_failed.txt"
        return path.read_text()[-3000:] if path.exists() else ""

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines("step")]


def agent_store() -> TCPStore:
    """The store that torchrun's agent keeps for a site's ranks over its restarts; it ends with the object."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextmanager
def lighthouse(min_sites: int):
    """A lighthouse; yields its URL on loopback."""
    server = LighthouseServer(bind="[::]:0", min_replicas=min_sites, join_timeout_ms=60_000, heartbeat_timeout_ms=2000)
    try:
        yield f"http://127.0.0.1:{server.address().rsplit(':', 1)[1]}"
    finally:
        server.shutdown()


def start_site(
    config: Path,
    name: str,
    ranks: int,
    url: str,
    *flags: str,
    store: TCPStore | None = None,
    pause: Path | None = None,
) -> SiteRun:
    """Start every rank of a site; its dump folder is ``<folder of the config>/<name>``.

    Args:
        pause: the site takes no inner step as long as this file is there.
    """
    arguments = ["--config", str(config), "--site", name, f"--dump_folder={config.parent}", *flags]
    return start_ranks(config, name, ranks, url, _train, arguments, pause, store=store)


def start_ranks(
    config: Path,
    name: str,
    ranks: int,
    url: str,
    target: Callable[..., None],
    *arguments: Any,
    store: TCPStore | None = None,
) -> SiteRun:
    """Call ``target(*arguments)`` at every rank of a site as torchrun would.

    Args:
        store: of the site's earlier start, as :func:`agent_store` makes it; None makes one.
    """
    folder = config.parent
    store = store or agent_store()
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHFT_LIGHTHOUSE": url,
            "RUST_LOG": "warn",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            # The server that forks may be older than a test's object store.
            **{key: value for key, value in os.environ.items() if key.startswith("AWS_")},
        }
        log = folder / f"rank_{name}_{rank}.txt"
        process = _context.Process(target=_run_rank, args=(environment, str(log), target, arguments))
        process.start()
        processes.append(process)
    return SiteRun(name, folder, processes, store)


def _run_rank(environment: dict[str, str], log: str, target: Callable[..., None], arguments: tuple) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    target(*arguments)


def _train(arguments: list[str], pause: Path | None) -> None:
    from titan_ext.train import main
    from titan_ext.trainer.trainer import Trainer

    end_at_once()
    train_step = Trainer.train_step

    def paused(self: Any, data: Any) -> Any:
        while _is_there(pause):
            self.outer.serve_snapshot_requests()  # a site that comes back would wait for one
            time.sleep(0.05)
        return train_step(self, data)

    if pause is not None:
        Trainer.train_step = paused
    main(arguments)


def _is_there(file: Path) -> bool:
    """Whether rank 0 sees a file: serving snapshots is a collective where leaders exchange."""
    import torch.distributed as dist

    seen = [file.exists()]
    dist.broadcast_object_list(seen, src=0)
    return seen[0]


def end_at_once() -> None:
    """torchtitan lets the other ranks have two seconds at the end of a run; rank 0 keeps their store for some of them."""
    import torchtitan.trainer

    seconds = 0.5 if int(os.environ["WORLD_SIZE"]) > 1 else 0.0
    torchtitan.trainer.time = SimpleNamespace(sleep=lambda _: time.sleep(seconds), perf_counter=time.perf_counter)
