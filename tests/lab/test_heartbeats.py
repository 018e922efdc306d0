"""Heartbeats beside an exchange over a thin link, in virtual time: nobody counts as dead because it sends."""

from dataclasses import replace

import pytest

from tests.config.conftest import GOOD
from titan_ext.config.load import load_run
from titan_ext.lab.build import Request, make_script
from titan_ext.lab.lighthouse import HEARTBEAT_BYTES, Lighthouse, Member
from titan_ext.lab.network import QUEUE_SECONDS, Network
from titan_ext.lab.rehearsal import Rehearsal, Script
from titan_ext.lab.report import render
from titan_ext.lab.simulation import Simulation
from titan_ext.links.link import Link, Links
from titan_ext.links.tcp import Transport

INTERVAL, TIMEOUT = 0.5, 5.0
"""Of ``[replica]``, its defaults."""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    """Three sites that any one may train without; one returns while the others exchange for longer than the time-out."""
    path = tmp_path_factory.mktemp("lab") / "run.toml"
    path.write_text(GOOD.replace("steps = 20", "steps = 40"))
    sites = load_run(path, ["--replica.min_sites=1"], needs=()).sites
    request = Request(sites=3, links=["10mbit,40ms"], steps=["1s"], faults=["kill:site2@12s+8s"])
    return make_script(sites, request)


def test_an_exchange_over_10_mbit_starves_no_heartbeat(script: Script) -> None:
    outcome = Rehearsal(script).run()
    exchange = max(record.seconds_reduce for site in outcome.sites for _, record in site.rounds)
    assert exchange > TIMEOUT, "the link is not thin"
    # A heartbeat waits for what the interface has taken, and for its own way.
    assert outcome.longest_silence <= INTERVAL + QUEUE_SECONDS + 0.02
    assert outcome.finished and all(record.sites > 1 for _, record in outcome.sites[2].rounds)
    assert "came at the lighthouse at most 0.6" in render("run.toml", outcome, script.faults)


def test_heartbeats_that_waited_for_the_exchange_would_part_the_run(script: Script) -> None:
    outcome = Rehearsal(replace(script, queue_seconds=float("inf"))).run()
    assert outcome.longest_silence > TIMEOUT
    newcomer = [record for _, record in outcome.sites[2].rounds]
    assert newcomer[0].sites == 1, "the others count as dead, and it trains alone"
    assert any("two runs meet" in (record.error or "") for record in newcomer)


@pytest.mark.parametrize("queue", [QUEUE_SECONDS, float("inf")])
def test_a_heartbeat_takes_its_turn_and_its_bytes_take_time(queue: float) -> None:
    simulation = Simulation()
    links = Links.alike(["a", "b"], Link(8e6, 0.1))
    network = Network(simulation, links, Transport(window_bytes=2**40), queue_seconds=queue)
    lighthouse = Lighthouse(
        simulation,
        network,
        min_sites=1,
        expected_sites=2,
        heartbeat_interval_seconds=INTERVAL,
        heartbeat_timeout_seconds=TIMEOUT,
        join_timeout_seconds=1.0,
        formed=lambda quorum: None,
    )
    member, rate = Member(0, "a"), 1e6 * 1448 / 1514
    lighthouse.hear(member)
    arrived: list[float] = []
    network.send(0, 1, 2 * rate, lambda: arrived.append(simulation.now))
    simulation.run(until=1.2)
    # At 0, 0.5 and 1 s: behind nothing, then behind 1.5 s and 1 s of what the site sends, or the queue's length of it.
    ahead = [0.0, min(queue, 1.5), min(queue, 1.0)]
    came = [0.5 * beat + wait + HEARTBEAT_BYTES / rate + 0.05 for beat, wait in enumerate(ahead)]
    assert member.heard_at == pytest.approx(max(time for time in came if time <= 1.2), abs=0.002)
    assert network.told[0] == network.sent[0] - 2 * rate == pytest.approx(3 * HEARTBEAT_BYTES)
