"""Sites of one process that exchange in its memory: replica managers without a wire."""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.distributed import ReduceOp

from titan_ext.errors import RunError
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.engine import SemiSync
from titan_ext.semi_sync.options import SiteOptions
from titan_ext.semi_sync.site.ranks import SiteRanks
from titan_ext.semi_sync.wire.manager import ReduceOperation, ReplicaManager, SentBytes

# Between looks at whether the site that is waited for has failed.
_PATIENCE_SECONDS = 0.05


class InProcessSites:
    """All sites; each acts on a thread of its own and waits for the others where they exchange.

    Args:
        count: how many they are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._offered: list[Any] = [None] * count
        self._messages: dict[tuple[int, int, int], queue.SimpleQueue] = {}
        """By sender, receiver and tag."""
        self._barrier = threading.Barrier(count)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="site")

    def managers(self) -> list["InProcessManager"]:
        """One for each site."""
        return [InProcessManager(self, site) for site in range(self.count)]

    def outer_loops(
        self,
        config: SemiSyncConfig,
        models: Sequence[nn.Module],
        optimizers: Sequence[Any] | None = None,
        options: Sequence[Mapping[str, Any]] | None = None,
        before_join: Callable[[int, SemiSync], None] | None = None,
    ) -> list[SemiSync]:
        """The outer loop of each site, which all have joined.

        Args:
            config: of all sites.
            models: one for each site; what they share must be equal, since no site takes over another's state here.
            optimizers: one for each site, for methods that sync their states.
            options: for each site, fields of ``SiteOptions`` besides ``ranks``.
            before_join: called with each site's index and outer loop, to load a checkpoint.

        Raises:
            ValueError: a setting is wrong, or a synced state does not exist.
        """
        parts = zip(self.managers(), models, optimizers or [[]] * self.count, options or [{}] * self.count, strict=True)
        loops = [
            SemiSync(
                config,
                model_parts=[model],
                optimizers=optimizer,
                manager=manager,
                site=SiteOptions(ranks=SiteRanks(alone=True), **own),
            )
            for manager, model, optimizer, own in parts
        ]
        for site, loop in enumerate(loops if before_join is not None else ()):
            before_join(site, loop)
        self.at_once(lambda site: loops[site].join())
        return loops

    def at_once(self, action: Callable[[int], Any]) -> list[Any]:
        """Call ``action(site)`` for all sites at the same time; returns what each returned.

        Raises:
            Exception: what the first site that failed raised; the others do not wait for it.
        """
        futures = [self._pool.submit(self._guarded, action, site) for site in range(self.count)]
        failures = [future.exception() for future in futures]
        # Those who waited for it only say that they waited in vain.
        for failure in sorted(filter(None, failures), key=lambda each: isinstance(each, threading.BrokenBarrierError)):
            raise failure
        return [future.result() for future in futures]

    def exchange(self, site: int, offer: Any) -> list[Any]:
        """What every site offers, in their order; all of them call this, and leave what they offer as it is."""
        self._offered[site] = offer
        self._barrier.wait()
        offered = list(self._offered)
        # What is offered next must not be there before all have taken this.
        self._barrier.wait()
        return offered

    def sum(self, site: int, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` by its sum over the sites, which all call this."""
        tensor.copy_(torch.stack(self.exchange(site, tensor.clone())).sum(0))

    def check(self) -> None:
        """Raises BrokenBarrierError if a site has failed, for which the others would wait in vain."""
        if self._barrier.broken:
            raise threading.BrokenBarrierError

    def messages(self, source: int, destination: int, tag: int) -> queue.SimpleQueue:
        """What one site has sent another under a tag.

        Both may be the first to ask, from threads of their own: ``setdefault`` is one step, where the factory of a
        defaultdict could run at both, and what went into the one queue would never arrive.
        """
        return self._messages.setdefault((source, destination, tag), queue.SimpleQueue())

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _guarded(self, action: Callable[[int], Any], site: int) -> Any:
        try:
            return action(site)
        except BaseException:
            self._barrier.abort()
            raise


class InProcessManager(ReplicaManager):
    """A site's replica manager; sites neither come nor go, so that an error is one of the program.

    Args:
        sites: all of them.
        site: index of this one.
    """

    def __init__(self, sites: InProcessSites, site: int) -> None:
        self._sites = sites
        self._site = site
        self._process_group = _InProcessGroup(sites, site)

    @property
    def process_group(self) -> Any:
        """The collectives of bytes."""
        return self._process_group

    @property
    def bytes_sent(self) -> SentBytes:
        """There is no wire."""
        return SentBytes()

    def start_quorum(self) -> None:
        """Nothing: the sites are always the same."""

    def standing_quorum(self) -> None:
        """None: the next one takes no time."""

    def allreduce(self, tensor: torch.Tensor, *, reduce_op: ReduceOperation) -> "_Done":
        """Sum ``tensor`` in place over the sites; done when this returns."""
        assert reduce_op == ReduceOp.SUM, reduce_op
        self._sites.sum(self._site, tensor)
        return _Done()

    def should_commit(self) -> bool:
        """Always: there is nothing that could have failed."""
        return True

    def num_participants(self) -> int:
        """All sites."""
        return self._sites.count

    def participating_rank(self) -> int:
        """The site's index."""
        return self._site

    def report_error(self, error: Exception) -> None:
        """Raises RunError: sites of one process differ in nothing that the outer loop checks."""
        raise RunError(f"site {self._site}: {error}") from error

    def errored(self) -> object | None:
        """None."""
        return None

    def register_state_dict_fn(
        self, key: str, load_state_dict: Callable[[Any], None], state_dict: Callable[[], Any]
    ) -> None:
        """Nothing: no site is ever behind."""

    def serve_snapshot_requests(self, make: Callable[[], Any] | None = None) -> None:
        """Nothing: no site ever joins late."""

    def state_dict(self) -> dict[str, int]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore."""


class _InProcessGroup:
    """The messages of a process group that the outer loop sends bytes with."""

    def __init__(self, sites: InProcessSites, site: int) -> None:
        self._sites = sites
        self._site = site

    def getBackendName(self) -> str:
        return "in-process"

    def send(self, tensors: Sequence[torch.Tensor], dst_rank: int, tag: int) -> "_Done":
        self._sites.messages(self._site, dst_rank, tag).put(tensors[0].clone())
        return _Done()

    def recv(self, tensors: Sequence[torch.Tensor], src_rank: int, tag: int) -> "_Arrival":
        return _Arrival(self._sites, self._sites.messages(src_rank, self._site, tag), tensors[0])


class _Arrival:
    """The work of a message that another site sends."""

    def __init__(self, sites: InProcessSites, messages: queue.SimpleQueue, place: torch.Tensor) -> None:
        self._sites, self._messages, self._place = sites, messages, place

    def is_completed(self) -> bool:
        return not self._messages.empty()

    def wait(self) -> bool:
        while True:
            try:
                self._place.copy_(self._messages.get(timeout=_PATIENCE_SECONDS))
            except queue.Empty:
                self._sites.check()
            else:
                return True


class _Done:
    """The work of a reduction or a message that is over."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> bool:
        return True
