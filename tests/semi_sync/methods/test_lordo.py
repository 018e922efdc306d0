"""LoRDO over four sites against float64 loops from its equations, and what it claims of subspaces (T13, T14, T18)."""

import pytest
import torch

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, outer_loop, run_sites
from titan_ext.optim import LowRankAdamW
from titan_ext.optim.projection import coordinate_basis, projection
from titan_ext.semi_sync import SemiSyncConfig, resolve
from titan_ext.semi_sync.methods import lordo

SITES, STEPS, EVERY, RANK = 4, 50, 5, 2
LR, BETAS, EPS = 0.02, (0.9, 0.99), 1e-8
SHAPES = {"left": (4, 7), "right": (6, 4), "bias": (3,)}


def start(name: str) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)


def gradient(site: int, step: int, name: str, x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(site)
    target = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(x)
    noise = torch.randn(SHAPES[name], generator=generator.manual_seed(97 * step + site), dtype=torch.float64).to(x)
    return (1 + 0.1 * site) * (x - target) + 0.3 * noise


def train(steps=STEPS, omega=0.97, error_feedback=True, outer="average", basis_from="outer", **settings):
    def body(site, own):
        model = torch.nn.Module()
        for name in SHAPES:
            model.register_parameter(name, torch.nn.Parameter(start(name).float()))
        optimizer = LowRankAdamW(
            model.parameters(),
            lr=LR,
            betas=BETAS,
            adamw_betas=BETAS,
            eps=EPS,
            rank=RANK,
            omega=omega,
            error_feedback=error_feedback,
            basis_from=basis_from,
            refresh_every=EVERY,
        )
        outer_settings = {"outer_optimizer": outer, "outer_lr": 0.9, "outer_momentum": 0.5, "nesterov": True}
        settings_ = settings | (outer_settings if outer != "average" else {})
        if "weight" in settings_:
            settings_["weight"] = settings_["weight"](site)
        loop = outer_loop(model, optimizer, own, method="lordo", sync_every=EVERY, **settings_)
        loop.join()
        first = {name: optimizer.state[model.get_parameter(name)]["basis"].clone() for name in ("left", "right")}
        history = []
        for step in range(1, steps + 1):
            for name, parameter in model.named_parameters():
                parameter.grad = gradient(site, step, name, parameter.detach())
            optimizer.step()
            loop.step()
            history.append(
                {
                    name: {"x": parameter.detach().clone()}
                    | {key: value.clone() for key, value in optimizer.state[parameter].items()}
                    for name, parameter in model.named_parameters()
                }
            )
        return first, history, loop.ledger

    return run_sites(SITES, body)


def reference(results, steps=STEPS, omega=0.97, error_feedback=True):
    """Every site's states after each step; bases are those the sites chose, for singular vectors have no sign."""
    states = []
    for first, _, _ in results:
        site = {name: {"x": start(name)} for name in SHAPES}
        for name, s in site.items():
            if name == "bias":
                s |= {"u": torch.zeros_like(s["x"]), "v": torch.zeros_like(s["x"])}
                continue
            q = first[name].double()
            s |= {"q": q, "e": torch.zeros_like(s["x"])}
            s |= {key: torch.zeros_like(lower(s["x"], q)) for key in ("u", "v")}
        states.append(site)
    ref = {name: start(name) for name in SHAPES}
    history = []
    for n in range(1, steps + 1):
        for index, site in enumerate(states):
            for name, s in site.items():
                inner_step(s, gradient(index, n, name, s["x"]), n, omega if name != "bias" else None, error_feedback)
        if n % EVERY == 0:
            for name in SHAPES:
                for key in ("x", "u", "v"):
                    mean = sum(site[name][key] for site in states) / SITES
                    for site in states:
                        site[name][key] = mean.clone()
                delta, ref[name] = ref[name] - states[0][name]["x"], states[0][name]["x"].clone()
                if name != "bias":
                    new = results[0][1][n - 1][name]["basis"].double()
                    assert_top_singular_vectors(new, delta)
                    for site in states:
                        turn(site[name], new, n)
        history.append([{name: {k: t.clone() for k, t in s.items()} for name, s in site.items()} for site in states])
    return history


def lower(x, q):
    """The matrix in the basis of its shorter side."""
    return x @ q if x.shape[0] >= x.shape[1] else q.mT @ x


def lift(low, q, shape):
    return low @ q.mT if shape[0] >= shape[1] else q @ low


def inner_step(s, g, n, omega, error_feedback):
    if omega is None:
        s["u"] = BETAS[0] * s["u"] + (1 - BETAS[0]) * g
        s["v"] = BETAS[1] * s["v"] + (1 - BETAS[1]) * g * g
        s["x"] = s["x"] - LR * (s["u"] / (1 - BETAS[0] ** n)) / ((s["v"] / (1 - BETAS[1] ** n)).sqrt() + EPS)
        return
    a = g + s["e"] if error_feedback else g
    low = lower(a, s["q"])
    if error_feedback:
        s["e"] = a - lift(low, s["q"], a.shape)
    s["u"] = BETAS[0] * s["u"] + (1 - BETAS[0]) * low
    s["v"] = BETAS[1] * s["v"] + (1 - BETAS[1]) * low * low
    denominator = (s["v"] / (1 - BETAS[1] ** n)).sqrt() + EPS
    low_step = lift(s["u"] / (1 - BETAS[0] ** n) / denominator, s["q"], a.shape)
    s["x"] = s["x"] - LR * ((1 - omega) * g / denominator.mean() + omega * low_step)


def turn(s, new, n):
    c1, c2 = 1 - BETAS[0] ** n, 1 - BETAS[1] ** n
    rotation = new.mT @ s["q"]
    right = s["x"].shape[0] >= s["x"].shape[1]
    u, v = (s["u"].mT, s["v"].mT) if right else (s["u"], s["v"])
    mean, spread = u / c1, (v / c2 - (u / c1) ** 2).clamp(min=0)
    u, v = rotation @ u, c2 * (rotation**2 @ spread + (rotation @ mean) ** 2)
    s["u"], s["v"] = (u.mT, v.mT) if right else (u, v)
    s["q"] = new


def assert_top_singular_vectors(basis, delta) -> None:
    side = delta.mT if delta.shape[0] >= delta.shape[1] else delta
    want = torch.linalg.svd(side).U[:, :RANK]
    overlap = torch.linalg.svdvals(basis.mT @ want)
    assert (overlap > 1 - 1e-4).all(), "not the subspace of the averaged pseudo-gradient"


KEYS = {"left": {"u": "low_exp_avg", "v": "low_exp_avg_sq"}, "bias": {"u": "exp_avg", "v": "exp_avg_sq"}}
KEYS["right"] = KEYS["left"]


@pytest.mark.parametrize("omega, error_feedback", [(0.97, True), (0.9, False), (1.0, True)])
def test_every_state_at_every_step(omega, error_feedback):
    results = train(omega=omega, error_feedback=error_feedback)
    want = reference(results, omega=omega, error_feedback=error_feedback)
    for site, (_, history, _) in enumerate(results):
        for step, seen in enumerate(history):
            for name, states in seen.items():
                expected = want[step][site][name]
                pairs = {"x": "x", **KEYS[name], **({"e": "error"} if error_feedback and name != "bias" else {})}
                for short, key in pairs.items():
                    torch.testing.assert_close(
                        states[key].double(),
                        expected[short],
                        rtol=2e-3,
                        atol=2e-4,
                        msg=lambda m: f"site {site} step {step + 1} {name} {key}: {m}",
                    )
    sent = sum(torch.Size(shape).numel() for shape in SHAPES.values()) + 2 * (RANK * 7 + RANK * 6 + 3)
    sent += 2 * RANK * 4  # the bases
    assert sum(ledger.bytes_sent for _, _, ledger in results) == 2 * (SITES - 1) * 4 * sent * (STEPS // EVERY)


def spans(results, name):
    """Overlap of each basis with the one before: mean squared cosine."""
    history = results[0][1]
    bases = [results[0][0][name], *(history[n - 1][name]["basis"] for n in range(EVERY, len(history) + 1, EVERY))]
    return [(new.mT @ old).square().sum().item() / RANK for old, new in zip(bases, bases[1:])]


def test_t13_t14_only_the_full_rank_term_moves_the_subspace():
    stuck, moving = train(omega=1.0, steps=30), train(omega=0.9, steps=30)
    for name in ("left", "right"):
        assert all(overlap > 1 - 1e-5 for overlap in spans(stuck, name))
        assert min(spans(moving, name)) < 1 - 1e-3


def test_t18_all_sites_hold_one_orthonormal_basis():
    results = train(steps=20, outer="sgd")
    for n in range(EVERY, 21, EVERY):
        for name in ("left", "right"):
            bases = [history[n - 1][name]["basis"] for _, history, _ in results]
            assert all(torch.equal(bases[0], each) for each in bases)
            skew = bases[0].mT @ bases[0] - torch.eye(RANK)
            assert skew.abs().max() < 1e-5
            moments = [history[n - 1][name]["low_exp_avg"] for _, history, _ in results]
            assert all(torch.equal(moments[0], each) for each in moments)


@pytest.mark.parametrize("outer", ["average", "sgd"])
def test_local_bases_stay_at_their_sites_and_every_round_counts(outer):
    records = []
    results = train(steps=20, basis_from="gradient", outer=outer, on_round=records.append)
    bases = [history[-1]["left"]["basis"] for _, history, _ in results]
    assert not torch.equal(bases[0], bases[1])
    values = [history[-1]["left"]["x"] for _, history, _ in results]
    assert all(torch.equal(values[0], each) for each in values)
    assert [record.participants for record in records] == [SITES] * (SITES * 20 // EVERY)


def test_bases_are_the_outer_loops_unless_the_optimizer_is_told_otherwise():
    results = train(steps=2 * EVERY, basis_from=None)
    for name in ("left", "right"):
        bases = [history[-1][name]["basis"] for _, history, _ in results]
        assert all(torch.equal(bases[0], each) for each in bases)
    parameter = torch.nn.Parameter(torch.ones(6, 4))
    alone = LowRankAdamW([parameter], rank=2)
    parameter.grad = gradient(0, 1, "right", parameter.detach())
    alone.step()
    assert_top_singular_vectors(alone.state[parameter]["basis"].double(), parameter.grad.double())


def perturbed(monkeypatch, size=1e-6):
    """Singular vectors that come out a little otherwise at each call, as they do with another thread count."""
    calls = iter(range(10**6))

    def vectors(matrix, rank, power_iterations=0):
        noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(next(calls))) * size
        return projection(matrix + noise * matrix.abs().max(), rank, power_iterations)

    monkeypatch.setattr(lordo, "projection", vectors)


@pytest.mark.parametrize(
    "settings",
    [{}, {"outer": "sgd"}, {"settings": {"lordo": {"first_basis": "gradient"}}}],
    ids=["average", "outer", "first"],
)
def test_one_site_computes_a_basis_for_all(settings, monkeypatch):
    perturbed(monkeypatch)
    records = []
    results = train(steps=4 * EVERY, on_round=records.append, **settings)
    rounds = 4 + ("settings" in settings)
    assert [record.participants for record in records] == [SITES] * (SITES * rounds)
    for n in range(EVERY, 4 * EVERY + 1, EVERY):
        for name in ("left", "right"):
            for key in ("x", "basis"):
                values = [history[n - 1][name][key] for _, history, _ in results]
                assert all(torch.equal(values[0], each) for each in values), (n, name, key)


def test_under_an_outer_optimizer_bases_come_from_the_pseudo_gradient():
    """The step itself, with its momentum, points elsewhere."""
    results = train(steps=4 * EVERY, outer="sgd")
    theta = {name: start(name) for name in SHAPES}
    velocity = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for n in range(EVERY, 4 * EVERY + 1, EVERY):
        for name in ("left", "right"):
            # What the outer step took is told by where it went: v = 0.5 v + D, theta -= 0.9 (D + 0.5 v).
            moved = (theta[name] - results[0][1][n - 1][name]["x"].double()) / 0.9
            delta = (moved - 0.25 * velocity[name]) / 1.5
            velocity[name] = 0.5 * velocity[name] + delta
            theta[name] = results[0][1][n - 1][name]["x"].double()
            assert_top_singular_vectors(results[0][1][n - 1][name]["basis"].double(), delta)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 10.0]])
def test_the_first_bases_may_come_from_the_average_of_the_first_gradients(weights):
    results = train(
        steps=3, settings={"lordo": {"first_basis": "gradient"}}, weighting="site", weight=lambda site: weights[site]
    )
    for name in ("left", "right"):
        mean = sum(w * gradient(site, 1, name, start(name)) for site, w in enumerate(weights)) / sum(weights)
        for first, history, _ in results:
            assert first[name].count_nonzero() == RANK and set(first[name].flatten().tolist()) == {0.0, 1.0}
            assert_top_singular_vectors(history[0][name]["basis"].double(), mean)
            assert torch.equal(history[0][name]["basis"], results[0][1][0][name]["basis"])
            assert torch.equal(history[2][name]["basis"], history[0][name]["basis"]), "once"
    values = [history[0]["left"]["x"] for _, history, _ in results]
    assert not torch.equal(values[0], values[1]), "parameters are not averaged with it"


def test_the_first_gradients_must_still_be_there():
    def body(site, own):
        parameter = torch.nn.Linear(6, 5, bias=False)
        optimizer = LowRankAdamW(parameter.parameters(), rank=2)
        loop = outer_loop(
            parameter, optimizer, own, method="lordo", sync_every=4, settings={"lordo": {"first_basis": "gradient"}}
        )
        loop.join()
        with pytest.raises(ValueError, match='first_basis = "gradient": weight has no gradient any more'):
            loop.step()

    run_sites(1, body)


def test_coordinates_are_drawn_alike_everywhere():
    for side, rank in ((5, 2), (64, 63), (7, 7)):
        basis = coordinate_basis(side, rank)
        assert torch.equal(basis, coordinate_basis(side, rank))
        assert torch.equal(basis.mT @ basis, torch.eye(rank)) and basis.shape == (side, rank)


def test_a_late_site_gets_basis_and_moments():
    meeting = Meeting()

    def body(site, own):
        model = torch.nn.Module()
        model.register_parameter("left", torch.nn.Parameter(start("left").float() + 100 * (site == 2)))
        optimizer = LowRankAdamW(model.parameters(), lr=LR, betas=BETAS, rank=RANK, basis_from="outer")
        loop = outer_loop(model, optimizer, own, method="lordo", sync_every=EVERY)
        loop.join()
        while loop.inner_step < 30:
            model.left.grad = gradient(site, loop.inner_step + 1, "left", model.left.detach())
            optimizer.step()
            loop.step()
            if site == 0 and loop.inner_step == 7:
                meeting.arrive()
                wait_for_requests(own.lighthouse, 2)  # of the newcomer and of site 1, which is ahead
        state = optimizer.state[model.left]
        return [model.left.detach()] + [state[key] for key in ("basis", "low_exp_avg", "low_exp_avg_sq", "step")]

    results = run_sites(3, body, min_sites=2, before=lambda index: meeting.wait() if index == 2 else None)
    for mine in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(mine, results[0]))
    assert results[0][0].abs().max() < 20


def test_another_optimizer_is_refused_by_name():
    def body(site, own):
        model = torch.nn.Linear(4, 4)
        with pytest.raises(ValueError, match=r"no state 'low_exp_avg'.*exp_avg"):
            outer_loop(model, torch.optim.AdamW(model.parameters()), own, method="lordo", sync_every=4)

    run_sites(1, body)
    assert resolve(SemiSyncConfig(method="lordo")).rules[0].period == 32
