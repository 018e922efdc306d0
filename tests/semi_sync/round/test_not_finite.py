"""A site whose work is not finite is left out, and comes back whole: parameters, moments, every fragment."""

import math

import pytest
import torch

from tests.semi_sync.sites import outer_loop, run_sites
from titan_ext.errors import RunError

METHODS = {
    "local_sgd": dict(method="local_sgd", sync_every=2),
    "diloco": dict(method="diloco", sync_every=2),
    "in flight": dict(method="diloco", sync_every=2, fragment_sync_delay=1),
    "mixed": dict(method="diloco", sync_every=2, fragment_sync_delay=1, fragment_update_alpha=0.5),
    "streaming": dict(method="diloco", sync_every=4, num_fragments=2),
    "local_adam": dict(method="local_adam", sync_every=2),
    "des_loc": dict(
        method="des_loc",
        sync_every=2,
        settings={"des_loc": {"first_moment_sync_every": 4, "second_moment_sync_every": 8}},
    ),
    "sparta": dict(method="sparta", sync_every=4, settings={"sparta": {"sparta_fraction": 0.5}}),
    "eager_diloco": dict(method="eager_diloco", sync_every=2),
    "eager, streaming": dict(method="eager_diloco", sync_every=4, num_fragments=2),
    "noloco": dict(method="noloco", sync_every=2),
    "noloco, streaming": dict(method="noloco", sync_every=4, num_fragments=2),
    "int8": dict(method="diloco", sync_every=2, codec="int8", error_feedback=True),
}


def network() -> torch.nn.Module:
    """Two layers, so that what is broken in one reaches the other; layers are what fragments are made of."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleDict({"0": torch.nn.Linear(3, 4), "1": torch.nn.Linear(4, 1)})
    return model


def inner_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int, scale: float = 1.0) -> float:
    batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)) * scale
    loss = model.layers["1"](torch.tanh(model.layers["0"](batch))).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_one_bad_batch_does_not_break_a_site_for_good(settings, bad):
    def body(index, own):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        outer = outer_loop(model, optimizer, own, **settings)
        outer.join()
        losses = []
        for step in range(1, 17):
            losses.append(inner_step(model, optimizer, 100 * index + step, bad if index == 1 and step == 3 else 1.0))
            outer.step()
        outer.finish()
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return losses, [*model.parameters(), *moments], outer.shared_state_sha256()

    (good, *_), (broken, tensors, digest) = results = run_sites(2, body)
    assert all(map(math.isfinite, good)), "the others never see it"
    assert not math.isfinite(broken[2]) and all(map(math.isfinite, broken[-4:]))
    assert all(torch.isfinite(value).all() for value in tensors)
    assert digest == results[0][2]


def test_a_site_that_is_never_finite_is_left_out_for_ever():
    def body(index, own):
        model, records = network(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        outer = outer_loop(model, optimizer, own, method="local_sgd", sync_every=1, on_round=records.append)
        outer.join()
        for step in range(1, 9):
            inner_step(model, optimizer, step, math.nan if index else 1.0)
            outer.step()
        return [record.participants for record in records], outer.shared_state_sha256()

    (counts, digest), other = run_sites(2, body)
    assert counts == [1] * 8 and other == (counts, digest)


@pytest.mark.parametrize("sites", [1, 2])
def test_where_no_site_is_finite_any_more_the_run_ends_with_the_reason(sites):
    def body(index, own):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        outer = outer_loop(model, optimizer, own, method="diloco", sync_every=1)
        outer.join()
        for step in range(1, 9):
            inner_step(model, optimizer, step, math.nan)
            outer.step()

    with pytest.raises(RunError, match="no site's work was finite in 4 rounds"):
        run_sites(sites, body)
