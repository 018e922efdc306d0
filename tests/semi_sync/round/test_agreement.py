"""What sites agree on from their statuses: a pure function, so no threads and no lighthouse."""

from dataclasses import replace

import pytest

from titan_ext.semi_sync.round.agreement import Position, SiteStatus, Verdict, agree

MEMBER = SiteStatus(
    fingerprint=7, run=5, position=Position(0, 3), known=Position(0, 3), checksum=11, step=20, rules=[0, 2]
)
JOINING = replace(MEMBER, rules=None, run=0, step=0, position=Position(), known=Position(), checksum=0)
NAMES = ("east", "west", "north", "south")


def table_of(*sites: SiteStatus) -> list[SiteStatus]:
    return [replace(site, name=site.name or name) for site, name in zip(sites, NAMES)]


def verdicts(*sites: SiteStatus) -> list[Verdict]:
    """Each site's own."""
    table = table_of(*sites)
    return [agree(table, rank) for rank in range(len(table))]


def only(values: list) -> object:
    """The one that all of them are."""
    assert all(value == values[0] for value in values), values
    return values[0]


@pytest.mark.parametrize("sites", [1, 2, 4])
def test_members_at_one_point_exchange_what_they_mean_to(sites):
    agreed = only(verdicts(*[MEMBER] * sites))
    assert (agreed.rules, agreed.step, agreed.problem, agreed.newcomers) == ([0, 2], 20, None, False)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_joining_site_learns_the_round_from_the_members(place):
    sites = [MEMBER, MEMBER]
    sites.insert(place, JOINING)
    agreed = only(verdicts(*sites))
    assert (agreed.rules, agreed.step, agreed.problem) == ([0, 2], 20, None)
    assert agreed.newcomers and not agreed.all_join


def test_sites_that_all_join_go_on_from_the_latest_step():
    resuming = [replace(JOINING, run=5, step=step, position=Position(0, 1)) for step in (8, 12, 8)]
    agreed = only(verdicts(*resuming))
    assert (agreed.rules, agreed.step, agreed.problem) == ([], 12, None) and agreed.all_join


def test_other_plans_are_refused_at_all_sites_and_named():
    first, second, third = verdicts(MEMBER, replace(MEMBER, fingerprint=8), MEMBER)
    assert all(each.refused and each.rules == [] for each in (first, second, third))
    assert first.problem == third.problem and first.problem.startswith("the sites differ in [semi_sync], model")
    assert "(we and west)" in first.problem
    assert "(we and east, north)" in second.problem


def test_a_joining_site_with_another_plan_is_refused_too():
    member, joining = verdicts(MEMBER, replace(JOINING, fingerprint=9))
    assert member.refused and joining.refused and "west" in member.problem


def test_one_name_twice_is_refused_at_all_sites():
    agreed = only(verdicts(MEMBER, replace(MEMBER, name="east"), MEMBER))
    assert agreed.refused and agreed.problem == '2 sites of the quorum are named "east"'


def test_sites_without_names_are_no_namesakes():
    table = [MEMBER, MEMBER]
    assert agree(table, 0).problem is None
    assert [agree(table, 0).name(rank) for rank in (0, 5)] == ["#0", "#5"]


def test_two_runs_are_refused_with_both_named():
    first, second = verdicts(MEMBER, replace(MEMBER, run=6, position=Position(2, 9)))
    assert first.refused and second.refused
    assert "we: run 0000000000000005, round 3; west: run 0000000000000006, round 9 of generation 2" in first.problem
    assert "we: run 0000000000000006, round 9 of generation 2; east: run 0000000000000005, round 3" in second.problem


def test_a_site_without_a_run_does_not_mind_which_it_joins():
    """It is not refused where two runs meet; they are."""
    joining, first, second = verdicts(JOINING, MEMBER, replace(MEMBER, run=6))
    assert not joining.refused and first.refused and second.refused


def test_a_site_that_loaded_another_model_than_the_run_is_refused_alone():
    members, stranger = replace(MEMBER, origin=3), replace(JOINING, origin=4)
    first, second, third = verdicts(members, stranger, members)
    assert (first.refused, second.refused, third.refused) == (False, True, False)
    assert only([first.problem, second.problem, third.problem]) and first.rules == []
    assert (
        "west: loaded model 0000000000000004" in first.problem
        and "east: loaded model 0000000000000003" in first.problem
    )
    assert "checkpoint.initial_load_path" in first.problem


@pytest.mark.parametrize("origin", [0, 3])
def test_a_site_that_loaded_nothing_or_the_runs_model_may_join(origin):
    assert only(verdicts(replace(MEMBER, origin=3), replace(JOINING, origin=origin))).problem is None


@pytest.mark.parametrize(
    ("origins", "refused"),
    [
        ((3, 3, 3), [False] * 3),
        ((0, 0, 0), [False] * 3),
        ((3, 4, 3), [False, True, False]),
        ((3, 0, 0), [True, False, False]),
        ((3, 4), [True, True]),
        ((3, 0, 3, 0), [True] * 4),
    ],
)
def test_where_a_run_begins_the_model_of_most_counts(origins, refused):
    found = verdicts(*[replace(JOINING, origin=origin) for origin in origins])
    assert [each.refused for each in found] == refused
    assert all((each.problem is None) == (not any(refused)) for each in found)


@pytest.mark.parametrize("other", [replace(MEMBER, step=26), replace(MEMBER, rules=[0])], ids=["step", "rules"])
def test_other_points_of_the_schedule_name_a_step_to_meet_at(other):
    found = verdicts(MEMBER, other, JOINING)
    assert not any(each.refused or each.rules for each in found)
    assert only([each.resync_step for each in found]) == max(MEMBER.step, other.step) + 1
    assert all("different points of the schedule" in each.problem for each in found)


@pytest.mark.parametrize(
    ("checksums", "diverged"),
    [
        ((11, 12, 11), [False, True, False]),
        ((12, 11, 11), [True, False, False]),
        ((11, 12), [False, True]),  # no majority: the first is right
        ((11, 0, 11), [False] * 3),  # 0 says nothing
    ],
)
def test_a_shared_state_that_is_not_that_of_most_has_diverged(checksums, diverged):
    found = verdicts(*[replace(MEMBER, checksum=checksum) for checksum in checksums])
    assert [each.diverged for each in found] == diverged
    assert not any(each.refused for each in found)
    expected = [name for name, is_so in zip(NAMES, diverged) if is_so]
    assert all((each.problem is not None) == bool(expected) for each in found)
    assert all(name in each.problem for each in found for name in expected)


def test_checksums_of_other_positions_are_not_compared():
    ahead = replace(MEMBER, checksum=99, position=Position(0, 4))
    assert only(verdicts(MEMBER, ahead)).problem is None


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 0), (1.0, 4), (1.01, 5)])
def test_the_slowest_site_says_how_long_a_dead_one_is_waited_for(seconds, steps):
    found = verdicts(replace(MEMBER, step_time_ms=100), replace(MEMBER, step_time_ms=250))
    assert [each.steps_until_forgotten(seconds) for each in found] == [steps, steps]
    assert agree([MEMBER], 0).steps_until_forgotten(seconds) == 0, "no site has taken a step yet"
