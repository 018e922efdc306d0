"""Inner steps that go on where the result of a round is overdue, and sites that so come to their rounds at different steps."""

import pytest

from tests.lab.virtual_sites import TwoLayers, VirtualSites
from titan_ext.semi_sync import SemiSyncConfig
from titan_ext.semi_sync.plan.resolve import resolve

SETTINGS = dict(
    method="diloco",
    outer_optimizer="average",
    sync_every=6,
    num_fragments=2,
    fragment_sync_delay=1,
    late_work="keep",
    overdue_result="train_on",
)


def train(paces: tuple[float, ...], *, steps: int, dies: float = float("inf"), **settings):
    """What sites come to of which each takes its own time for an inner step; the last one is gone at some time."""
    sites = VirtualSites(len(paces), min_sites=2, join_seconds=4.0)

    def body(site: int):
        model, records, marks = TwoLayers(), [], []
        outer = sites.outer_loop(site, model, on_round=records.append, **{**SETTINGS, **settings})
        outer.join()
        while outer.inner_step < steps:
            sites.sleep(paces[site])
            if site == len(paces) - 1 and sites.simulation.now >= dies:
                return records, marks, ""
            for each in model.parameters():
                each.data += 1.0
            outer.step()
            marks.append((sites.simulation.now, outer.inner_step))
        outer.finish()
        return records, marks, outer.shared_state_sha256()

    return sites.run(body)


def test_no_inner_step_waits_for_a_site_that_has_died():
    results = train((1.0, 1.0, 1.0), steps=40, dies=10.5)
    for records, marks, _ in results[:2]:
        assert [step for _, step in marks] == list(range(1, 41))
        assert [now for now, _ in marks] == pytest.approx(list(range(1, 41))), (
            "a step a second, whatever becomes of rounds"
        )
        assert max(record.seconds_quorum for record in records) == pytest.approx(4.0), "the grace"
        without = [record for record in records if len(record.contributors) == 2]
        assert len(without) >= 8 and all(record.missing == {"site2": "not in the quorum"} for record in without)
    assert results[0][2] == results[1][2] != ""


def test_with_the_other_setting_they_wait():
    results = train((1.0, 1.0, 1.0), steps=40, dies=10.5, overdue_result="wait")
    assert results[0][1][-1][0] > 42.0


def test_a_slow_site_brings_its_work_and_nobody_waits_for_it():
    results = train((1.0, 1.0, 3.1), steps=60)
    assert len({sha for _, _, sha in results}) == 1, "all end with the same bits"
    for records, marks, _ in results[:2]:
        assert all(later - before == pytest.approx(1.0) for (before, _), (later, _) in zip(marks, marks[1:]))
    brought = [record for record in results[0][0] if "site2" in record.contributors]
    assert {key for record in brought for key in record.rules} == {"params/0", "params/1"}
    assert any(record.staleness.get("site2") for record in brought)
    assert all(step == pytest.approx(now, abs=1) for now, step in results[0][1]), "the run's count is the fast sites'"
    steps = [step for _, step in results[2][1]]
    assert steps == sorted(steps) and steps[-1] >= 60 and len(steps) < 30, (
        "it takes a third of the steps and counts all"
    )


def test_sites_end_together_although_they_come_to_the_end_at_different_times():
    results = train((1.0, 1.1, 1.3), steps=30)
    assert len({sha for _, _, sha in results}) == 1
    assert all(records[-1].committed and records[-1].sites == 3 for records, _, _ in results)


def test_fragments_have_their_turn_by_what_rounds_have_brought():
    plan = resolve(SemiSyncConfig(**SETTINGS))
    commits: dict[str, int] = {}
    turns = []
    for step in range(1, 25):
        for rule in plan.due(step):
            turns.append(rule)
            assert plan.next_in_turn(commits) == [rule], "as by the steps, as long as no round fails"
            commits[plan.rules[rule].key] = commits.get(plan.rules[rule].key, 0) + 1
    assert turns == [0, 1] * 4


@pytest.mark.parametrize(
    "change",
    [{"late_work": "drop"}, {"fragment_sync_delay": 0}, {"pairing": "leader"}, {"overdue_result": "go"}],
    ids=str,
)
def test_what_it_needs_is_told(change):
    with pytest.raises(ValueError, match="overdue_result"):
        resolve(SemiSyncConfig(**{**SETTINGS, **change}))
