"""The simulation's clock and processes, and messages on its network, against arithmetic written out."""

import pytest
import torch

from titan_ext.lab.collectives import AllGather, AllReduce, AllToAll, Group
from titan_ext.lab.network import Network
from titan_ext.lab.simulation import Signal, Simulation
from titan_ext.links.link import Link, Links
from titan_ext.links.tcp import Transport

RATE = 1e6 * 1448 / 1514  # payload bytes a second of 8 Mbit/s


def test_time_passes_for_who_sleeps_and_ties_keep_their_order() -> None:
    simulation, told = Simulation(), []

    def sleeper(name: str, *naps: float) -> None:
        for nap in naps:
            simulation.sleep(nap)
            told.append((name, simulation.now))

    for name, naps in {"a": (1.0, 1.0), "b": (2.0,), "c": (0.5, 1.5)}.items():
        simulation.spawn(lambda name=name, naps=naps: sleeper(name, *naps))
    simulation.run()
    # Of those that wake at 2 s, first who lay down first.
    assert told == [("c", 0.5), ("a", 1.0), ("b", 2.0), ("c", 2.0), ("a", 2.0)]


def test_signals_results_failures_and_ends() -> None:
    simulation, told = Simulation(), []
    signal = Signal(simulation)

    def waits() -> str:
        simulation.wait(signal)
        told.append(simulation.now)
        return "done"

    def fails() -> None:
        raise ValueError("as it must")

    def sleeps() -> None:
        try:
            simulation.sleep(100.0)
        finally:
            told.append("ended")

    waiting, failing, sleeping = map(simulation.spawn, (waits, fails, sleeps))
    failing.is_awaited = True

    def main() -> None:
        simulation.at(3.0, signal.set)
        assert waiting.result() == "done"
        with pytest.raises(ValueError, match="as it must"):
            failing.result()

    simulation.spawn(main)
    simulation.at(5.0, sleeping.end)
    simulation.run()
    assert told == [3.0, "ended"] and simulation.now == 100.0


def network(simulation: Simulation, sites: int, link: Link) -> Network:
    transport = Transport(window_bytes=2**40, message_trips=0.5)
    return Network(simulation, Links.alike([f"s{place}" for place in range(sites)], link), transport)


def finish_times(kind: type, offers: list, link: Link) -> tuple[list[float], list]:
    simulation = Simulation()
    group = Group(simulation, network(simulation, len(offers), link), range(len(offers)), 1000.0, 1e9)
    times, results = [0.0] * len(offers), [None] * len(offers)

    def member(rank: int) -> None:
        collective = group.join(0, rank, kind, offers[rank])
        collective.wait(rank)
        times[rank] = simulation.now
        results[rank] = collective.result() if kind is AllReduce else collective.offers()

    for rank in range(len(offers)):
        simulation.spawn(lambda rank=rank: member(rank))
    simulation.run()
    return times, results


def test_a_ring_takes_its_hops_and_sums() -> None:
    offers = [torch.full((300,), float(rank + 1)) for rank in range(3)]
    times, results = finish_times(AllReduce, offers, Link(8e6, 0.0))
    # Four hops of a third of 1200 bytes, each standing for 1000.
    assert times == pytest.approx([4 * 400_000 / RATE] * 3)
    assert all(torch.equal(result, torch.full((300,), 6.0)) for result in results)


def test_tables_are_not_scaled_and_trips_count() -> None:
    offers = [torch.full((3,), rank + 1, dtype=torch.int64) for rank in range(3)]
    times, _ = finish_times(AllReduce, offers, Link(8e6, 0.1))
    assert times == pytest.approx([4 * (0.05 + 8 / RATE)] * 3)


def test_messages_to_all_share_a_port() -> None:
    message = torch.zeros(100, dtype=torch.uint8)
    times, _ = finish_times(AllGather, [message] * 3, Link(8e6, 0.0))
    assert times == pytest.approx([2 * 100_000 / RATE] * 3)
    times, _ = finish_times(AllToAll, [[message] * 3] * 3, Link(8e6, 0.0))
    assert times == pytest.approx([2 * 100_000 / RATE] * 3)


def test_a_partition_delays_a_message_until_tcp_tries_again() -> None:
    simulation, times = Simulation(), []
    net = network(simulation, 3, Link(8e6))
    net.partition((0, 1), until=1.0)
    for target in (1, 2):
        net.send(0, target, 1000.0, lambda target=target: times.append((target, simulation.now)))
    simulation.run()
    # Tries at 0, 0.2, 0.6 and 1.4 s.
    assert dict(times)[1] == pytest.approx(1.4 + 1000 / RATE)


def test_a_group_that_breaks_fails_what_is_under_way_and_what_follows() -> None:
    simulation, told = Simulation(), []
    group = Group(simulation, network(simulation, 2, Link(8e6, 0.1)), [0, 1], 1.0, 1e9)

    def member(rank: int) -> None:
        for index in range(2):
            try:
                group.join(index, rank, AllReduce, torch.zeros(2)).wait(rank)
            except RuntimeError as error:
                told.append((index, rank, str(error), simulation.now))

    for rank in range(2):
        simulation.spawn(lambda rank=rank: member(rank))
    simulation.at(0.01, lambda: group.break_up("s1 is gone"))
    simulation.run()
    assert sorted(told) == [(index, rank, "s1 is gone", 0.01) for index in range(2) for rank in range(2)]
