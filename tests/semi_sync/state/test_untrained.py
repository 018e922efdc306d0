"""Buffers and frozen parameters, which a forward pass reads like everything else."""

import pytest
import torch
from torch import nn

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, outer_loop, run_sites
from titan_ext.errors import RunError
from titan_ext.semi_sync.state.untrained import Buffers


class Routed(nn.Module):
    """Layers with a weight and, as a router has, a bias that is no parameter; caches that a checkpoint does not keep."""

    def __init__(self, kind: torch.dtype = torch.float32, replaced: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(2))
        self._replaced = replaced
        for place, layer in enumerate(self.layers):
            layer.weight.data.fill_(float(place))
            layer.register_buffer("expert_bias", torch.zeros(5, dtype=kind))
            layer.register_buffer("cache", torch.zeros(4), persistent=False)

    def change(self, amount: float) -> None:
        for place, layer in enumerate(self.layers):
            layer.weight.data += amount
            layer.cache += amount
            if self._replaced:
                layer.expert_bias = layer.expert_bias + amount * (place + 1)
            else:
                layer.expert_bias += amount * (place + 1)

    def biases(self) -> list[set[float]]:
        return [{round(value, 4) for value in layer.expert_bias.tolist()} for layer in self.layers]


AMOUNTS = [1.0, 2.0, 6.0]  # their mean is 3


@pytest.mark.parametrize("replaced", [False, True], ids=["in place", "replaced"])
@pytest.mark.parametrize(
    "settings, steps",
    [
        (dict(method="local_sgd", sync_every=2), 4),
        (dict(method="diloco", sync_every=2), 4),
        (dict(method="diloco", sync_every=2, codec="int4"), 4),
        (dict(method="diloco", sync_every=4, num_fragments=2, fragment_sync_delay=1), 4),
        (dict(method="diloco", sync_every=2, pairing="leader"), 4),
        (dict(method="sparta", sync_every=2, settings={"sparta": {"sparta_fraction": 0.5}}), 4),
        (dict(method="diloco", sync_every=2, aggregation="median"), 4),
        (dict(method="noloco", sync_every=2), 4),
        (dict(method="eager_diloco", sync_every=2), 4),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_buffers_are_the_mean_wherever_a_forward_pass_may_read_them(settings, steps, replaced):
    def body(index, own):
        model = Routed(replaced=replaced)
        outer = outer_loop(model, [], own, outlier_threshold=0.0, **settings)
        outer.join()
        for _ in range(steps):
            model.change(AMOUNTS[index])
            outer.step()
        outer.finish()
        names = set(outer.global_parameters())
        return model.biases(), [layer.cache[0].item() for layer in model.layers], outer.shared_state_sha256(), names

    results = run_sites(3, body)
    each = 2.0 if settings.get("aggregation") == "median" else 3.0
    launched = 3 if settings.get("fragment_sync_delay") else steps  # what a late landing brings
    for index, (biases, caches, digest, names) in enumerate(results):
        assert biases == [{launched * each}, {2 * launched * each}]
        assert caches == [AMOUNTS[index] * steps] * 2, "what a checkpoint does not keep is a site's own"
        assert digest == results[0][2]
        assert {f"layers.{place}.expert_bias" for place in range(2)} <= names


def test_the_hash_tells_sites_apart_that_differ_in_a_buffer():
    def body(index, own):
        model = Routed()
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1)
        outer.join()
        model.change(AMOUNTS[index])
        outer.step()
        before = outer.shared_state_sha256()
        buffers = next(state for state in outer._states if isinstance(state, Buffers))
        buffers.global_flat[0] += 1e-6
        return before, outer.shared_state_sha256(), outer._committer.checksum._parts.keys()

    for before, after, keys in run_sites(1, body):
        assert before != after and "buffers/0" in keys


def test_a_newcomer_gets_buffers_and_frozen_parameters():
    meeting = Meeting()

    def body(index, own):
        model = Routed()
        model.frozen = nn.Parameter(torch.full((4,), 0.1 if index < 2 else 7.0), requires_grad=False)
        outer = outer_loop(model, [], own, method="diloco", sync_every=2)
        outer.join()
        at_first = model.biases(), set(model.frozen.tolist())
        while outer.inner_step < 12:
            if index == 0 and outer.inner_step == 3:
                meeting.arrive()
                wait_for_requests(own.lighthouse, 2)
            model.change(AMOUNTS[index])
            outer.step()
        return at_first, model.biases(), outer.shared_state_sha256(), set(model.frozen.tolist())

    results = run_sites(3, body, min_sites=2, before=lambda index: meeting.wait() if index == 2 else None)
    (biases, frozen), *_ = results[2]
    assert biases != [{0.0}, {0.0}] and frozen == {torch.tensor(0.1).item()}
    assert len({str(each[1:]) for each in results}) == 1


@pytest.mark.parametrize("scopes", [[], [{"name": "own", "parameters": ["layers.1.*"], "shared": "local"}]])
def test_a_scope_that_stays_at_its_site_keeps_its_buffers(scopes):
    from titan_ext.semi_sync import ScopeConfig

    def body(index, own):
        model = Routed()
        outer = outer_loop(
            model, [], own, method="local_sgd", sync_every=1, scopes=[ScopeConfig(**each) for each in scopes]
        )
        outer.join()
        model.change(AMOUNTS[index])
        outer.step()
        return model.biases()

    for index, biases in enumerate(run_sites(3, body)):
        assert biases == [{3.0}, {2 * AMOUNTS[index]} if scopes else {6.0}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_buffers_of_another_type(dtype):
    def body(index, own):
        model = Routed(dtype)
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1)
        outer.join()
        model.change(AMOUNTS[index])
        outer.step()
        return model.biases(), model.layers[0].expert_bias.dtype

    assert run_sites(3, body) == [([{3.0}, {6.0}], dtype)] * 3


def test_counts_stay_at_their_site_and_are_named(caplog):
    def body(index, own):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1)
        outer.join()
        for _ in range(index + 1):
            model(torch.full((4, 2), float(index)) + torch.arange(4.0)[:, None])
        outer.step()
        return model[1].num_batches_tracked.item(), model[1].running_mean.clone()

    (one, mean), (two, other) = run_sites(2, body)
    assert (one, two) == (1, 2) and torch.equal(mean, other)
    assert "1.num_batches_tracked is no floating-point tensor" in caplog.text


FROZEN_METHODS = [
    dict(method="local_sgd", sync_every=2),
    dict(method="diloco", sync_every=2, codec="int8"),
    dict(method="diloco", sync_every=2, num_fragments=2),
    dict(method="local_adam", sync_every=2),
    dict(method="diloco", sync_every=2, pairing="leader"),
]


@pytest.mark.parametrize("settings", FROZEN_METHODS, ids=lambda each: "-".join(map(str, each.values())))
def test_frozen_parameters_do_not_travel_and_keep_their_bits(settings):
    """A mean of equal values need not be that value, and costs bytes."""
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(1000, generator=generator)

    def trained(freeze):
        def body(index, own):
            model = nn.Module()
            model.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
            for layer in model.layers:
                layer.weight.data.zero_()
            if freeze:
                model.layers[0].base = nn.Parameter(value.clone(), requires_grad=False)
            optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.1)
            outer = outer_loop(model, optimizer, own, **settings)
            outer.join()
            for step in range(4):
                for layer in model.layers:
                    layer.weight.grad = torch.full((4, 4), float(index - step))
                optimizer.step()
                outer.step()
            kept = model.layers[0].base.detach() if freeze else None
            return model.layers[1].weight.detach(), outer.ledger.bytes_sent, outer.shared_state_sha256(), kept

        return run_sites(3, body)

    with_frozen, without = trained(True), trained(False)
    for (weight, sent, digest, kept), (expected, expected_sent, other, _) in zip(with_frozen, without):
        assert torch.equal(kept, value)
        assert torch.equal(weight, expected) and sent == expected_sent
        assert digest == with_frozen[0][2] != other, "the hash covers them"


def test_frozen_parameters_that_differ_are_found():
    def body(index, own):
        model = nn.Linear(2, 2)
        model.bias.requires_grad_(False).fill_(float(index == 2))
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1)
        outer.join()
        for _ in range(4):
            model.weight.data += 1
            outer.step()
        return model.bias.tolist(), outer.shared_state_sha256()

    results = run_sites(3, body)
    assert all(result == results[0] for result in results) and results[0][0] == [0.0, 0.0]


def test_thawing_after_the_outer_loop_is_built_is_refused():
    def body(index, own):
        model = nn.Linear(2, 2)
        model.bias.requires_grad_(False)
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1)
        outer.join()
        outer.step()
        model.bias.requires_grad_(True)
        with pytest.raises(RunError, match="bias was frozen when the outer loop was built and is trained now"):
            outer.step()

    run_sites(1, body)
