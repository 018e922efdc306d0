"""The simulation's clock and processes, and messages on its network, against arithmetic written out."""

import pytest
import torch

from titan_ext.lab.messages import Group
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
    transport = Transport(window_bytes=2**40)
    return Network(simulation, Links.alike([f"s{place}" for place in range(sites)], link), transport)


def group_of(simulation: Simulation, sites: int, link: Link, scale: float = 1.0) -> Group:
    return Group(simulation, network(simulation, sites, link), list(range(sites)), scale, 1e9)


def arrivals(contents: list[torch.Tensor], link: Link) -> dict[tuple[int, int], float]:
    """When each site has what each other one sends it; all send at once."""
    simulation, times = Simulation(), {}
    count = len(contents)
    group = group_of(simulation, count, link, scale=1000.0)

    def member(rank: int) -> None:
        others = [site for site in range(count) if site != rank]
        for site in others:
            group.send(1, rank, site, 0, contents[rank])
        for site in others:
            message = group.receive(1, rank, site, 0)
            message.wait()
            assert torch.equal(message.content, contents[site])
            times[site, rank] = simulation.now

    for rank in range(count):
        simulation.spawn(lambda rank=rank: member(rank))
    simulation.run()
    return times


def test_messages_are_scaled_and_share_a_port() -> None:
    times = arrivals([torch.full((300,), float(rank)) for rank in range(3)], Link(8e6))
    # 1200 bytes to each of two, each standing for 1000: the second ones leave when the first have left.
    assert max(times.values()) == pytest.approx(2 * 1_200_000 / RATE)
    assert min(times.values()) == pytest.approx(1_200_000 / RATE)


def test_tables_are_not_scaled_and_a_message_takes_half_a_round_trip() -> None:
    times = arrivals([torch.full((3,), rank, dtype=torch.int64) for rank in range(2)], Link(8e6, 0.1))
    assert times == pytest.approx({(0, 1): 0.05 + 24 / RATE, (1, 0): 0.05 + 24 / RATE})


def test_a_message_goes_before_its_receiver_asks_and_keeps_what_was_sent() -> None:
    simulation, told = Simulation(), []
    group = group_of(simulation, 2, Link(8e6))

    def sends() -> None:
        content = torch.ones(250)
        group.send(1, 0, 1, 7, content)
        content.zero_()

    def receives() -> None:
        simulation.sleep(1.0)
        message = group.receive(1, 1, 0, 7)
        message.wait()
        told.append((simulation.now, message.content.sum().item()))

    simulation.spawn(sends)
    simulation.spawn(receives)
    simulation.run()
    assert told == [(1.0, 250.0)]


def test_a_partition_delays_a_message_until_tcp_tries_again() -> None:
    simulation, times = Simulation(), []
    net = network(simulation, 3, Link(8e6))
    net.partition((0, 1), until=1.0)
    for target in (1, 2):
        net.send(0, target, 1000.0, lambda target=target: times.append((target, simulation.now)))
    simulation.run()
    # Tries at 0, 0.2, 0.6 and 1.4 s.
    assert dict(times)[1] == pytest.approx(1.4 + 1000 / RATE)
    assert dict(times)[2] == pytest.approx(2 * 1000 / RATE), "what goes elsewhere waits for the interface alone"


def test_a_group_that_breaks_fails_what_is_under_way_and_what_follows() -> None:
    simulation, told = Simulation(), []
    group = group_of(simulation, 2, Link(8e6, 0.1))

    def member(rank: int) -> None:
        for index in range(2):
            try:
                group.send(index, rank, 1 - rank, 0, torch.zeros(2))
                group.receive(index, rank, 1 - rank, 0).wait()
            except RuntimeError as error:
                told.append((index, rank, str(error), simulation.now))

    for rank in range(2):
        simulation.spawn(lambda rank=rank: member(rank))
    simulation.at(0.01, lambda: group.break_up("s1 is gone"))
    simulation.run()
    assert sorted(told) == [(index, rank, "s1 is gone", 0.01) for index in range(2) for rank in range(2)]
