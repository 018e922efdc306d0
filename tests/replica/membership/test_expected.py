"""A run begins with the sites that are expected, or after a while with those that are here."""

import pytest

from tests.replica.sites import Lighthouse, Site, running


@pytest.mark.parametrize("ranks", [1, 2])
def test_sites_that_are_started_one_after_the_other_begin_together(ranks, tmp_path):
    east, west = (
        Site(name, rate, ranks, replica={"expected_sites": 2}) for name, rate in (("east", 1.0), ("west", 3.0))
    )
    with running([east], Lighthouse(1), tmp_path) as run:
        run.lighthouse.wait_for_quorum("east", alone=True)
        run.start(west)
        found = run.outcomes(2 * ranks)
    assert [outcome.error for outcome in found.values()] == [None] * 2 * ranks
    for outcome in found.values():
        assert outcome.rounds == [(step, 2, True) for step in range(2, east.steps + 1, 2)], outcome.log
        assert outcome.values == [2.0 * east.steps]


def test_who_does_not_come_is_not_waited_for_for_ever(tmp_path):
    """The two that are here agree on when the wait is over, though one would wait ten times as long."""
    east, west = (
        Site(name, replica={"expected_sites": 3, "expected_timeout_seconds": seconds})
        for name, seconds in (("east", 4.0), ("west", 0.5))
    )
    with running([east, west], Lighthouse(2), tmp_path) as run:
        found = run.outcomes(2)
    assert [outcome.error for outcome in found.values()] == [None, None]
    assert {outcome.rounds[0] for outcome in found.values()} == {(2, 2, True)}
    assert len({outcome.sha256 for outcome in found.values()}) == 1


def test_a_run_under_way_waits_for_nobody(tmp_path):
    east, west = (Site(name, hold_at=4) for name in ("east", "west"))
    north = Site("north", replica={"expected_sites": 9, "expected_timeout_seconds": 3600.0})
    with running([east, west], Lighthouse(2), tmp_path) as run:
        run.wait_until_held(east, west)
        run.start(north)
        run.lighthouse.wait_for_requests(1)
        run.let_go(east, west)
        found = run.outcomes(3)
    assert [outcome.error for outcome in found.values()] == [None] * 3
    assert found["east", 0].rounds[-1][1:] == (3, True)
