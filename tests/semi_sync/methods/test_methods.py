"""Local SGD and DiLoCo against references written from the equations."""

import copy

import pytest
import torch

from tests.semi_sync.methods import reference
from tests.semi_sync.sites import outer_loop, run_sites

SIZE = 6


class Flat(torch.nn.Module):
    """Parameters of several layers that together hold ``SIZE`` numbers."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        pieces = torch.tensor(values).split([1, 2, SIZE - 3])
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in pieces)
        for layer, piece in zip(self.layers, pieces):
            layer.weight = torch.nn.Parameter(piece.clone())

    def values(self) -> torch.Tensor:
        return torch.cat([layer.weight.detach() for layer in self.layers])

    def set(self, values: list[float]) -> None:
        for layer, piece in zip(self.layers, torch.tensor(values).split([1, 2, SIZE - 3])):
            layer.weight.data.copy_(piece)


START = [1.0, -0.5, 0.25, 2.0, -1.5, 0.75]


def inner_step(site: int, step: int, values: list[float]) -> list[float]:
    """A gradient step on a quadratic of the site's own, with a step-dependent target."""
    return [
        v - 0.1 * (1 + 0.3 * site) * (v - 0.2 * i * (site + 1) - 0.05 * step) for i, v in enumerate(values)
    ]


def train(index, own, steps, **settings):
    model = Flat(START)
    outer = outer_loop(model, torch.optim.SGD(model.parameters(), lr=0.1), own, **settings)
    outer.join()
    theta = []

    def global_values():
        return torch.cat([value.reshape(-1) for _, value in sorted(outer.global_parameters().items())])

    for step in range(1, steps + 1):
        before = outer.rounds
        model.set(inner_step(index, step, model.values().tolist()))
        outer.step(tokens=10 * (index + 1))
        if outer.rounds > before:
            theta.append(global_values())
    outer.finish()
    return theta, model.values(), outer.shared_state_sha256(), global_values()


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(method="local_sgd", sync_every=4), dict(lr=1.0, momentum=0.0, nesterov=False)),
        (dict(method="diloco", sync_every=4), dict(lr=0.7, momentum=0.9, nesterov=True)),
        (
            dict(method="diloco", sync_every=4, outer_lr=0.5, outer_momentum=0.6, nesterov=False),
            dict(lr=0.5, momentum=0.6, nesterov=False),
        ),
        (
            dict(method="diloco", sync_every=4, weighting="tokens"),
            dict(lr=0.7, momentum=0.9, nesterov=True, weights=[10.0, 20.0, 30.0]),
        ),
        (
            dict(method="local_sgd", sync_every=4, weighting="site"),
            dict(lr=1.0, momentum=0.0, nesterov=False, weights=[0.5, 1.0, 1.5]),
        ),
    ],
    ids=["local_sgd", "diloco", "heavy-ball", "by-tokens", "by-site"],
)
def test_rounds_match_the_equations(settings, expected):
    def body(index, own):
        options = {"weight": 0.5 * (index + 1)} if settings.get("weighting") == "site" else {}
        return train(index, own, 12, **settings, **options)

    results = run_sites(3, body)
    history = results[0][0]
    assert len(history) == 3
    for want, got in zip(reference.diloco(START, inner_step, sites=3, steps=12, period=4, **expected), history):
        torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-5)
    assert len({result[2] for result in results}) == 1


def test_published_vector():
    """outer_loop.md 0.3: theta 1.0, eta 0.7, mu 0.9, Delta 0.1 each round."""

    def body(index, own):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.tensor(1.0))  # 0-dim
        outer = outer_loop(model, [], own, method="diloco", sync_every=1)
        outer.join()
        values = []
        for _ in range(3):
            model.weight.data -= 0.1
            outer.step()
            values.append(model.weight.item())
        return values

    (values,) = run_sites(1, body)
    assert values == pytest.approx([0.867, 0.6773, 0.43657], abs=1e-5)


def test_one_site_averaging_is_plain_training_bit_for_bit():
    def body(index, own):
        model = Flat(START)
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1)
        outer.join()
        plain = Flat(START)
        for step in range(1, 8):
            model.set(inner_step(0, step, model.values().tolist()))
            plain.set(inner_step(0, step, plain.values().tolist()))
            outer.step()
        return torch.equal(model.values(), plain.values())

    assert run_sites(1, body) == [True]


def test_averaging_every_step_under_sgd_is_one_large_batch():
    torch.manual_seed(0)
    data = torch.randn(2, 5, 8, 4)

    original = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))

    def net():
        return copy.deepcopy(original)

    def body(index, own):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        outer = outer_loop(model, optimizer, own, method="local_sgd", sync_every=1)
        outer.join()
        for batch in data[index]:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            outer.step()
        return [p.detach().clone() for p in model.parameters()]

    results = run_sites(2, body)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for one, other in zip(data[0], data[1]):
        optimizer.zero_grad()
        model(torch.cat([one, other])).square().mean().backward()
        optimizer.step()
    for mine, theirs, whole in zip(*results, model.parameters()):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, whole.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("delay, alpha", [(0, 0.0), (1, 0.0), (1, 0.5), (2, 1.0)])
def test_streaming_matches_the_equations(delay, alpha):
    settings = dict(
        method="diloco",
        sync_every=9,
        fragments=[["layers.0"], ["layers.1"], ["layers.2"]],
        fragment_sync_delay=delay,
        fragment_update_alpha=alpha,
    )

    def body(index, own):
        return train(index, own, 21, **settings)  # nothing in flight at the end

    results = run_sites(2, body)
    want, local = reference.streaming_diloco(
        START,
        inner_step,
        fragments=[[0], [1, 2], [3, 4, 5]],
        sites=2,
        steps=21,
        period=9,
        delay=delay,
        alpha=alpha,
        lr=0.7,
        momentum=0.9,
    )
    for site, result in enumerate(results):
        torch.testing.assert_close(result[3], torch.tensor(want), rtol=0, atol=1e-5)
        torch.testing.assert_close(result[1], torch.tensor(local[site]), rtol=0, atol=1e-5)
    assert len({result[2] for result in results}) == 1


@pytest.mark.parametrize("name", ["adam", "yogi", "adagrad"])
def test_adaptive_outer_optimizers_follow_the_pseudo_gradient(name):
    """The outer step is that optimizer's own on the mean pseudo-gradient, from its very first round."""
    from titan_ext.semi_sync.state.outer_optimizers import OUTER_OPTIMIZERS

    settings = dict(method="diloco", sync_every=2, outer_optimizer=name, outer_lr=0.05)
    results = run_sites(2, lambda index, own: train(index, own, 8, **settings))
    theta = torch.tensor(START)
    optimizer = OUTER_OPTIMIZERS.get(name)(lr=0.05).build([theta])
    local = [list(START), list(START)]
    for step in range(1, 9):
        local = [inner_step(site, step, local[site]) for site in range(2)]
        if step % 2 == 0:
            theta.grad = theta - torch.tensor(local).mean(dim=0)
            optimizer.step()
            torch.testing.assert_close(results[0][0][step // 2 - 1], theta, rtol=0, atol=1e-5)
            local = [theta.tolist(), theta.tolist()]
    assert results[0][2] == results[1][2]
