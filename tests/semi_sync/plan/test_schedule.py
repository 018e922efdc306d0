"""The schedule of one site: what waits for a round, what is tried again, and what is forgotten."""

import pytest

from titan_ext.semi_sync import Average, SyncPlan, SyncRule
from titan_ext.semi_sync.plan.schedule import Schedule, StepTimer


def schedule(*rules: SyncRule) -> Schedule:
    return Schedule(SyncPlan(rules=rules))


def rule(period: int, name: str, **fields: object) -> SyncRule:
    return SyncRule(period=period, name=name, apply=Average(), **fields)


@pytest.fixture
def plan() -> Schedule:
    """Rule 0 every 2 steps, rule 1 every 3 and not tried again, rule 2 once at the end."""
    return schedule(rule(2, "even"), rule(3, "third", retry=False), rule(1, "last", final=True))


def test_what_is_due_waits_until_it_is_taken(plan):
    taken = {}
    for step in range(1, 13):
        plan.advance(step)
        if plan.is_ready(step):
            taken[step] = plan.take()
    assert taken == {
        step: [index for index, period in enumerate((2, 3)) if step % period == 0]
        for step in range(1, 13)
        if step % 2 == 0 or step % 3 == 0
    }


def test_rules_that_are_due_twice_wait_once(plan):
    for step in range(1, 7):
        plan.advance(step)
    assert plan.take() == [0, 1]
    assert plan.take() == [] and not plan.is_ready(7)


def test_a_failed_round_is_tried_again_without_the_rules_that_wait_for_their_next_turn(plan):
    plan.advance(6)
    plan.again(plan.take())
    assert plan.pending == [0]
    plan.advance(9)
    assert plan.pending == [0, 1]


def test_what_failed_first_travels_first():
    plan = schedule(rule(2, "first"), rule(3, "second"))
    plan.advance(3)
    failed = plan.take()
    plan.advance(4)
    plan.again(failed)
    assert plan.pending == [1, 0]


def test_a_round_that_is_put_off_comes_at_its_step_or_with_the_next_that_is_due(plan):
    plan.again([0])
    plan.not_before = 8
    assert [step for step in range(5, 10) if plan.is_ready(step)] == [8, 9]
    plan.advance(6)
    assert plan.is_ready(6) and plan.not_before == 0


def test_taking_forgets_that_a_round_was_put_off(plan):
    plan.again([0])
    plan.not_before = 100
    assert plan.take() == [0]
    plan.again([0])
    assert plan.is_ready(1)


def test_final_rules_come_once_and_last(plan):
    assert plan.finish(10) and plan.take() == [2]
    assert not plan.finish(10) and plan.pending == []


def test_the_end_sees_to_what_was_put_off():
    plan = schedule(rule(4, "only"))
    plan.again([0])
    assert not plan.finish(5), (
        "what only waits was refused by a vote at the last step; there is no step to try it after"
    )
    plan = schedule(rule(4, "only"))
    plan.again([0])
    plan.not_before = 9
    assert plan.finish(5) and plan.take() == [0]


def test_a_healed_site_waits_for_what_its_peer_waits_for(plan):
    plan.advance(2)
    plan.replace([1, 0])
    assert plan.pending == [0], "the rule that is not tried again does not wait either"


def test_a_committed_round_settles_its_rules_alone(plan):
    plan.advance(6)
    plan.settle([1])
    assert plan.pending == [0]
    assert plan.beside([1]) == [1, 0] and plan.beside([0]) == [0]


def test_keys_outlive_another_order():
    before = schedule(rule(2, "a"), rule(3, "b"), rule(6, "c"))
    after = schedule(rule(6, "c"), rule(2, "a"), rule(3, "b"))
    assert after.indices(before.keys([2, 0])) == [0, 1]
    assert after.indices(["gone/0", *before.keys([1])]) == [2], (
        "a rule that another plan does not have waits for nothing"
    )


def test_the_mean_time_of_a_step():
    now = [0.0]
    timer = StepTimer(lambda: now[0])
    timer.stop()  # the first step began before anybody looked
    for seconds in (0.5, 0.25):
        timer.start()
        now[0] += seconds
        timer.stop()
        now[0] += 10  # a round, which is no step
    assert timer.take_milliseconds() == 375
    assert timer.take_milliseconds() == 0
    timer.start()
    now[0] += 0.0001
    timer.stop()
    assert timer.take_milliseconds() == 1, "0 would say that it has taken no step"
