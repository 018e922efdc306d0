"""Doctors of several sites at a real lighthouse, in threads of one process."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from tests.end_to_end.forked import lighthouse
from tests.lighthouse_page import wait_until
from titan_ext.doctor.finding import Level
from titan_ext.doctor.machine import check_address, check_machine
from titan_ext.doctor.peers import Links, check_lighthouse, check_members, check_region_lighthouse, meet
from titan_ext.replica import ReplicaConfig
from titan_ext.replica.membership.lighthouse_page import LighthousePage, Member, read_lighthouse_page
from titan_ext.replica.membership.shared_secret import Secret
from titan_ext.semi_sync.round.differences import InCommon

SECRET, OTHER = Secret(b"a secret of the run's sites"), Secret(b"the secret of other sites")
IDENTITY = "00000000-0000-0000-0000-00000000000"


def site(name: str, **settings: Any) -> SimpleNamespace:
    config = SimpleNamespace(
        replica=ReplicaConfig(**settings),
        metrics=SimpleNamespace(serve_port=0),
        checkpoint=SimpleNamespace(enable=False),
        dump_folder=".",
    )
    return SimpleNamespace(name=name, config=config, nproc=2, count=2)


def in_common(plan: dict[str, str]) -> InCommon:
    return InCommon(plan={f"rule params.{key}": value for key, value in plan.items()}, tensors={}, behind_plan=plan)


def together(
    url: str, plans: dict[str, dict[str, str]], secrets: dict[str, Secret | None], names: list[str]
) -> dict[str, Links]:
    with ThreadPoolExecutor() as pool:
        waiting = {
            name: pool.submit(
                meet,
                url,
                site(name),
                "127.0.0.1",
                in_common(plan),
                names,
                secrets.get(name),
                30.0 if len(plans) > 1 else 0.1,
            )
            for name, plan in plans.items()
        }
        return {name: each.result() for name, each in waiting.items()}


def serious(links: Links) -> list[tuple[str, str]]:
    return [(each.check, each.what) for each in links.findings if each.level in (Level.WARNING, Level.PROBLEM)]


def test_doctors_measure_the_ways_between_each_other() -> None:
    plan = {"sampling.period": "10"}
    with lighthouse(2) as url:
        found = together(url, {"east": plan, "west": plan}, {"east": SECRET, "west": SECRET}, ["east", "west"])
        assert read_lighthouse_page(url).members == [], "no doctor asks for a quorum"
    for links in found.values():
        assert serious(links) == []
        assert links.bits_per_second > 1e6 and 0 < links.round_trip_seconds < 10


def test_the_lighthouse_of_a_region() -> None:
    assert check_region_lighthouse(None) == []
    with lighthouse(1) as url:
        (found,) = check_region_lighthouse(url)
    assert found.level is Level.OK and url in found.what
    (found,) = check_region_lighthouse("127.0.0.1:1")
    assert (
        found.level is Level.PROBLEM and "127.0.0.1:1 does not answer" in found.what and "--min-sites 1" in found.mend
    )


def test_what_differs_is_named_at_both_sites() -> None:
    plans = {"east": {"sampling.period": "10", "same": "1"}, "west": {"sampling.period": "12", "same": "1"}}
    with lighthouse(2) as url:
        found = together(url, plans, {}, ["east", "west"])
    assert serious(found["east"]) == [("plan", "sampling.period is 10 at this site, 12 at west")]
    assert serious(found["west"]) == [("plan", "sampling.period is 12 at this site, 10 at east")]


def test_a_site_of_another_secret_and_one_that_is_not_there() -> None:
    plan = {"x": "1"}
    with lighthouse(2) as url:
        found = together(url, {"east": plan, "west": plan}, {"east": SECRET, "west": OTHER}, ["east", "west"])
        for name, links in found.items():
            ((check, what),) = serious(links)
            assert check == f"to {'west' if name == 'east' else 'east'}" and "secret" in what
    with lighthouse(2) as url:
        alone = together(url, {"east": plan}, {}, ["east", "west"])["east"]
    (missing,) = [each for each in alone.findings if each.check == "to west"]
    assert missing.level is Level.NOTE and "--site west" in missing.mend


def member(name: str, host: str, port: int) -> Member:
    return Member(name, IDENTITY + "1", 3, f"http://{host}:{port}", f"{host}:{port}/store")


def test_members_of_a_run_are_dialled_and_not_disturbed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as closed:
        threading.Thread(target=lambda: [listening.accept() for _ in range(9)], daemon=True).start()
        closed.bind(("127.0.0.1", 0))
        ways = [member("west", "127.0.0.1", closed.getsockname()[1]), member("east", "127.0.0.1", 1)]
        problems = serious(check_members(ways, "east"))
        assert {check for check, _ in problems} == {"to west"}
        assert sum("Connection refused" in what for _, what in problems) >= 2
        listening.close()


PAGES = [
    ({}, Level.OK, "nobody is there yet"),
    ({"west": 0.1}, Level.OK, "the run goes on with west"),
    ({"west": 100.0}, Level.OK, "nobody is there yet"),
    ({"paris": 0.1}, Level.PROBLEM, "paris of another run"),
    ({"east": 0.1}, Level.PROBLEM, 'a site named "east" is there already'),
]


@pytest.mark.parametrize("ages, level, what", PAGES)
def test_who_uses_the_lighthouse(ages: dict[str, float], level: Level, what: str) -> None:
    members = [member(name, "host", 1) for name in ages]
    page = LighthousePage(members, {f"{name}:{IDENTITY}1": age for name, age in ages.items()})
    (finding,) = check_lighthouse(page, ["east", "west"], "east")
    assert finding.level is level and what in finding.what


def test_the_page_of_a_real_quorum_is_understood() -> None:
    from datetime import timedelta

    from torchft.coordination import LighthouseClient

    with lighthouse(1) as url:
        client = LighthouseClient(url, connect_timeout=timedelta(seconds=30))
        client.quorum(f"east:{IDENTITY}1", timedelta(seconds=30), "http://10.0.0.1:5", "10.0.0.1:6/s", 7, 1, False)
        wait_until(lambda: read_lighthouse_page(url).members, "the quorum's page")
        page = read_lighthouse_page(url)
    assert page.members == [Member("east", IDENTITY + "1", 7, "http://10.0.0.1:5", "10.0.0.1:6/s")]
    assert page.alive(60.0) == page.members and page.alive(0.0) == []


def test_ports_in_use_are_named() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        port = taken.getsockname()[1]
        for settings, key in (
            ({"manager_port": port}, "replica.manager_port"),
            ({"state_port": port - 1}, "replica.state_port"),
        ):
            found = [each for each in check_machine(site("east", **settings)) if each.level is Level.PROBLEM]
            assert any(
                each.check == "ports" and f"cannot listen on port {port}" in each.what and each.mend.startswith(key)
                for each in found
            )


def test_a_loopback_address_is_a_problem_where_the_lighthouse_is_elsewhere() -> None:
    assert check_address("127.0.0.1", "lighthouse.example")[0].level is Level.PROBLEM
    assert check_address("127.0.0.1", "127.0.0.1")[0].level is Level.NOTE
