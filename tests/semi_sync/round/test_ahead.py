"""Rounds that are exchanged over the connections of the last quorum while the lighthouse is asked for the next one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from tests.lighthouse_page import PATIENCE_SECONDS, wait_for_requests
from tests.semi_sync.sites import in_background, lighthouse, outer_loop, run_sites, stop
from titan_ext.replica import Replica, ReplicaConfig
from titan_ext.semi_sync import SiteRanks
from titan_ext.semi_sync.round import exchange
from titan_ext.semi_sync.round.agreement import Position, SiteStatus, agree
from titan_ext.semi_sync.round.round import Launch, Role
from titan_ext.semi_sync.wire.reductions import AllReduce

STEPS = 6


class Slow(Replica):
    """A replica whose quorums wait for an event, which a test sets."""

    let_through: threading.Event | None = None
    quorums = 0

    def start_quorum(self, **options: Any) -> None:
        self.quorums += 1
        if self.let_through is not None:
            assert self.let_through.wait(PATIENCE_SECONDS), "nobody went ahead of the quorum"
        super().start_quorum(**options)


@contextmanager
def replica(address: str, name: str, min_sites: int, seconds: float = 30.0) -> Iterator[Slow]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    config = ReplicaConfig(
        lighthouse=address, min_sites=min_sites, hostname="127.0.0.1", timeout_seconds=seconds, prefetch_state=False
    )
    own = Slow(config, site=name, rank=0, world_size=1, store_port=store.port)
    try:
        yield own
    finally:
        stop(own)


def made_model() -> torch.nn.Module:
    model = torch.nn.Linear(300, 7, bias=False)
    model.weight.data = torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(0))
    return model


def train(index: int, own: Any, steps: int = STEPS, **settings: Any) -> tuple[torch.Tensor, list[Any]]:
    model, records = made_model(), []
    outer = outer_loop(model, [], own, name=f"site{index}", on_round=records.append, **settings)
    outer.join()
    generator = torch.Generator().manual_seed(index)
    while outer.inner_step < steps:
        model.weight.data += torch.randn(model.weight.shape, generator=generator)
        outer.step()
    outer.finish()
    return model.weight.detach().clone(), records


def run_replicas(count: int, body: Any, **options: Any) -> list[Any]:
    with lighthouse(count) as address:

        def site(index: int) -> Any:
            with replica(address, f"site{index}", count, **options) as own:
                return body(index, own)

        return [each.result(2 * PATIENCE_SECONDS) for each in [in_background(site, index) for index in range(count)]]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "diloco", "sync_every": 2},
        {"method": "diloco", "sync_every": 2, "codec": "int8"},
        {"method": "local_sgd", "sync_every": 1, "weighting": "tokens"},
        {"method": "diloco", "sync_every": 2, "codec": "topk", "outlier_threshold": 3.0},
        {"method": "diloco", "sync_every": 3, "fragment_sync_delay": 1},
        {"method": "noloco", "sync_every": 2},
        {"method": "sparta", "sync_every": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [2, 3])
def test_it_changes_no_bit(settings, count):
    waiting = run_sites(count, lambda index, own: train(index, own, **settings))
    ahead = run_replicas(count, lambda index, own: train(index, own, **settings))
    for (value, _), (other, records) in zip(waiting, ahead, strict=True):
        assert torch.equal(value, other)
        assert all(each.committed for each in records)


def test_the_round_is_exchanged_before_the_quorum_is_there(monkeypatch):
    """The quorums of all rounds after the first come when the sums are there, which the sites would wait for for ever."""
    reduced = threading.Event()
    arrived = threading.Barrier(2, action=reduced.set)
    reduce = exchange.Exchange._reduce

    def reducing(self, *arguments):
        summed = reduce(self, *arguments)
        arrived.wait(PATIENCE_SECONDS)
        return summed

    def body(index, own):
        model = made_model()
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1, name=f"site{index}")
        outer.join()
        monkeypatch.setattr(exchange.Exchange, "_reduce", reducing)
        own.let_through = reduced
        model.weight.data += index + 1
        outer.step()
        assert own.quorums == 2 and outer.ledger.last.committed
        return model.weight.detach().clone()

    first, second = run_replicas(2, body)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, made_model().weight.data + 1.5)


def test_a_site_may_come_later_than_a_message_may_take():
    late = threading.Event()

    def body(index, own):
        model = made_model()
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1, name=f"site{index}")
        outer.join()
        if index:
            late.wait(3)
        model.weight.data += index
        outer.step()
        return outer.ledger.last.committed, outer.ledger.last.seconds_waiting

    results = run_replicas(2, body, seconds=1.0)
    assert [committed for committed, _ in results] == [True, True]


@pytest.mark.parametrize("delay", [0, 1])
def test_a_site_that_joins_voids_what_was_exchanged_without_it(monkeypatch, delay):
    """Two sites have exchanged a round when the quorum brings a third one: it is done again, with it, and counts once."""
    begun, asked, voided = threading.Barrier(4), threading.Event(), []
    run_ahead = exchange.Exchange._run_ahead

    def running(self, *arguments):
        result = run_ahead(self, *arguments)
        if result is None:
            voided.append(self)
        return result

    def telling(self, *arguments):
        told = tell(self, *arguments)
        if self.manager.let_through is asked and not asked.is_set():
            begun.wait(PATIENCE_SECONDS)
        return told

    monkeypatch.setattr(exchange.Exchange, "_run_ahead", running)
    tell = exchange.Exchange._tell
    monkeypatch.setattr(exchange.Exchange, "_tell", telling)
    settings = {"method": "local_sgd", "sync_every": 1 + delay, "fragment_sync_delay": delay}

    def body(index, address):
        if index == 2:
            begun.wait(PATIENCE_SECONDS)
        with replica(address, f"site{index}", 2) as own:
            model, records = torch.nn.Linear(7, 5, bias=False), []
            model.weight.data.zero_()
            outer = outer_loop(model, [], own, name=f"site{index}", on_round=records.append, **settings)
            outer.join()
            while outer.inner_step < 40:
                model.weight.data += 10.0**index
                outer.step()
                if index < 2 and outer.inner_step == 5:
                    own.let_through = asked  # the others' next quorum is asked for after the third has
            outer.finish()
            values = outer.global_parameters()["weight"].clone()
            return values, [(each.step, each.participants, each.committed) for each in records]

    with lighthouse(2) as address:
        sites = [in_background(body, index, address) for index in range(3)]
        begun.wait(PATIENCE_SECONDS)
        wait_for_requests(address, 1)
        asked.set()
        (first, rounds), (second, _), (third, _) = [each.result(2 * PATIENCE_SECONDS) for each in sites]
    assert len(voided) == 2
    assert torch.equal(first, second) and torch.equal(first, third)
    alone = sum(committed and participants == 2 for _, participants, committed in rounds)
    together = sum(committed and participants == 3 for _, participants, committed in rounds)
    assert alone + together == 40 // (1 + delay) and together > 0, rounds
    # Of each round one step counts: what was done beside an exchange, its result replaces.
    assert first.unique().tolist() == [pytest.approx(alone * 5.5 + together * 37.0)]


MEMBER = SiteStatus(name="a", fingerprint=1, run=5, position=Position(0, 3), step=8, rules=[0])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(MEMBER, name="b", rules=None), "a site is behind"),
        (replace(MEMBER, name="b", position=Position(0, 2)), "different commits"),
        (replace(MEMBER, name="b"), None),
    ],
)
def test_nobody_is_healed_in_a_round_that_went_ahead(other, said):
    for table in ([replace(MEMBER, ahead=True), other], [MEMBER, replace(other, ahead=True)]):
        for rank in range(2):
            problem = agree(table, rank).problem
            assert problem is None if said is None else said in problem, problem
    assert agree([MEMBER, other], 0).problem is None


@pytest.mark.parametrize("noised", [False, True])
def test_noised_work_waits_for_the_quorum(noised):
    """Noised once more for another quorum, the same work would be told twice."""
    rule = SimpleNamespace(apply=SimpleNamespace(keeps_private=noised))
    plan = SimpleNamespace(rules=[rule], lateness=SimpleNamespace(trains_on=False))
    own = SimpleNamespace(plan=plan, reductions=[AllReduce(10)], site=SiteRanks(alone=True))
    launch = Launch(role=Role.MEMBER, rules=(0,), step=1, weight=1.0)
    assert exchange.Exchange._may_go_ahead(own, launch, None) is not noised
