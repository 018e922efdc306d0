"""Fewer sites than ``min_sites`` wait, whatever the lighthouse was told."""

import pytest

from tests.replica.sites import Lighthouse, Site, running


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_site_alone_waits_for_the_second(ranks, tmp_path):
    first, second = (Site(name, rate, ranks, replica={"min_sites": 2}) for name, rate in (("east", 1.0), ("west", 3.0)))
    with running([first], Lighthouse(1), tmp_path) as run:
        run.lighthouse.wait_for_quorum("east")
        run.start(second)
        found = run.outcomes(2 * ranks)
    assert [outcome.error for outcome in found.values()] == [None] * 2 * ranks
    assert len({outcome.sha256 for outcome in found.values()}) == 1
    for outcome in found.values():
        assert outcome.values == [2.0 * first.steps]
        assert all((sites, committed) == (2, True) for _, sites, committed in outcome.rounds)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_site_that_stays_alone_ends_by_naming_the_keys(ranks, tmp_path):
    site = Site("east", 1.0, ranks, replica={"min_sites": 2, "quorum_timeout_seconds": 3.0})
    with running([site], Lighthouse(1), tmp_path) as run:
        found = run.outcomes(ranks)
    for outcome in found.values():
        assert outcome.error.startswith("RunError: no quorum within replica.quorum_timeout_seconds = 3 at http://")
        assert "1 of at least 2 site(s) (replica.min_sites) here" in outcome.error
        assert outcome.rounds == []


def test_a_site_left_alone_stops_until_another_comes(tmp_path):
    sites = [
        Site("east", 1.0, replica={"min_sites": 2}, hold_at=5),
        Site("west", 3.0, replica={"min_sites": 2, "timeout_seconds": 3.0}, steps=4),
        Site("north", 5.0, replica={"min_sites": 2}),
    ]
    with running(sites[:2], Lighthouse(1), tmp_path) as run:
        run.wait_until_held(sites[0])
        run.outcomes(1)  # west is done and leaves
        run.let_go(sites[0])
        run.lighthouse.wait_for_quorum("east", alone=True)
        run.start(sites[2])
        found = run.outcomes(2)
    assert [outcome.error for outcome in found.values()] == [None] * 2
    assert found["east", 0].sha256 == found["north", 0].sha256
    assert [sites for _, sites, _ in found["east", 0].rounds] == [2] * 6
