"""Scripts written for torchft's classes, run with theirs and with ours."""

import copy
import inspect

import pytest
import torch
from torchft import local_sgd as theirs

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, run_sites
from titan_ext.semi_sync.compat import torchft as ours

torch.manual_seed(11)
ORIGINAL = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
DATA = torch.randn(2, 40, 6, 3)


def script(classes, index, own, *, steps=24, fail=(), **settings):
    """What a user of torchft writes."""
    own.fail_votes = set(fail)
    own._init_sync = False  # both start from the same weights; torchft would drop one site's first round
    model = copy.deepcopy(ORIGINAL)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    if settings.pop("method", "diloco") == "local_sgd":
        own.register_state_dict_fn("model", model.load_state_dict, model.state_dict)  # torchft leaves it to the script
        context = classes.LocalSGD(own, model, inner, **settings)
    else:
        outer = [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True) for part in model]
        outer = outer[0] if settings.pop("one_fragment", False) else outer
        fragments = [model] if not isinstance(outer, list) else list(model)
        if not isinstance(outer, list):
            outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        context = classes.DiLoCo(own, fragments, inner, outer, **settings)
    with context:
        for step in range(steps):
            inner.zero_grad()
            model(DATA[index, step]).square().mean().backward()
            inner.step()
    return [parameter.detach().clone() for parameter in model.parameters()], sorted(own._user_state_dicts), context


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="local_sgd", sync_every=4),
        dict(sync_every=6),
        dict(sync_every=6, one_fragment=True),
        dict(sync_every=6, fragment_sync_delay=1, fragment_update_alpha=0.5),
        dict(sync_every=6, use_bucketization=True, bucket_cap_mb=1),
    ],
    ids=["local_sgd", "fragments", "whole", "overlapped", "buckets"],
)
def test_same_script_same_numbers(settings):
    want = run_sites(2, lambda index, own: script(theirs, index, own, **dict(settings)))
    got = run_sites(2, lambda index, own: script(ours, index, own, **dict(settings)))
    for (mine, _, _), (torchft_value, _, _) in zip(got, want):
        for one, other in zip(mine, torchft_value):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_signatures_and_state_keys_are_torchfts():
    for name in ("LocalSGD", "DiLoCo"):
        want = inspect.signature(getattr(theirs, name)).parameters
        got = inspect.signature(getattr(ours, name)).parameters
        assert [(each.name, each.default) for each in want.values()] == [(e.name, e.default) for e in got.values()]
    (want,) = run_sites(1, lambda index, own: script(theirs, index, own, sync_every=6)[1:])
    (got,) = run_sites(1, lambda index, own: script(ours, index, own, sync_every=6)[1:])
    assert set(want[0]) <= set(got[0])
    state = {key: fn() for key, fn in got[1]._manager._user_state_dicts.items()}["StreamingDiLoCoFragment_1"]
    assert set(state) == {"original_parameters", "outer_optimizer"}
    assert set(state["original_parameters"]) == {"weight", "bias"}


def test_failed_commit_brings_the_global_parameters_back():
    """As torchft: the round's local work is gone, and the next round counts in full."""

    def values(classes, votes):
        results = run_sites(
            2, lambda index, own: script(classes, index, own, steps=9, fail=votes, sync_every=3, one_fragment=True)
        )
        return results[0][0]

    for mine, torchft_value in zip(values(ours, {2}), values(theirs, {2})):
        torch.testing.assert_close(mine, torchft_value, rtol=1e-5, atol=1e-6)


def test_late_site_is_healed_through_torchfts_keys():
    may_come = Meeting()

    def before(index):
        if index == 1:
            may_come.wait()

    def body(index, own):
        model = copy.deepcopy(ORIGINAL)
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        outer = [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True) for part in model]
        with ours.DiLoCo(own, list(model), inner, outer, sync_every=4) as context:
            while context._outer.inner_step < 20:
                if index == 0 and context._outer.inner_step == 6:
                    may_come.arrive()
                    wait_for_requests(own.lighthouse, 1)
                inner.zero_grad()
                model(DATA[index, context._outer.inner_step]).square().mean().backward()
                inner.step()
        momentum = [outer[0].state_dict()["state"][0]["momentum_buffer"]]
        return context._outer.shared_state_sha256(), momentum, context._outer.ledger.last.participants

    first, second = run_sites(2, body, min_sites=1, before=before)
    assert first[0] == second[0] and first[2] == second[2] == 2
    assert torch.equal(first[1][0], second[1][0])


def test_asynchronous_quorum_is_refused():
    def body(index, own):
        own._use_async_quorum = True
        with pytest.raises(ValueError, match="use_async_quorum=False"):
            ours.LocalSGD(own, copy.deepcopy(ORIGINAL), torch.optim.SGD(ORIGINAL.parameters(), lr=0.1), 2)

    run_sites(1, body)
