"""Several sites as threads of one process, with a real lighthouse and Gloo: the fast way to test."""

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore
from torchft._torchft import LighthouseServer
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from titan_ext.semi_sync import SemiSync, SiteRanks

TIMEOUT = timedelta(seconds=30)


@contextmanager
def lighthouse(min_sites: int, heartbeat_timeout_ms: int = 5000) -> Iterator[str]:
    """A lighthouse that waits for every living site."""
    server = LighthouseServer(
        bind="[::]:0",
        min_replicas=min_sites,
        join_timeout_ms=30_000,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=heartbeat_timeout_ms,
    )
    try:
        yield server.address()
    finally:
        server.shutdown()


class FaultyManager(Manager):
    """A manager whose votes can be made to fail."""

    fail_votes: set[int] = frozenset()
    votes = 0

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        self.votes += 1
        if self.votes in self.fail_votes:
            self.report_error(RuntimeError("injected"))
        return super().should_commit(timeout)


@contextmanager
def manager(address: str, name: str, min_sites: int) -> Iterator[FaultyManager]:
    """The manager of a site of one rank."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    site = FaultyManager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=min_sites,
        use_async_quorum=False,
        timeout=TIMEOUT,
        quorum_timeout=TIMEOUT,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=address,
        replica_id=name,
        hostname="127.0.0.1",
    )
    site.lighthouse = address
    try:
        yield site
    finally:
        site.shutdown(wait=False)


def wait_for_sites(own: Manager, count: int) -> None:
    """Until the lighthouse hears from ``count`` sites; its page lists every one that sends heartbeats."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        page = urllib.request.urlopen(own.lighthouse + "/status", timeout=5).read().decode()
        if len(set(re.findall(r"site\d+:[0-9a-f-]{36}", page))) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"the lighthouse never heard from {count} sites")


def run_sites(
    num_sites: int,
    body: Callable[..., Any],
    *,
    min_sites: int | None = None,
    before: Callable[[int], None] = lambda index: None,
) -> list[Any]:
    """Call ``body(index, manager)`` at every site at once and return what each returned.

    ``before(index)`` runs first: the lighthouse does not hear from the site until it returns.
    """
    minimum = min_sites or num_sites
    with lighthouse(minimum) as address, ThreadPoolExecutor(num_sites) as pool:

        def site(index: int) -> Any:
            before(index)
            with manager(address, f"site{index}", minimum) as own:
                return body(index, own)

        futures = [pool.submit(site, index) for index in range(num_sites)]
        return [future.result(timeout=120) for future in futures]


def outer_loop(model: torch.nn.Module, optimizer: torch.optim.Optimizer, own: Manager, **settings: Any) -> SemiSync:
    """The outer loop of a site that is a thread."""
    options = {key: settings.pop(key) for key in ("site_weight", "on_round") if key in settings}
    return SemiSync.Config(**settings).build(
        model_parts=[model], optimizers=optimizer, manager=own, site_ranks=SiteRanks(alone=True), **options
    )


class Meeting:
    """Lets one thread wait for another without sleeping."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def arrive(self) -> None:
        self.reached.set()

    def wait(self) -> None:
        assert self.reached.wait(60), "the other site never came"
