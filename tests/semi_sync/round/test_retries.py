"""When a round that broke is tried again."""

import pytest
import torch

from tests.semi_sync.sites import outer_loop, run_sites
from titan_ext.semi_sync.plan.schedule import StepTimer

EVERY = 20
PACES = (30, 50)
"""Milliseconds of an inner step, by site."""


def rounds_of(steps, silence, *, held_back=None, breaks=1, reloaded_at=None):
    """Rounds of two sites of which the first ``breaks`` break, and what they come to.

    Args:
        steps: inner steps.
        silence: seconds after which a site counts as dead.
        held_back: step until which the second site lets the first retry wait, whatever was agreed.
        breaks: rounds whose reduction fails at both.
        reloaded_at: step after which both go on from a checkpoint's state, their own schedule forgotten.
    """

    def body(index, own):
        model = torch.nn.Linear(3, 2, bias=False)
        model.weight.data.zero_()
        records = []
        left = [breaks]
        send = own._pg.send

        def sending(tensors, *to):
            if left[0] and tensors[0].is_floating_point() and tensors[0].numel() == model.weight.numel():
                left[0] -= 1
                own.report_error(RuntimeError("the wire broke"))
            return send(tensors, *to)

        own._pg.send = sending
        outer = outer_loop(
            model,
            [],
            own,
            method="local_sgd",
            sync_every=EVERY,
            heartbeat_timeout_seconds=silence,
            on_round=records.append,
        )
        outer._timer.take_milliseconds = lambda: PACES[index]
        outer.join()
        for step in range(1, steps + 1):
            model.weight.data += index + 1.0
            outer.step()
            if index == 1 and held_back is not None and step == EVERY:
                outer._schedule.not_before = held_back
            if step == reloaded_at:
                state = outer.state_dict()
                outer._schedule.take()
                outer.load_state_dict(state)
        outer.finish()
        return [(record.step, record.committed) for record in records], set(model.weight.detach().flatten().tolist())

    results = run_sites(2, body)
    assert results[0][1] == results[1][1], "all that was trained before the last round is in it"
    return [rounds for rounds, _ in results], results[0][1]


def test_the_sites_train_on_until_the_dead_would_be_forgotten():
    # Half a second at the pace of the slower one is ten steps.
    rounds, values = rounds_of(40, silence=0.5)
    assert rounds == [[(20, False), (30, True), (40, True)]] * 2
    assert values == {1.5 * 40}


@pytest.mark.parametrize("silence", [0.0, 10.0])
def test_no_longer_than_until_the_next_round_is_due(silence):
    rounds, values = rounds_of(40, silence=silence)
    again = [(40, True)] if silence else [(21, True), (40, True)]
    assert rounds == [[(20, False), *again]] * 2
    assert values == {1.5 * 40}


def test_what_was_put_off_is_not_forgotten_at_the_end():
    rounds, values = rounds_of(23, silence=0.5)
    assert rounds == [[(20, False), (23, True)]] * 2
    assert values == {1.5 * 23}


def test_a_checkpoint_knows_when():
    rounds, values = rounds_of(40, silence=0.5, reloaded_at=24)
    assert rounds == [[(20, False), (30, True), (40, True)]] * 2
    assert values == {1.5 * 40}


def test_again_and_again():
    rounds, values = rounds_of(60, silence=0.25, breaks=3)
    assert rounds == [[(20, False), (25, False), (30, False), (35, True), (40, True), (60, True)]] * 2
    assert values == {1.5 * 60}


def test_sites_that_come_at_different_steps_meet_again():
    """Such as when one learned the others' pace in a round that broke for another before that."""
    rounds, values = rounds_of(40, silence=0.5, held_back=24)
    assert rounds == [
        [(20, False), (30, False), (31, True), (40, True)],
        [(20, False), (24, False), (31, True), (40, True)],
    ]
    assert values == {1.5 * 40}


def test_the_pace_leaves_rounds_out():
    now = [0.0]
    timer = StepTimer(lambda: now[0])
    assert timer.take_milliseconds() == 0
    timer.stop()  # nobody knows when this step began
    timer.start()
    for seconds in (0.1, 0.3):
        now[0] += seconds
        timer.stop()
        now[0] += 5.0  # a round
        timer.start()
    assert timer.take_milliseconds() == 200 and timer.take_milliseconds() == 0
