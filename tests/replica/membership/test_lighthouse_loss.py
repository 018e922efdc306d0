"""The lighthouse is killed and started again on its address: no site restarts, and none goes astray."""

import pytest

from tests.replica.sites import Lighthouse, Site, running


def sites_of(ranks: int, **options) -> list[Site]:
    rates = (("east", 1.0), ("west", 3.0), ("north", 8.0))
    return [
        Site(name, rate, ranks, replica={"min_sites": 3, "connect_timeout_seconds": 5.0}, hold_at=5, **options)
        for name, rate in rates
    ]


def assert_all_committed(found, sites: list[Site]) -> None:
    assert [outcome.error for outcome in found.values()] == [None] * len(found)
    assert len({outcome.sha256 for outcome in found.values()}) == 1
    mean = sum(site.rate for site in sites) / len(sites)
    for outcome in found.values():
        assert outcome.values == [mean * sites[0].steps], outcome.log
        assert outcome.rounds == [(step, len(sites), True) for step in range(2, sites[0].steps + 1, 2)], outcome.log


@pytest.mark.parametrize("ranks", [1, 2])
def test_between_two_quorums(ranks, tmp_path):
    sites = sites_of(ranks)
    with running(sites, Lighthouse(3), tmp_path) as run:
        run.wait_until_held(*sites)
        run.lighthouse.kill()
        run.lighthouse.start()
        run.let_go(*sites)
        assert_all_committed(run.outcomes(3 * ranks), sites)


@pytest.mark.parametrize("ranks", [1, 2])
def test_while_sites_wait_in_a_quorum(ranks, tmp_path):
    sites = sites_of(ranks)
    with running(sites, Lighthouse(3), tmp_path) as run:
        run.wait_until_held(*sites)
        run.let_go(*sites[:2])
        run.lighthouse.wait_for_requests(2)
        run.lighthouse.kill()
        for site in sites[:2]:
            run.wait_for_log(site, "has gone")
        run.lighthouse.start()
        for site in sites[:2]:
            run.wait_for_log(site, f"{run.lighthouse.url} is back")
        run.let_go(sites[2])
        assert_all_committed(run.outcomes(3 * ranks), sites)


def test_another_quorum_with_the_number_of_the_last(tmp_path):
    """A new lighthouse begins to count again: two quorums of other sites have one id."""
    sites = sites_of(1)
    for site in sites:
        site.replica["min_sites"] = 2
    with running(sites[:2], Lighthouse(2), tmp_path) as run:
        run.wait_until_held(*sites[:2])
        run.lighthouse.kill()
        run.lighthouse.start()
        run.start(sites[2])
        run.lighthouse.wait_for_requests(1)
        run.lighthouse.wait_for_heartbeats(3)
        run.let_go(*sites)
        found = run.outcomes(3)
    assert [outcome.error for outcome in found.values()] == [None] * 3
    assert len({outcome.sha256 for outcome in found.values()}) == 1
    for outcome in found.values():
        assert all(committed for *_, committed in outcome.rounds), outcome.log
        assert outcome.rounds[-1][1] == 3
    assert [sites for _, sites, _ in found["east", 0].rounds] == [2, 2, 3, 3, 3, 3]


@pytest.mark.slow
def test_again_and_again(tmp_path):
    """Nothing piles up in the stores of the sites."""
    sites = sites_of(1, steps=60, pause=0.1)
    for site in sites:
        site.hold_at = 2
    with running(sites, Lighthouse(3), tmp_path) as run:
        run.wait_until_held(*sites)
        run.let_go(*sites)
        for _ in range(3):
            run.lighthouse.kill()
            run.wait_for_log(sites[0], "has gone")
            run.lighthouse.start()
            run.wait_for_log(sites[0], f"{run.lighthouse.url} is back")
        found = run.outcomes(3)
    assert_all_committed(found, sites)
    assert all(outcome.keys < 30 for outcome in found.values())


def test_a_lighthouse_that_stays_away_ends_the_site(tmp_path):
    site = Site("east", 1.0, 2, replica={"quorum_timeout_seconds": 4.0, "connect_timeout_seconds": 1.0}, hold_at=5)
    with running([site], Lighthouse(1), tmp_path) as run:
        run.wait_until_held(site)
        run.lighthouse.kill()
        run.let_go(site)
        found = run.outcomes(2)
    for outcome in found.values():
        assert outcome.error.startswith("RunError: no quorum within replica.quorum_timeout_seconds = 4 at http://")
        assert "(the lighthouse does not answer)" in outcome.error
