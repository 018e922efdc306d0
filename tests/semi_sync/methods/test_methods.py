"""Local SGD and DiLoCo against references written from the equations."""

import copy
import math

import pytest
import torch

from tests.semi_sync.methods import reference
from tests.semi_sync.sites import outer_loop, run_sites
from titan_ext.semi_sync import Average, OuterStep, ScopeConfig, SemiSyncConfig, fill_defaults, resolve

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
    return [v - 0.1 * (1 + 0.3 * site) * (v - 0.2 * i * (site + 1) - 0.05 * step) for i, v in enumerate(values)]


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


def adaptive(name, reading, lr, betas, eps, rounds):
    """Global parameters after each round of two sites, two inner steps each (arXiv 2003.00295, algorithm 2)."""
    theta, m = list(START), [0.0] * SIZE
    v = [eps**2 if reading == "paper" else 0.0] * SIZE
    if name == "yogi":
        v = [eps**2] * SIZE
    history = []
    for n in range(1, rounds + 1):
        local = [list(theta), list(theta)]
        for step in (2 * n - 1, 2 * n):
            local = [inner_step(site, step, local[site]) for site in range(2)]
        for i in range(SIZE):
            delta = theta[i] - (local[0][i] + local[1][i]) / 2
            m[i] = betas[0] * m[i] + (1 - betas[0]) * delta
            if name == "adam":
                v[i] = betas[1] * v[i] + (1 - betas[1]) * delta**2
            elif name == "adagrad":
                v[i] += delta**2
            else:
                v[i] -= (1 - betas[1]) * delta**2 * math.copysign(1, v[i] - delta**2)
            if reading == "paper" or name == "yogi":
                theta[i] -= lr * m[i] / (math.sqrt(v[i]) + eps)
            elif name == "adam":
                root = math.sqrt(v[i] / (1 - betas[1] ** n))
                theta[i] -= lr * m[i] / (1 - betas[0] ** n) / (root + eps)
            else:
                theta[i] -= lr * delta / (math.sqrt(v[i]) + eps)
        history.append(list(theta))
    return history


@pytest.mark.parametrize("given", [{}, {"outer_lr": 0.05, "outer_betas": (0.7, 0.9), "outer_eps": 0.02}])
@pytest.mark.parametrize(
    "name, reading",
    [("adam", "paper"), ("adam", "torch"), ("yogi", "paper"), ("adagrad", "paper"), ("adagrad", "torch")],
)
def test_adaptive_outer_optimizers_match_the_equations(name, reading, given):
    """From the very first round, whatever method they serve, and with a rate of their own unless one is given."""
    want = adaptive(
        name,
        reading,
        given.get("outer_lr", 0.01),
        given.get("outer_betas", (0.9, 0.99)),
        given.get("outer_eps", 1e-3),
        6,
    )
    for method in ("diloco", "local_sgd"):
        settings = dict(method=method, sync_every=2, outer_optimizer=name, **given)
        if name != "yogi":
            settings["outer_reading"] = reading
        results = run_sites(2, lambda index, own: train(index, own, 12, **settings))
        for got, expected in zip(results[0][0], want, strict=True):
            torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-5)
        assert results[0][2] == results[1][2]


NESTEROV = (0.9, True)


@pytest.mark.parametrize(
    "settings, want",
    [
        ({"method": "diloco"}, (0.7, *NESTEROV)),
        ({"method": "muloco"}, (0.7, 0.6, True)),
        ({"method": "eager_diloco"}, (0.7, *NESTEROV)),
        ({"method": "local_sgd", "outer_optimizer": "sgd"}, (0.7, *NESTEROV)),
        ({"method": "sparta", "outer_optimizer": "sgd"}, (0.7, *NESTEROV)),
        ({"method": "des_loc", "outer_optimizer": "sgd"}, (1.0, *NESTEROV)),
        ({"method": "local_adam", "outer_optimizer": "sgd"}, (1.0, *NESTEROV)),
        ({"method": "mt_dao", "outer_optimizer": "sgd"}, (1.0, *NESTEROV)),
        ({"method": "lordo", "outer_optimizer": "sgd"}, (1.0, *NESTEROV)),
        ({"method": "des_loc", "outer_optimizer": "sgd", "outer_momentum": 0.0}, (1.0, 0.0, True)),
        ({"method": "diloco", "outer_optimizer": "adam"}, (0.01,)),
        ({"method": "diloco", "outer_optimizer": "yogi"}, (0.01,)),
        ({"method": "muloco", "outer_optimizer": "adagrad"}, (0.01,)),
        ({"method": "des_loc", "outer_optimizer": "adam"}, (0.01,)),
        ({"method": "diloco", "outer_optimizer": "adam", "outer_lr": 0.3}, (0.3,)),
    ],
)
def test_an_outer_optimizer_has_settings_of_its_own(settings, want):
    rules = resolve(SemiSyncConfig(**settings)).rules
    optimizer = next(rule.apply.optimizer for rule in rules if getattr(rule.apply, "optimizer", None))
    assert (optimizer.lr, getattr(optimizer, "momentum", None), getattr(optimizer, "nesterov", None))[
        : len(want)
    ] == want
    assert resolve(fill_defaults(SemiSyncConfig(**settings))).rules == rules


@pytest.mark.parametrize("method", ["local_sgd", "des_loc", "diloco"])
def test_an_average_has_no_outer_optimizer(method):
    assert isinstance(resolve(SemiSyncConfig(method=method, outer_optimizer="average")).rules[0].apply, Average)


def test_a_scope_with_another_outer_optimizer_does_not_take_the_rate_of_the_first():
    scopes = [
        ScopeConfig(name="other", parameters=["layers.0.*"], outer_optimizer="yogi"),
        ScopeConfig(name="same", parameters=["layers.1.*"], outer_momentum=0.3),
    ]
    _, other, same = resolve(SemiSyncConfig(method="diloco", outer_lr=0.4, scopes=scopes)).rules
    assert isinstance(other.apply, OuterStep) and other.apply.optimizer.lr == 0.01
    assert (same.apply.optimizer.lr, same.apply.optimizer.momentum, same.apply.optimizer.nesterov) == (0.4, 0.3, True)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"method": "local_sgd", "outer_lr": 0.5}, 'outer_lr = 0.5: must be left out with outer_optimizer = "average"'),
        ({"method": "des_loc", "outer_momentum": 0.9}, "outer_momentum = 0.9"),
        ({"method": "local_sgd", "nesterov": True}, "nesterov = True"),
        ({"method": "diloco", "outer_optimizer": "adam", "outer_momentum": 0.9}, "outer_momentum = 0.9"),
        ({"method": "diloco", "outer_reading": "print"}, "outer_reading = 'print'"),
    ],
)
def test_settings_that_nothing_would_take_are_refused(settings, words):
    with pytest.raises(ValueError) as caught:
        resolve(SemiSyncConfig(**settings))
    assert words in str(caught.value)
