"""Several sites as threads of one process, with a real lighthouse and Gloo: the fast way to test."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore
from torchft.coordination import LighthouseServer
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

from tests.lighthouse_page import PATIENCE_SECONDS
from titan_ext.semi_sync import SemiSync, SiteOptions, SiteRanks

TIMEOUT = timedelta(seconds=30)


@contextmanager
def lighthouse(min_sites: int, heartbeat_timeout_ms: int = 5000, join_timeout_ms: int = 30_000) -> Iterator[str]:
    """A lighthouse that waits for every living site, if not for longer."""
    server = LighthouseServer(
        bind="[::]:0",
        min_replicas=min_sites,
        join_timeout_ms=join_timeout_ms,
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
        stop(site)


def stop(site: Manager) -> None:
    """Shut a manager down without waiting; its server's thread, which torchft leaves running then, ends too."""
    site.shutdown(wait=False)
    site._checkpoint_transport._server._BaseServer__shutdown_request = True


def run_sites(
    num_sites: int,
    body: Callable[..., Any],
    *,
    min_sites: int | None = None,
    before: Callable[[int], None] = lambda index: None,
    heartbeat_timeout_ms: int = 5000,
    join_timeout_ms: int = 30_000,
) -> list[Any]:
    """Call ``body(index, manager)`` at every site at once and return what each returned.

    ``before(index)`` runs first: the lighthouse does not hear from the site until it returns. The first
    site that raises ends the run with what it raised; the others' managers are shut down.
    """
    minimum = min_sites or num_sites
    with lighthouse(minimum, heartbeat_timeout_ms, join_timeout_ms) as address, ExitStack() as managers:

        def site(index: int) -> Any:
            before(index)
            with manager(address, f"site{index}", minimum) as own:
                managers.callback(stop, own)
                return body(index, own)

        sites = [in_background(site, index) for index in range(num_sites)]
        ended, waiting = wait(sites, 2 * PATIENCE_SECONDS, FIRST_EXCEPTION)
        for each in sites:
            if each in ended:
                each.result()
        assert not waiting, f"{len(waiting)} of {num_sites} site(s) did not end"
        return [each.result() for each in sites]


def in_background(call: Callable[..., Any], *arguments: Any) -> Future:
    """The call in a thread that nobody waits for at the end, however long it hangs."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:  # noqa: BLE001 — the future raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def outer_loop(model: torch.nn.Module, optimizer: torch.optim.Optimizer, own: Manager, **settings: Any) -> SemiSync:
    """The outer loop of a site that is a thread."""
    options = {key: settings.pop(key) for key in ("on_round", "register", "must_agree", "described") if key in settings}
    own_site = {
        key: settings.pop(key)
        for key in ("name", "weight", "labels", "heartbeat_timeout_seconds", "sources", "region_manager")
        if key in settings
    }
    site = SiteOptions(ranks=SiteRanks(alone=True), **own_site)
    return SemiSync.Config(**settings).build(
        model_parts=[model], optimizers=optimizer, manager=own, site=site, **options
    )


class Meeting:
    """Lets one thread wait for another without sleeping."""

    def __init__(self) -> None:
        self.reached = threading.Event()

    def arrive(self) -> None:
        self.reached.set()

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE_SECONDS), "the other site never came"
