"""The nodes of a site begin an attempt together and end it together.

Each node runs an agent of torchrun. Agents do not watch each other, and each of them would start its ranks anew by
itself; here the agent of node 0 keeps a store for one attempt, at which the others report.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Event, Thread

from torch.distributed import DistError, TCPStore

from titan_ext.errors import RunError, UserError
from titan_ext.launcher.node import Node
from titan_ext.replica.address import address_towards
from titan_ext.replica.shutdown.failure import FAILURE_KEY

_POLL_SECONDS = 0.5
_SILENCE_SECONDS = 15.0
"""After so long without a word a node counts as dead; one whose process has ended is noticed before."""
_CONNECT_SECONDS = 5.0
_READ_SECONDS = 5.0
"""What the others may take to read how an attempt ended."""
_BEGIN, _END = "nodes/begin", "nodes/end"


@dataclass(frozen=True, slots=True)
class End:
    """How an attempt ended at a site: what all its nodes exit with."""

    node: int
    code: int
    reason: str = ""


class SiteNodes:
    """One node's part in an attempt.

    Args:
        node: which one it is.
        patience: seconds to wait for the other nodes, at most.
    """

    def __init__(self, node: Node, patience: float) -> None:
        self._node = node
        self._patience = patience
        self._word = secrets.token_hex(8)  # never said before: what an earlier process of a node left is told from it
        self._words: list[str] = []
        self._store: TCPStore
        self._beats = 0
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._answered = 0.0
        self._over = Event()
        self._watch: Thread | None = None
        self.end: End | None = None
        """How the attempt ended, as far as this node has been told."""

    def meet(self) -> list[str]:
        """Wait until all nodes are there.

        Returns:
            the address of each node on the way to node 0.

        Raises:
            UserError: node 0 cannot listen.
            RunError: another node has not come in time.
        """
        deadline = time.monotonic() + self._patience
        if self._node.rank == 0:
            return self._receive(deadline)
        while True:
            try:
                return self._join(deadline)
            except (DistError, OSError) as error:  # no store yet, or that of an attempt that has just ended
                if time.monotonic() > deadline:
                    where = f"{self._node.host}:{self._node.port}"
                    raise RunError(f"node 0 does not answer at {where} after {self._patience:g} s") from error
                time.sleep(_POLL_SECONDS)

    def watch(self, on_end: Callable[[], None]) -> None:
        """Look after the other nodes from now on, on a thread.

        Args:
            on_end: called on that thread when one of them ends the attempt or has gone; ``end`` says why.
        """
        self._heard = {node: (b"", time.monotonic()) for node in range(1, self._node.count)}
        self._answered = time.monotonic()
        self._watch = Thread(target=self._run, args=[on_end], daemon=True, name="titan_ext-nodes")
        self._watch.start()
        # A store whose machine has gone without a word lets a question wait for a long time.
        Thread(target=self._expect_answers, args=[on_end], daemon=True, name="titan_ext-answers").start()

    def finish(self, code: int, reason: str = "") -> End:
        """This node's ranks have ended; returns how the attempt ended at the site, a success only if all say so.

        Args:
            code: with which they ended.
            reason: why, where that is known.
        """
        if self._watch is not None:
            self._over.set()
            self._watch.join(_READ_SECONDS)
            if self._watch.is_alive():
                return self._lost_first()
        try:
            if self.end is None and code == 0:
                self._all_done()
            if self.end is None:
                self._tell(self._told_by_rank() or End(self._node.rank, code, reason))
            self._let_read()
        except DistError:
            self.end = self.end or self._lost_first()
        assert self.end is not None
        return self.end

    def _receive(self, deadline: float) -> list[str]:
        self._store = self._connect(is_master=True)
        self._say_hello()
        missing = set(range(1, self._node.count))
        while missing := {node for node in missing if not self._store.check([f"nodes/hello/{node}"])}:
            if time.monotonic() > deadline:
                names = ", ".join(map(str, sorted(missing)))
                raise RunError(f"node(s) {names} of {self._node.count} have not come within {self._patience:g} s")
            time.sleep(_POLL_SECONDS)
        hellos = [self._store.get(f"nodes/hello/{node}").decode().split() for node in range(self._node.count)]
        self._store.set(_BEGIN, json.dumps(hellos))
        return self._begin(hellos)

    def _join(self, deadline: float) -> list[str]:
        self._store = self._connect(is_master=False)
        self._say_hello()
        while not self._store.check([_BEGIN]):
            if time.monotonic() > deadline:
                raise RunError(f"the other nodes have not come within {self._patience:g} s")
            time.sleep(_POLL_SECONDS)
        hellos = json.loads(self._store.get(_BEGIN))
        while hellos[self._node.rank][0] != self._word:
            # An attempt that began with this node's earlier process: node 0 sees the new one and ends it.
            self._store.check([_BEGIN])
            time.sleep(_POLL_SECONDS)
        return self._begin(hellos)

    def _say_hello(self) -> None:
        address = address_towards(self._node.host, self._node.port)
        self._store.set(f"nodes/hello/{self._node.rank}", f"{self._word} {address}")

    def _begin(self, hellos: list[list[str]]) -> list[str]:
        self._words = [word for word, _ in hellos]
        return [address for _, address in hellos]

    def _connect(self, *, is_master: bool) -> TCPStore:
        try:
            return TCPStore(
                self._node.host,
                self._node.port,
                is_master=is_master,
                wait_for_workers=False,
                multi_tenant=True,  # torchrun's own store is the same one
                timeout=timedelta(seconds=_CONNECT_SECONDS),
            )
        except DistError as error:
            if not is_master:
                raise
            where = f"{self._node.host}:{self._node.port}"
            raise UserError(f"rendezvous at {where}: this node cannot listen there: {error}") from error

    def _run(self, on_end: Callable[[], None]) -> None:
        while not self._over.wait(_POLL_SECONDS):
            try:
                self.end = self._look()
            except DistError:
                self.end = self._lost_first()
            self._answered = time.monotonic()
            if self.end is not None:
                on_end()
                return

    def _expect_answers(self, on_end: Callable[[], None]) -> None:
        while self.end is None and not self._over.wait(_POLL_SECONDS):
            if time.monotonic() - self._answered > _SILENCE_SECONDS:
                self.end = self._lost_first()
                on_end()

    def _look(self) -> End | None:
        self._beats += 1
        self._store.set(f"nodes/beat/{self._node.rank}", str(self._beats))
        if self._store.check([_END]):
            return self._read_end()
        return None if self._node.rank else self._missing()

    def _missing(self) -> End | None:
        """The end of the attempt where a node has begun anew, or has been silent for too long."""
        for node, (beat, heard) in self._heard.items():
            if self._store.get(f"nodes/hello/{node}").decode().split()[0] != self._words[node]:
                return self._tell(End(node, RunError.exit_code, f"node {node} has started anew"))
            key = f"nodes/beat/{node}"
            latest = self._store.get(key) if self._store.check([key]) else b""
            if latest != beat:
                self._heard[node] = latest, time.monotonic()
            elif time.monotonic() - heard > _SILENCE_SECONDS:
                return self._tell(End(node, RunError.exit_code, f"node {node} is silent for {_SILENCE_SECONDS:g} s"))
        return None

    def _tell(self, end: End) -> End:
        """End the attempt for all nodes, unless one of them has; returns how it has ended."""
        self._store.compare_set(_END, "", json.dumps(asdict(end)))
        return self._read_end()

    def _read_end(self) -> End:
        self.end = End(**json.loads(self._store.get(_END)))
        self._store.set(f"nodes/read/{self._node.rank}", "")
        return self.end

    def _all_done(self) -> None:
        """Wait until the ranks of all nodes have ended well, or one has not."""
        self._store.set(f"nodes/done/{self._node.rank}", "")
        while self.end is None and not self._store.check([f"nodes/done/{node}" for node in range(self._node.count)]):
            time.sleep(_POLL_SECONDS)
            self.end = self._look()

    def _let_read(self) -> None:
        """Keep the store until the others have read how the attempt ended."""
        deadline = time.monotonic() + _READ_SECONDS
        others = [f"nodes/read/{node}" for node in range(1, self._node.count)] if self._node.rank == 0 else []
        while others and not self._store.check(others) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 10)

    def _told_by_rank(self) -> End | None:
        """Why the site failed, as the rank has said that failed by itself: agents learn less, and later."""
        if not self._store.check([FAILURE_KEY]):
            return None
        return End(**json.loads(self._store.get(FAILURE_KEY)))

    def _lost_first(self) -> End:
        return End(0, RunError.exit_code, f"node 0 is gone: no store at {self._node.host}:{self._node.port}")
