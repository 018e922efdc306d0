"""Scripts for torchft's classes whose manager is a mock, as in torchft's own tests."""

import copy
from unittest.mock import MagicMock, create_autospec

import pytest
import torch
from torchft import local_sgd as theirs
from torchft.manager import Manager, WorldSizeMode
from torchft.work import _DummyWork

from titan_ext.semi_sync.compat import torchft as ours

torch.manual_seed(12)
ORIGINAL = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
DATA = torch.randn(12, 6, 3)
WATCHED = ("start_quorum", "allreduce", "should_commit", "allow_state_dict_read", "disallow_state_dict_read")


def mock(*, factor=None, bare=False, votes=None, **attributes):
    """A mock of the manager; with ``factor`` its all-reduce multiplies, and ``votes`` are its answers in turn."""
    own = create_autospec(Manager)
    own._use_async_quorum = False
    own.current_step.return_value = 0
    if not bare:
        own.errored.return_value = None
        own.should_commit.return_value = True

    def allreduce(tensor, should_quantize=False):
        tensor.mul_(factor)
        return _DummyWork(tensor)

    if factor is not None:
        own.allreduce.side_effect = allreduce
    own.should_commit.side_effect = votes
    for name, value in attributes.items():
        setattr(own, name, value)
    return own


def train(classes, own, *, steps=8, each=lambda context: None, **settings):
    """Train with a mock; returns the parameters after each step and what was asked of the mock."""
    model = copy.deepcopy(ORIGINAL)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    if settings.pop("local_sgd", False):
        context = classes.LocalSGD(own, model, inner, **settings)
    else:
        outer = [torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True) for part in model]
        context = classes.DiLoCo(own, list(model), inner, outer, **settings)
    trace = []
    with context:
        for step in range(steps):
            model(DATA[step]).square().mean().backward()  # gradients add up, as in torchft's tests
            inner.step()
            each(context)
            trace.append([parameter.detach().clone() for parameter in model.parameters()])
    asked = [
        (name, [tuple(tensor.shape) for tensor in arguments], options)
        for name, arguments, options in own.method_calls
        if name in WATCHED
    ]
    return trace, asked


@pytest.mark.parametrize(
    "settings",
    [
        dict(local_sgd=True, sync_every=2),
        dict(sync_every=4),
        dict(sync_every=4, should_quantize=True),
        dict(sync_every=4, fragment_sync_delay=1, fragment_update_alpha=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "answers",
    [dict(factor=1), dict(factor=2), dict(bare=True), dict(factor=1, votes=[True, False, False, True])],
    ids=["mean", "doubled", "bare", "failed votes"],
)
def test_a_mock_is_asked_the_same_and_gives_the_same(settings, answers):
    (got, got_calls), (want, want_calls) = (train(classes, mock(**answers), **settings) for classes in (ours, theirs))
    if settings.get("fragment_sync_delay"):  # ours reduce on another thread, beside the inner step
        got_calls, want_calls = (sorted(calls, key=lambda call: call[0]) for calls in (got_calls, want_calls))
    assert got_calls == want_calls
    for mine, torchfts in zip(got, want, strict=True):
        for one, other in zip(mine, torchfts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_bucketization_asks_a_mock_less_often():
    own = mock(factor=1)
    train(ours, own, sync_every=4, use_bucketization=True)
    assert own.allreduce.call_count == own.should_commit.call_count == 4  # one buffer for each sync


def test_local_sgd_syncs_when_told():
    own = mock(factor=1)
    train(ours, own, local_sgd=True, sync_every=3, steps=6, each=lambda context: context.sync())
    assert own.should_commit.call_count == 6


def test_an_error_that_a_mock_tells_of_leaves_the_round_out():
    traces = []
    for classes in (ours, theirs):
        own = mock(factor=1, votes=[False] * 4)
        own.errored.return_value = RuntimeError("told")
        traces.append(train(classes, own, sync_every=4)[0])
    for mine, torchfts in zip(*traces, strict=True):
        for one, other in zip(mine, torchfts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_mock_without_specification_will_do():
    own = MagicMock()
    own._use_async_quorum = False
    own.current_step.return_value = 0
    train(ours, own, sync_every=4)
    assert own.start_quorum.call_count == 4


# -- arguments -----------------------------------------------------------------------------------------


def diloco(own=None, *, fragments=None, outer=None, **settings):
    model = copy.deepcopy(ORIGINAL)
    fragments = list(model) if fragments is None else fragments(model)
    outers = outer(model) if outer else [torch.optim.SGD(part.parameters(), lr=0.7) for part in fragments]
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    return ours.DiLoCo(own or mock(), fragments, inner, outers, **{"sync_every": 6, **settings})


def sgd(*modules):
    return torch.optim.SGD([each for module in modules for each in module.parameters()], lr=0.7)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (dict(sync_every=5), "sync_every"),
        (dict(sync_every=1), "sync_every"),
        (dict(sync_every=0), "sync_every = 0"),
        (dict(sync_every=None), "sync_every = None"),
        (dict(sync_every=6.0), "sync_every = 6.0"),
        (dict(fragment_sync_delay=3), "fragment_sync_delay = 3"),
        (dict(fragment_sync_delay=-1), "fragment_sync_delay = -1"),
        (dict(fragment_update_alpha=1.5), "fragment_update_alpha = 1.5"),
        (dict(fragment_update_alpha=-0.5), "fragment_update_alpha = -0.5"),
        (dict(bucket_cap_mb=0), "bucket_mib = 0"),
        (dict(backup_device=torch.device("meta")), "backup_device = 'meta'"),
        (dict(fragments=lambda model: []), "model_fragments = "),
        (dict(outer=lambda model: [sgd(model)]), "1 optimizers for 2 model fragments"),
        (dict(outer=lambda model: [sgd(model), sgd(model[1])]), r"outer_optimizer\[0\]"),
        (dict(outer=lambda model: sgd(model, torch.nn.Linear(2, 2))), "outer_optimizer: "),
        (dict(fragments=lambda model: [model, model[1]]), r"1.weight is in|weight is in model_fragments\[0\] already"),
        (dict(own=mock(_use_async_quorum=True)), "use_async_quorum=False"),
        (dict(own=mock(_replica_world_size_mode=WorldSizeMode.FIXED_WITH_SPARES)), "WorldSizeMode.DYNAMIC"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_what_is_not_supported_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        diloco(**arguments)


@pytest.mark.parametrize("sync_every", [0, -2, None, 2.5])
def test_local_sgd_needs_a_period(sync_every):
    model = copy.deepcopy(ORIGINAL)
    with pytest.raises(ValueError, match="sync_every"):
        ours.LocalSGD(mock(), model, sgd(model), sync_every)


def test_where_the_global_copy_lives_may_be_a_name():
    assert diloco(backup_device="cpu")._outer.global_parameters()["0.weight"].device.type == "cpu"
