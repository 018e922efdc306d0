"""Counts the files that one must open to follow a trip through titan_ext, while the trip is made.

    python tests/trips.py

A file is touched when a function of it is called. A move is a call from a function of one file to a function of another,
whatever of other packages lies between the two. Code that runs on import does not count.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = f"{ROOT / 'titan_ext'}{os.sep}"
SYNC_EVERY = 2


class Trip:
    """Notes the calls of this thread, and of threads that start after ``install``, while it is ``under_way``."""

    def __init__(self) -> None:
        self._moves: Counter[tuple[str, str]] = Counter()
        self._files: set[str] = set()
        self._noting = False

    def install(self) -> None:
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        self._moves.clear()
        self._files.clear()
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    def row(self, name: str) -> str:
        return f"{name:<40}{len(self._files):>8}{self._moves.total():>8}"

    def _note(self, frame: FrameType, event: str, _argument: Any) -> None:
        if not self._noting or event != "call" or not _is_ours(frame):
            return
        to, caller = frame.f_code.co_filename, frame.f_back
        while caller is not None and not _is_ours(caller):
            caller = caller.f_back
        self._files.add(to)
        if caller is not None and caller.f_code.co_filename != to:
            self._moves[caller.f_code.co_filename, to] += 1


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE) and frame.f_code.co_name != "<module>"


def _outer_loop(name: str, lighthouse: str) -> tuple[Any, Any]:
    """A site of one rank with a small model, on the product's own replica group; model and outer loop."""
    import torch
    import torch.distributed as dist

    from titan_ext import semi_sync
    from titan_ext.replica import Replica, ReplicaConfig

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    config = ReplicaConfig(lighthouse=lighthouse, hostname="127.0.0.1", heartbeat_interval_seconds=0.2)
    replica = Replica(config, site=name, rank=0, world_size=1)
    model = torch.nn.Linear(7, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    outer = semi_sync.SemiSync.Config(method="diloco", sync_every=SYNC_EVERY).build(
        model_parts=[model], optimizers=optimizer, manager=replica, **_site(semi_sync, name)
    )
    return model, outer


def _site(semi_sync: Any, name: str) -> dict[str, Any]:
    if hasattr(semi_sync, "SiteOptions"):
        return {"site": semi_sync.SiteOptions(name=name)}
    return {"site_name": name, "site_ranks": semi_sync.SiteRanks()}  # before there were options of a site


def _train(model: Any, outer: Any, steps: int) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.data += 0.01
        outer.step()


def _be_a_member(lighthouse: str) -> None:
    """Train without end; each round waits for every site that the lighthouse hears from."""
    model, outer = _outer_loop("member", lighthouse)
    outer.join()
    print("joined", flush=True)
    while True:
        _train(model, outer, 1)


@contextmanager
def _member() -> Iterator[str]:
    """A site that trains in a process of its own; yields the address of its lighthouse."""
    from torchft._torchft import LighthouseServer

    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=30_000, quorum_tick_ms=20)
    command = [sys.executable, __file__, "--member", server.address()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            yield server.address()
        finally:
            process.kill()
            server.shutdown()


def _load(trip: Trip) -> None:
    from titan_ext.config import load_run

    here = os.getcwd()
    os.chdir(tempfile.mkdtemp())
    with trip.under_way():
        load_run(str(ROOT / "train_configs" / "demo.toml"), [])
    os.chdir(here)
    print(trip.row("loading train_configs/demo.toml"), flush=True)


def main() -> None:
    """Make the trips and print a table."""
    trip = Trip()
    print(f"{'trip':<40}{'files':>8}{'moves':>8}")
    trip.install()
    # First: the replica's threads would be noted too.
    _load(trip)
    with _member() as lighthouse:
        model, outer = _outer_loop("newcomer", lighthouse)
        with trip.under_way():
            outer.join()
        print(trip.row("a site joins one that trains"))
        _train(model, outer, 2 * SYNC_EVERY - 1)
        with trip.under_way():
            _train(model, outer, 1)
        print(trip.row("outer.step() with a round of two sites"), flush=True)
    # torchft's threads would be waited for.
    os._exit(0)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not the folder of the tests, whose names are those of other packages
    os.environ.setdefault("RUST_LOG", "error")
    if sys.argv[1:2] == ["--member"]:
        with suppress(KeyboardInterrupt):
            _be_a_member(sys.argv[2])
    else:
        main()
