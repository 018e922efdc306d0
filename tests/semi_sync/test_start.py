"""What a run starts from: a model that was loaded, by whatever way, is never lost."""

import pytest
import torch

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, run_sites
from tests.semi_sync.test_membership import advance, one_weight
from titan_ext.errors import UserError
from titan_ext.semi_sync import SemiSync, SiteOptions, SiteRanks

METHODS = [
    dict(method="local_sgd", sync_every=2),
    dict(method="diloco", sync_every=2),
    dict(method="diloco", sync_every=4, fragment_sync_delay=1, fragment_update_alpha=0.5),
    dict(method="diloco", sync_every=2, outer_optimizer="adam", outer_lr=0.1),
    dict(method="diloco", sync_every=2, codec="int8"),
    dict(method="eager_diloco", sync_every=2),
    dict(method="noloco", sync_every=2),
    dict(method="sparta", sync_every=2, settings={"sparta": {"sparta_fraction": 0.5}}),
]


def built(index, own, **settings):
    """A random model of the site's own, and an outer loop that has seen it."""
    model = one_weight(100.0 + index)
    outer = SemiSync.Config(**settings).build(
        model_parts=[model],
        optimizers=[],
        manager=own,
        site=SiteOptions(name=f"site{index}", ranks=SiteRanks(alone=True)),
    )
    return model, outer


@pytest.mark.parametrize("settings", METHODS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_a_model_loaded_after_the_loop_was_built_is_what_it_starts_from(settings):
    """Sites that then stand still stay at the loaded values, bit for bit, through several rounds."""

    def body(index, own):
        model, outer = built(index, own, **settings)
        model.load_state_dict({"weight": torch.tensor([1.0, 2.0, 3.0])})
        outer.join()
        start = outer.global_parameters()["weight"].tolist()
        for _ in range(8):
            outer.step()
        outer.finish()
        return start, model.weight.tolist(), outer.global_parameters()["weight"].tolist(), outer.rounds

    for start, local, shared, rounds in run_sites(2, body):
        assert start == local == shared == [1.0, 2.0, 3.0]
        assert rounds >= 2


def test_the_first_pseudo_gradient_is_measured_from_the_loaded_model():
    def body(index, own):
        model, outer = built(index, own, method="diloco", sync_every=2, outer_lr=1.0, outer_momentum=0.0)
        model.weight.data.fill_(4.0)
        outer.join()
        for _ in range(2):
            advance(model, -0.25 * (index + 1))
            outer.step()
        return model.weight.tolist()

    assert run_sites(2, body) == [[4.0 - 0.75] * 3] * 2


def refusal(loads):
    """Of sites that begin together, each from what ``loads`` gives it; None is its own random model."""

    def body(index, own):
        model, outer = built(index, own, method="diloco", sync_every=2)
        if loads[index] is not None:
            model.weight.data.fill_(loads[index])
        try:
            outer.join()
        except UserError as error:
            return str(error)
        return None

    return run_sites(len(loads), body, min_sites=len(loads))


@pytest.mark.parametrize("loads", [(1.0, 2.0), (1.0, None)], ids=["two models", "one model"])
def test_sites_that_start_from_different_models_are_refused_by_name(loads):
    for told in refusal(loads):
        assert "do not start from one model" in told and "site0: loaded model" in told and "site1: " in told
        assert "checkpoint.initial_load_path" in told
        assert ("site1: random initialisation" in told) == (loads[1] is None)


def test_what_was_loaded_before_the_loop_was_built_counts_if_said():
    def body(index, own):
        _, outer = built(index, own, method="diloco", sync_every=2)
        with pytest.raises(UserError, match="do not start from one model"):
            outer.join(loaded=True)

    run_sites(2, body)


def late(load):
    """A run that begins from a loaded model and a site that comes later; what came of both."""
    may_come = Meeting()

    def before(index):
        if index == 1:
            may_come.wait()

    def body(index, own):
        model, outer = built(index, own, method="diloco", sync_every=2)
        value = 1.0 if index == 0 else load
        if value is not None:
            model.weight.data.fill_(value)
        try:
            outer.join()
        except UserError as error:
            return str(error)
        while outer.inner_step < 8:
            if index == 0 and outer.inner_step == 4:
                may_come.arrive()
                wait_for_requests(own.lighthouse, 1)
            outer.step()
        return model.weight.tolist()

    return run_sites(2, body, min_sites=1, before=before)


@pytest.mark.parametrize("load", [1.0, None], ids=["the same model", "a random one"])
def test_a_site_that_joins_a_run_takes_the_state_that_came_of_the_loaded_model(load):
    assert late(load) == [[1.0] * 3] * 2


def test_a_site_with_another_loaded_model_does_not_join():
    member, told = late(2.0)
    assert member == [1.0] * 3
    assert "do not start from one model" in told and "site1: loaded model" in told


def test_what_a_checkpoint_restored_is_not_taken_from_the_parameters():
    """In the middle of an inner phase the global copy and the local parameters differ."""

    def body(index, own):
        model, outer = built(index, own, method="diloco", sync_every=2)
        state = outer.state_dict()
        state["states"]["params/0"]["weight"]["global"].fill_(7.0)
        model.weight.data.fill_(5.0)
        outer.load_state_dict(state)
        outer.join()
        return outer.global_parameters()["weight"].tolist(), model.weight.tolist()

    for shared, _ in run_sites(2, body):
        assert shared == [7.0] * 3


def test_the_origin_of_a_run_is_part_of_its_checkpoint():
    """One site resumes; the other has lost its folder and loads another model than the run began from."""

    def first(index, own):
        model, outer = built(index, own, method="diloco", sync_every=2)
        model.weight.data.fill_(3.0)
        outer.join()
        return outer.state_dict()

    saved = run_sites(2, first)[0]

    def again(load):
        def body(index, own):
            model, outer = built(index, own, method="diloco", sync_every=2)
            if index == 0:
                outer.load_state_dict(saved)
            else:
                model.weight.data.fill_(load)
            outer.join()

        run_sites(2, body)

    with pytest.raises(UserError, match=r"site0: loaded model \w+, site1: loaded model"):
        again(4.0)
    again(3.0)
