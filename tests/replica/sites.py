"""Sites as real processes with the outer loop on a ``Replica``, and a lighthouse that can be killed."""

import logging
import os
import queue
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer

from tests.forkserver import forking
from tests.lighthouse_page import (
    PATIENCE_SECONDS,
    members,
    page,
    wait_for_heartbeats,
    wait_for_requests,
    wait_until,
)
from titan_ext.replica import Replica, ReplicaConfig
from titan_ext.semi_sync import SemiSync, SiteOptions

context = forking("tests.replica.sites")

SYNC_EVERY = 2
JOIN = -1
"""The place of ``Site.hold_at`` at which the lighthouse hears from the site, and has no request of it yet."""


@dataclass
class Site:
    """What a site is to do.

    Args:
        name: its name.
        rate: what an inner step adds to each parameter.
        ranks: processes.
        steps: inner steps.
        replica: settings of ``[replica]``.
        torchft_step: where torchft's counter begins.
        hold_at: inner step before which it waits until it is let go; ``JOIN``: before its first quorum.
        pause: seconds that an inner step takes.
    """

    name: str
    rate: float = 1.0
    ranks: int = 1
    steps: int = 12
    replica: dict[str, Any] = field(default_factory=dict)
    torchft_step: int | None = None
    hold_at: int | None = None
    pause: float = 0.0


@dataclass
class Outcome:
    """What became of one rank of a site."""

    site: str
    rank: int
    error: str | None = None
    """Type and words of what ended it."""
    values: list[float] = field(default_factory=list)
    sha256: str = ""
    rounds: list[tuple[int, int, bool]] = field(default_factory=list)
    """Of each: inner step, sites, whether it was committed."""
    keys: int = 0
    """Keys of quorums and groups in the site's store at the end."""
    log: str = ""


class Lighthouse:
    """A lighthouse in a process of its own, on a port that stays the same."""

    def __init__(self, min_sites: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self._port = server.getsockname()[1]
        self._min_sites = min_sites
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        self._process = context.Process(target=_serve, args=(self._port, self._min_sites), daemon=True)
        self._process.start()
        wait_until(lambda: page(self.url), "the lighthouse")

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.join()

    def wait_for_requests(self, count: int) -> None:
        """Until at least ``count`` sites wait in the quorum."""
        wait_for_requests(self.url, count)

    def wait_for_heartbeats(self, count: int) -> None:
        """Until it hears from at least ``count`` sites; after a restart they come back one by one."""
        wait_for_heartbeats(self.url, count)

    def wait_for_quorum(self, site: str, *, alone: bool = False) -> None:
        """Until the last quorum was one with the site, or of it alone."""
        wait_until(lambda: members(self.url) == [site] if alone else site in members(self.url), f"a quorum with {site}")


def _serve(port: int, min_sites: int) -> None:
    server = LighthouseServer(
        bind=f"127.0.0.1:{port}",
        min_replicas=min_sites,
        join_timeout_ms=30_000,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=1000,
    )
    assert server is not None
    time.sleep(3600)


@contextmanager
def running(sites: Sequence[Site], lighthouse: Lighthouse, folder: Path) -> Iterator["Run"]:
    """Start all sites; they are killed at the end."""
    run = Run(lighthouse, folder)
    try:
        for site in sites:
            run.start(site)
        yield run
    finally:
        for process in run.processes:
            process.kill()
            process.join()
        lighthouse.kill()


class Run:
    """Sites under way."""

    def __init__(self, lighthouse: Lighthouse, folder: Path) -> None:
        self.lighthouse = lighthouse
        self.processes: list[Any] = []
        self._folder = folder
        self._outcomes = context.Queue()
        self._go = {}
        self._held = {}
        self._of: dict[str, list[Any]] = {}
        self._seen: dict[tuple[str, str], int] = {}

    def start(self, site: Site) -> None:
        """Start the ranks of a site."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self._go[site.name] = context.Event()
        self._held[site.name] = context.Semaphore(0)
        for rank in range(site.ranks):
            log = self._folder / f"{site.name}.{rank}.log"
            signals = self._held[site.name], self._go[site.name]
            process = context.Process(
                target=_rank, args=(site, rank, port, self.lighthouse.url, str(log), signals, self._outcomes)
            )
            process.start()
            self.processes.append(process)
            self._of.setdefault(site.name, []).append(process)

    def kill(self, site: Site) -> None:
        """End the ranks of a site with SIGKILL."""
        for process in self._of.pop(site.name):
            process.kill()
            process.join()

    def wait_until_held(self, *sites: Site) -> None:
        """Until every rank of the sites waits at ``hold_at``."""
        for site in sites:
            for _ in range(site.ranks):
                assert self._held[site.name].acquire(timeout=PATIENCE_SECONDS), f"{site.name} never came"

    def wait_for_log(self, site: Site, words: str) -> None:
        """Until rank 0 of the site has logged ``words`` since they were last waited for."""
        path = self._folder / f"{site.name}.0.log"
        seen = self._seen.get((site.name, words), 0)
        wait_until(lambda: words in path.read_text()[seen:], f"{words!r} in the log of {site.name}")
        self._seen[site.name, words] = path.read_text().index(words, seen) + len(words)

    def let_go(self, *sites: Site) -> None:
        for site in sites:
            self._go[site.name].set()

    def join_together(self, *sites: Site) -> None:
        """Let sites go that are held at ``JOIN``, so that the first quorum is one of them all; the first asks first."""
        self.wait_until_held(*sites)
        first, *others = sites
        self.let_go(first)
        self.lighthouse.wait_for_requests(1)
        self.let_go(*others)

    def outcomes(self, count: int) -> dict[tuple[str, int], Outcome]:
        """What became of the first ``count`` ranks to end, by site and rank."""
        found = {}
        for _ in range(count):
            try:
                outcome = self._outcomes.get(timeout=PATIENCE_SECONDS)
            except queue.Empty:
                logs = "\n".join(f"{path}:\n{path.read_text()}" for path in sorted(self._folder.glob("*.log")))
                raise AssertionError(f"only {sorted(found)} ended\n{logs}") from None
            found[outcome.site, outcome.rank] = outcome
        return found


def _rank(site: Site, rank: int, port: int, lighthouse: str, log: str, signals: Any, outcomes: Any) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(filename=log, level=logging.INFO, force=True)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=site.ranks)
    outcome = Outcome(site.name, rank)
    try:
        _train(site, rank, lighthouse, signals, outcome)
    except Exception as error:  # noqa: BLE001 — the test looks at it
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.keys = sum(key.startswith(("torchft/", "titan_ext/")) for key in store.list_keys())
    outcome.log = Path(log).read_text()
    outcomes.put(outcome)
    outcomes.close()
    outcomes.join_thread()
    dist.barrier()  # rank 0 has the store
    os._exit(0)


def _train(site: Site, rank: int, lighthouse: str, signals: Any, outcome: Outcome) -> None:
    settings = {"hostname": "127.0.0.1", "heartbeat_interval_seconds": 0.2, "timeout_seconds": 20.0}
    config = ReplicaConfig(lighthouse=lighthouse, **settings | site.replica)
    replica = Replica(config, site=site.name, rank=rank, world_size=site.ranks)
    if site.torchft_step is not None:
        replica.load_state_dict({"step": site.torchft_step, "batches_committed": 0})
    model = torch.nn.Linear(7, 5, bias=False)
    model.weight.data.zero_()
    records: list[Any] = []
    outer = SemiSync.Config(method="local_sgd", sync_every=SYNC_EVERY).build(
        model_parts=[model],
        optimizers=[],
        manager=replica,
        site=SiteOptions(name=site.name),
        on_round=records.append,
    )
    try:
        if site.hold_at == JOIN:
            _wait_to_be_let_go(*signals)
        outer.join()
        while outer.inner_step < site.steps:
            if outer.inner_step == site.hold_at:
                _wait_to_be_let_go(*signals)
            model.weight.data += site.rate
            outer.step()
            time.sleep(site.pause)
        outer.finish()
        outcome.sha256 = outer.shared_state_sha256()
    finally:
        outcome.values = sorted(set(model.weight.detach().flatten().tolist()))
        outcome.rounds = [(each.step, each.sites, each.committed) for each in records]


def _wait_to_be_let_go(held: Any, go: Any) -> None:
    held.release()
    assert go.wait(PATIENCE_SECONDS), "nobody let this site go"
