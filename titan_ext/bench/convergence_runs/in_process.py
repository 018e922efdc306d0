"""Sites of one process that exchange in its memory: replica managers without a wire."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed import ReduceOp

from titan_ext.errors import RunError
from titan_ext.semi_sync.manager import ReplicaManager


class InProcessSites:
    """All sites; each acts on a thread of its own and waits for the others where they reduce.

    Args:
        count: how many they are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._offered: list[torch.Tensor | None] = [None] * count
        self._sum: torch.Tensor
        self._barrier = threading.Barrier(count, action=self._add)
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="site")

    def managers(self) -> list["InProcessManager"]:
        """One for each site."""
        return [InProcessManager(self, site) for site in range(self.count)]

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

    def sum(self, site: int, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` by its sum over the sites, which all call this."""
        self._offered[site] = tensor
        self._barrier.wait()
        # The next sum waits for all sites, and so for all copies of this one.
        tensor.copy_(self._sum)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _add(self) -> None:
        self._sum = torch.stack(self._offered).sum(0)

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

    def start_quorum(self) -> None:
        """Nothing: the sites are always the same."""

    def allreduce(self, tensor: torch.Tensor, *, reduce_op: ReduceOp) -> "_Done":
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

    def state_dict(self) -> dict[str, int]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore."""


class _Done:
    """The work of a reduction that is over."""

    def wait(self) -> bool:
        return True
