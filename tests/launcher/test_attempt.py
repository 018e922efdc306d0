"""The store that torchrun keeps over its own restarts, as each attempt finds it."""

import threading
from collections.abc import Iterable
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from titan_ext.launcher.attempt import begin_attempt, clear_store

STALE = {
    "titan_ext/leaving/wake/0": "15",
    "torchft/3/0/0": "gone",
    "default_pg/0//cpu//0/0": "gone",
    "manager_addr": "http://gone:1",
    "replica_id": "a:gone",
}


@pytest.fixture
def agent() -> TCPStore:
    """The store of torchrun's agent."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


def client(agent: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", agent.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))


class Attempt:
    """Ranks that start one after the other; each notes what it finds behind ``clear_store``."""

    def __init__(self, agent: TCPStore, ranks: int) -> None:
        self.ranks = ranks
        self.found: dict[int, set[str]] = {}
        self._agent = agent
        self._threads: list[threading.Thread] = []

    def start(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            self._threads.append(threading.Thread(target=self._run, args=[rank], daemon=True))
            self._threads[-1].start()

    def _run(self, rank: int) -> None:
        store = client(self._agent)
        clear_store(store, rank, self.ranks)
        self.found[rank] = {*STALE} & {*store.list_keys()}

    def end(self) -> dict[int, set[str]]:
        for thread in self._threads:
            thread.join(60)
        return self.found


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_no_rank_finds_what_the_last_attempt_left(agent, order):
    for _ in range(3):
        for key, value in STALE.items():
            agent.set(key, value)
        attempt = Attempt(agent, ranks=3)
        for rank in order:
            attempt.start([rank])
        assert attempt.end() == {0: set(), 1: set(), 2: set()}


def test_an_attempt_that_ended_before_all_its_ranks_came_confuses_nobody(agent):
    agent.set("titan_ext/attempt/hello/1", "word of a rank that is dead")
    agent.set("titan_ext/attempt/reply/word of a rank that is dead", "attempt of old")
    agent.set("titan_ext/attempt/here/attempt of old/1", "")
    for key, value in STALE.items():
        agent.set(key, value)
    attempt = Attempt(agent, ranks=3)
    attempt.start([0, 2])
    assert not attempt.found.get(0), "rank 0 does not take the dead rank for its own"
    attempt.start([1])
    assert attempt.end() == {0: set(), 1: set(), 2: set()}


def test_what_is_torchruns_own_stays(agent):
    agent.set("none/torchelastic/role_info/0", "agent")
    clear_store(client(agent), 0, 1)
    assert agent.get("none/torchelastic/role_info/0") == b"agent"


def test_without_an_agent_there_is_nothing_to_clear(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    begin_attempt(1, 2, timedelta(seconds=1))
