"""Scripts written for torchft's classes, run with theirs and with ours."""

import copy
import inspect
import threading

import pytest
import torch
from torchft import local_sgd as theirs

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, manager, run_sites
from titan_ext.errors import UserError
from titan_ext.semi_sync.compat import torchft as ours

torch.manual_seed(11)
ORIGINAL = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
DATA = torch.randn(3, 40, 6, 3)


def script(
    classes,
    index,
    own,
    *,
    method="diloco",
    outer="each",
    steps=24,
    stop_at=None,
    fail=(),
    ahead=None,
    init_sync=False,
    registers=True,
    zeroes=True,
    model=None,
    at_step=lambda step: None,
    **settings,
):
    """What a user of torchft writes. Returns what there was after each inner step, the keys of the state, the context.

    Args:
        outer: an outer optimizer for each fragment, or "one" for all of them, or "whole": the model is one fragment.
        stop_at: the manager's step after which the loop ends.
        fail: votes, from 1, that fail.
        ahead: where the sites meet for two commits of the script's own before the loop.
        init_sync: whether torchft has all sites load one's state at step 0, with which one loses its first round.
        registers: whether a peer gets the model.
        zeroes: whether gradients are zeroed at each step.
    """
    own._init_sync = init_sync
    quorums = []
    start_quorum = own.start_quorum
    own.start_quorum = lambda: (quorums.append(1), start_quorum())
    model = model or copy.deepcopy(ORIGINAL)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    if registers:  # a copy: a peer may still be reading when the next inner step changes the parameters
        own.register_state_dict_fn("model", model.load_state_dict, lambda: copy.deepcopy(model.state_dict()))
    if method == "local_sgd":
        context = classes.LocalSGD(own, model, inner, **settings)
    else:
        nesterov = dict(lr=0.7, momentum=0.9, nesterov=True)
        fragments = [model] if outer == "whole" else list(model)
        parts = fragments if outer == "each" else [model]
        optimizers = [torch.optim.SGD(part.parameters(), **nesterov) for part in parts]
        context = classes.DiLoCo(own, fragments, inner, optimizers if outer == "each" else optimizers[0], **settings)
    if ahead is not None:
        own.start_quorum()
        ahead.wait()
        assert own.should_commit() and own.should_commit()
    own.fail_votes = {each + own.votes for each in fail}
    trace = []
    with context:
        for step in range(steps):
            at_step(own.current_step())
            if zeroes:
                inner.zero_grad()
            model(DATA[index, step]).square().mean().backward()
            inner.step()
            counts = (own.current_step(), own.batches_committed(), own.votes, len(quorums))
            trace.append((counts, [parameter.detach().clone() for parameter in model.parameters()]))
            if stop_at is not None and own.current_step() >= stop_at:
                break
    return trace, sorted(own._user_state_dicts), context


def assert_same(mine, torchfts):
    """Step, batches, votes and quorums after each inner step, and the parameters."""
    assert [counts for counts, _ in mine] == [counts for counts, _ in torchfts]
    for step, ((_, got), (_, want)) in enumerate(zip(mine, torchfts), 1):
        for one, other in zip(got, want):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda text: f"step {step}: {text}")


STREAMING = dict(sync_every=6, fragment_sync_delay=1, fragment_update_alpha=0.5)


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="local_sgd", sync_every=3, fail=[2]),
        dict(method="local_sgd", sync_every=3, init_sync=True),
        dict(sync_every=3, outer="whole", fail=[2, 3], zeroes=False),
        dict(sync_every=6, use_bucketization=True, bucket_cap_mb=1, pin_memory=False, init_sync=True),
        dict(STREAMING, fail=[3], zeroes=False),
        dict(STREAMING, ahead=True, init_sync=True),
        dict(STREAMING, fragment_sync_delay=2, fragment_update_alpha=1.0, backup_device=torch.device("cpu")),
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_same_script_same_numbers_after_each_step(settings):
    """Also where votes fail, where the script has commits of its own, and where torchft starts from one site's state."""
    mine, torchfts = (run_both(classes, settings) for classes in (ours, theirs))
    for own, torchft_s in zip(mine, torchfts):
        assert_same(own, torchft_s)
        assert own[-1][0][0] >= 5


def run_both(classes, settings):
    settings = {**settings, "ahead": threading.Barrier(2) if settings.get("ahead") else None}
    return run_sites(2, lambda index, own: script(classes, index, own, **settings)[0])


def test_one_outer_optimizer_for_all_fragments_steps_one_fragment():
    """With torchft it would also take the inner gradients that the other fragments hold."""
    mine, torchfts = (
        run_both(ours, dict(sync_every=6, outer="one", fail=[2])),
        run_both(theirs, dict(sync_every=6, fail=[2])),
    )
    for own, torchft_s in zip(mine, torchfts):
        assert_same(own, torchft_s)


@pytest.mark.parametrize("settings", [dict(method="local_sgd", sync_every=3), dict(STREAMING)], ids=str)
def test_a_site_that_comes_later_counts_as_with_torchft(settings):
    """Two train on with what they have; the third takes a member's state, local parameters included, and contributes."""

    def run(classes):
        may_come = Meeting()

        def before(index):
            if index == 2:
                may_come.wait()

        def body(index, own):
            waited = []

            def at_step(step):
                if index < 2 and step == 2 and not waited:
                    waited.append(may_come.arrive())
                    wait_for_requests(own.lighthouse, 1)

            return script(classes, index, own, at_step=at_step, steps=40, stop_at=6, **settings)[0]

        return run_sites(3, body, min_sites=2, before=before)

    for mine, torchfts in zip(run(ours), run(theirs)):
        assert_same(mine, torchfts)
        assert mine[-1][0][0] == 6


def test_a_site_that_died_comes_back_as_with_torchft():
    """The other one waits for it."""

    def run(classes):
        def body(index, own):
            if index == 0:
                return [script(classes, index, own, steps=40, stop_at=6, **STREAMING)[0]]
            first = script(classes, index, own, steps=40, stop_at=2, **STREAMING)[0]
            own.shutdown(wait=False)
            with manager(own.lighthouse, "back", 2) as anew:
                return [first, script(classes, index, anew, steps=40, stop_at=6, **STREAMING)[0]]

        return run_sites(2, body, heartbeat_timeout_ms=1000)

    for mine, torchfts in zip(run(ours), run(theirs)):
        for got, want in zip(mine, torchfts):
            assert_same(got, want)


def test_signatures_and_state_keys_are_torchfts():
    for name in ("LocalSGD", "DiLoCo"):
        want = inspect.signature(getattr(theirs, name)).parameters
        got = inspect.signature(getattr(ours, name)).parameters
        assert [(each.name, each.default) for each in want.values()] == [(e.name, e.default) for e in got.values()]
        public = {each for each in vars(getattr(theirs, name)) if not each.startswith("_")}
        assert all(hasattr(getattr(ours, name), each) for each in public)
    (want,) = run_sites(1, lambda index, own: script(theirs, index, own, sync_every=6)[1:])
    (got,) = run_sites(1, lambda index, own: script(ours, index, own, sync_every=6)[1:])
    assert set(got[0]) - set(want[0]) == {"titan_ext"} and set(want[0]) <= set(got[0])
    state = {key: fn() for key, fn in got[1]._manager._user_state_dicts.items()}["StreamingDiLoCoFragment_1"]
    assert set(state) == {"original_parameters", "outer_optimizer"}
    assert set(state["original_parameters"]) == {"weight", "bias"}


# -- where torchft would go wrong without a word --------------------------------------------------------


def unlike_starts(index, own, *, init_sync, registers, rounds):
    """Sites that start from 0 and from 1, whose two steps between syncs come to 2 and to 6."""
    own._init_sync = init_sync
    model = torch.nn.Linear(2, 2, bias=False)
    model.weight.data.fill_(float(index))
    if registers:
        own.register_state_dict_fn("model", model.load_state_dict, model.state_dict)
    inner, outer = torch.optim.SGD(model.parameters(), lr=1.0), torch.optim.SGD(model.parameters(), lr=1.0)
    with ours.DiLoCo(own, [model], inner, outer, sync_every=2):
        for _ in range(2 * rounds):
            model.weight.grad = torch.full((2, 2), 1.0 + 2 * index)
            inner.step()
    (value,) = set(model.weight.flatten().tolist())
    return value, own.current_step()


def test_without_a_model_in_the_state_sites_take_one_start_and_keep_their_work():
    first, second = run_sites(2, lambda *each: unlike_starts(*each, init_sync=True, registers=False, rounds=1))
    assert first == second and first in [(0.0 - 4.0, 1), (1.0 - 4.0, 1)]


def test_sites_that_would_stay_apart_are_found():
    """Without the load at step 0 torchft's replicas differ for ever; ours lose a round and are equal."""
    first, second = run_sites(2, lambda *each: unlike_starts(*each, init_sync=False, registers=True, rounds=4))
    assert first == second and first[1] == 3


def test_a_late_site_without_a_model_in_the_state_gets_the_global_parameters():
    may_come = Meeting()

    def before(index):
        if index == 1:
            may_come.wait()

    def body(index, own):
        waited = []

        def at_step(step):
            if index == 0 and step == 2 and not waited:
                waited.append(may_come.arrive())
                wait_for_requests(own.lighthouse, 1)

        settings = dict(sync_every=4, registers=False, steps=40, stop_at=5, at_step=at_step)
        context = script(ours, index, own, **settings)[2]
        momentum = context._optimizers[0].state_dict()["state"][0]["momentum_buffer"]
        return context._outer.shared_state_sha256(), momentum, context._outer.ledger.last.participants

    first, second = run_sites(2, body, min_sites=1, before=before)
    assert first[0] == second[0] and first[2] == second[2] == 2
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("init_sync", [True, False])
def test_sites_with_other_arguments_are_refused(init_sync):
    def body(index, own):
        script(ours, index, own, sync_every=6, fragment_update_alpha=0.5 * index, init_sync=init_sync)

    with pytest.raises(UserError, match="the sites differ.*: semi_sync.fragment_update_alpha is "):
        run_sites(2, body)


def test_sites_that_load_other_models_are_refused():
    def body(index, own):
        model = copy.deepcopy(ORIGINAL)

        def load_once(step):
            if step == 0:
                model[0].weight.data.fill_(float(index))

        script(ours, index, own, sync_every=6, model=model, at_step=load_once, steps=3)

    with pytest.raises(UserError, match="do not start from one model"):
        run_sites(2, body)
