"""Joining, falling behind and failed votes, with a real lighthouse."""

import pytest
import torch

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, outer_loop, run_sites
from titan_ext.errors import UserError
from titan_ext.semi_sync.plan.scopes import ScopeConfig


def one_weight(value: float) -> torch.nn.Module:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.full((3,), value))
    return model


def advance(model: torch.nn.Module, amount: float) -> None:
    model.weight.data.add_(amount)


def test_joining_brings_all_sites_to_one_start():
    def body(index, own):
        model = one_weight(float(index))
        outer = outer_loop(model, [], own, method="diloco", sync_every=2)
        outer.join()
        return model.weight.tolist(), outer.shared_state_sha256()

    results = run_sites(3, body)
    assert len({str(result) for result in results}) == 1
    assert results[0][0][0] in (0.0, 1.0, 2.0)


@pytest.mark.parametrize("delay", [0, 1])
def test_late_site_takes_over_state_and_round(delay):
    """The newcomer gets parameters, momentum, clock and the round under way, and dilutes nothing."""
    settings = dict(method="diloco", sync_every=3, fragment_sync_delay=delay)
    newcomer_may_come = Meeting()

    def before(index):
        if index == 1:
            newcomer_may_come.wait()

    def body(index, own):
        records = []
        model = one_weight(1.0 if index == 0 else 50.0)
        outer = outer_loop(model, [], own, on_round=records.append, **settings)
        outer.join()
        joined_at = outer.inner_step
        while outer.inner_step < 12:
            if index == 0 and outer.inner_step == 6:
                newcomer_may_come.arrive()
                wait_for_requests(own.lighthouse, 1)
            advance(model, -0.1 if index == 0 else -0.3)
            outer.step()
        outer.finish()
        return joined_at, records, outer.shared_state_sha256(), model.weight.tolist(), outer.rounds

    first, second = run_sites(2, body, min_sites=1, before=before)
    assert first[2] == second[2]
    assert first[3] == second[3] or delay
    assert first[4] == second[4] == 4
    assert second[0] == 9 - delay
    joining = next(record for record in first[1] if record.sites == 2)
    assert joining.participants == 1 and joining.committed
    assert all(record.participants == record.sites for record in first[1] if record.step > joining.step)


def test_vote_that_fails_everywhere_keeps_local_work_and_is_tried_again():
    def body(index, own):
        own.fail_votes = {2}  # the first vote is that of joining
        records = []
        model = one_weight(0.0)
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=2, on_round=records.append)
        outer.join()
        for _ in range(3):
            advance(model, 1.0 + index)
            outer.step()
        return model.weight.tolist(), [(r.step, r.committed, r.error) for r in records]

    results = run_sites(2, body)
    for weights, rounds in results:
        assert weights == [4.5] * 3  # mean of three steps of 1 and three steps of 2
        assert [(step, committed) for step, committed, _ in rounds] == [(2, False), (3, True)]
        assert rounds[0][2]


def test_site_whose_vote_alone_failed_rejoins_at_the_others_point():
    def body(index, own):
        own.fail_votes = {2} if index == 1 else set()
        records = []
        model = one_weight(0.0)
        outer = outer_loop(model, [], own, method="diloco", sync_every=2, on_round=records.append)
        outer.join()
        while outer.inner_step < 6:
            advance(model, 1.0 + index)
            outer.step()
        return outer.shared_state_sha256(), model.weight.tolist(), records

    first, second = run_sites(2, body)
    assert first[0] == second[0] and first[1] == second[1]
    assert any(record.healed for record in second[2])
    assert [record.participants for record in first[2]] == [2, 1, 2]


@pytest.mark.parametrize(
    "theirs, named",
    [
        (dict(sync_every=4), "semi_sync.sync_every is 2 at site0, 4 at site1"),
        (dict(outer_lr=0.5), "semi_sync.outer_lr is 0.7 at site0, 0.5 at site1"),
        (dict(method="local_sgd"), 'semi_sync.method is "diloco" at site0, "local_sgd" at site1'),
        (
            dict(codec="topk", settings={"topk": {"density": 0.5}}),
            "semi_sync.topk.density is not set at site0, 0.5 at site1",
        ),
        (
            dict(scopes=[ScopeConfig(name="own", parameters=["bias"], sync_every=6)]),
            "semi_sync.scopes[0].sync_every is",
        ),
        (dict(must_agree={"training.steps": 9}), "training.steps is not set at site0, 9 at site1"),
    ],
)
def test_sites_that_differ_are_told_by_key_in_what_at_every_site(theirs, named):
    """And nothing beside, such as what only follows from it."""

    def body(index, own):
        settings = dict(method="diloco", sync_every=2) | (theirs if index else {})
        outer = outer_loop(torch.nn.Linear(2, 3), [], own, name=f"site{index}", **settings)
        with pytest.raises(UserError) as caught:
            outer.join()
        return str(caught.value)

    for message in run_sites(2, body):
        assert named in message and "rule" not in message


def test_models_of_other_shape_are_refused():
    def body(index, own):
        model = torch.nn.Linear(2 + index, 3)
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=2)
        with pytest.raises(UserError, match="model"):
            outer.join()

    run_sites(2, body)


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="diloco", sync_every=4),
        dict(method="local_sgd", sync_every=4),
        dict(method="diloco", sync_every=4, fragment_sync_delay=2, fragment_update_alpha=0.5),
    ],
    ids=["diloco", "local_sgd", "overlapped"],
)
@pytest.mark.parametrize("stop_at", [3, 4, 6])
def test_stop_and_resume_equals_never_stopped(settings, stop_at):
    def steps(model, outer, index, upto):
        while outer.inner_step < upto:
            advance(model, 0.1 * (index + 1) * (outer.inner_step + 1))
            outer.step()

    def straight(index, own):
        model = one_weight(1.0)
        outer = outer_loop(model, [], own, **settings)
        outer.join()
        steps(model, outer, index, 11)
        outer.finish()
        return model.weight.clone(), outer.shared_state_sha256()

    def interrupted(index, own):
        model = one_weight(1.0)
        outer = outer_loop(model, [], own, **settings)
        outer.join()
        steps(model, outer, index, stop_at)
        saved = outer.state_dict()
        return copy_tensors(saved), model.weight.detach().clone()

    def resumed(index, own):
        state, weight = saved[index]
        model = one_weight(0.0)
        outer = outer_loop(model, [], own, **settings)
        outer.load_state_dict(state)
        model.weight.data.copy_(weight)
        outer.join()
        steps(model, outer, index, 11)
        outer.finish()
        return model.weight.clone(), outer.shared_state_sha256()

    want = run_sites(2, straight)
    saved = run_sites(2, interrupted)
    got = run_sites(2, resumed)
    for (weight, digest), (weight_again, digest_again) in zip(want, got):
        assert torch.equal(weight, weight_again)
        assert digest == digest_again


def copy_tensors(value):
    if isinstance(value, dict):
        return {key: copy_tensors(each) for key, each in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value
