"""Local ADOPT and SGDM, DES-LOC and MT-DAO around every inner optimizer, against float64 loops from the equations.

Every parameter and every state of four sites is compared after each of fifty steps.
"""

import math

import pytest
import torch

from tests.semi_sync.sites import outer_loop, run_sites
from titan_ext.optim import ADOPT, QHADOPT, QHSGDM, LowRankAdamW, Muon, QHAdamW
from titan_ext.semi_sync import SemiSyncConfig, resolve

SITES, STEPS, LR = 4, 50, 0.02
START = torch.tensor([0.5, -1.0, 2.0, 0.1, 1.5], dtype=torch.float64)


def gradient(site: int, step: int, x: torch.Tensor) -> torch.Tensor:
    """Of a quadratic of the site's own, with a target that moves."""
    place = torch.arange(len(x), dtype=x.dtype)
    return (1 + 0.2 * site) * (x - 0.3 * place * (site - 1) - 0.1 * math.sin(step + site))


def adam(s, g, n, betas, omegas=None):
    *firsts, second = betas
    for j, beta in enumerate(firsts):
        s[f"u{j}"] = beta * s[f"u{j}"] + (1 - beta) * g
    s["v"] = second * s["v"] + (1 - second) * g * g
    omegas = omegas or (1.0,)
    direction = (1 - sum(omegas)) * g
    for j, (beta, omega) in enumerate(zip(firsts, omegas)):
        direction = direction + omega * s[f"u{j}"] / (1 - beta**n)
    s["x"] = s["x"] - LR * direction / ((s["v"] / (1 - second**n)).sqrt() + 1e-8)


def adopt(s, g, n, betas, omegas=None):
    *firsts, second = betas
    if n == 1:
        s["v"] = g * g
        return
    bound = (n - 1) ** 0.25
    c = (g / s["v"].sqrt().clamp(min=1e-6)).clamp(-bound, bound)
    omegas = omegas or (1.0,)
    direction = (1 - sum(omegas)) * c
    for j, (beta, omega) in enumerate(zip(firsts, omegas)):
        s[f"u{j}"] = beta * s[f"u{j}"] + (1 - beta) * c
        direction = direction + omega * s[f"u{j}"]
    s["x"] = s["x"] - LR * direction
    s["v"] = second * s["v"] + (1 - second) * g * g


def sgdm(s, g, n, betas, omegas=None):
    """torch's SGD: the momentum adds the whole gradient."""
    s["u0"] = betas[0] * s["u0"] + g
    s["x"] = s["x"] - LR * s["u0"]


def qhsgdm(s, g, n, betas, omegas):
    direction = (1 - sum(omegas)) * g
    for j, (beta, omega) in enumerate(zip(betas, omegas)):
        s[f"u{j}"] = beta * s[f"u{j}"] + (1 - beta) * g
        direction = direction + omega * s[f"u{j}"]
    s["x"] = s["x"] - LR * direction


def simulate(
    rule, periods, betas, omegas=None, *, sites=SITES, steps=STEPS, sync_point="after_step", gradients=gradient
):
    """After each step the states of every site; ``periods`` by state; ``sync_point`` as in ``[semi_sync]``."""
    states = [{key: START.clone() if key == "x" else torch.zeros_like(START) for key in periods} for _ in range(sites)]
    history = []

    def average(count):
        for key, period in periods.items():
            if count and count % period == 0:
                mean = sum(s[key] for s in states) / sites
                for s in states:
                    s[key] = mean.clone()

    for n in range(1, steps + 1):
        found = [gradients(site, n, s["x"]) for site, s in enumerate(states)]
        if sync_point == "before_step":
            average(n - 1)
        for s, g in zip(states, found):
            rule(s, g, n, betas, omegas)
        if sync_point == "after_step":
            average(n)
        history.append([{key: value.clone() for key, value in s.items()} for s in states])
    return history


BUILD = {
    "adam": lambda p, betas, omegas: torch.optim.Adam(p, lr=LR, betas=betas),
    "adopt": lambda p, betas, omegas: ADOPT(p, lr=LR, betas=betas),
    "sgdm": lambda p, betas, omegas: torch.optim.SGD(p, lr=LR, momentum=betas[0]),
    "qhadam": lambda p, betas, omegas: QHAdamW(p, lr=LR, betas=betas, omegas=omegas, weight_decay=0.0),
    "qhadopt": lambda p, betas, omegas: QHADOPT(p, lr=LR, betas=betas, omegas=omegas),
    "qhsgdm": lambda p, betas, omegas: QHSGDM(p, lr=LR, betas=betas, omegas=omegas),
}
RULES = {"adam": adam, "adopt": adopt, "sgdm": sgdm, "qhadam": adam, "qhadopt": adopt, "qhsgdm": qhsgdm}
KEYS = {
    **dict.fromkeys(("adam", "adopt"), {"u0": "exp_avg", "v": "exp_avg_sq"}),
    "sgdm": {"u0": "momentum_buffer"},
    **dict.fromkeys(("qhadam", "qhadopt", "qhsgdm"), {"u0": "exp_avg_0", "u1": "exp_avg_1", "v": "exp_avg_sq"}),
}


def train(inner, betas, omegas=None, *, sites=SITES, steps=STEPS, gradients=gradient, **settings):
    """For each site the states after each step, and the ledger's bytes."""

    def body(site, own):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(START.float())
        optimizer = BUILD[inner]([model.weight], betas, omegas)
        outer = outer_loop(model, optimizer, own, **settings)
        outer.join()
        history = []
        for n in range(1, steps + 1):
            model.weight.grad = gradients(site, n, model.weight.detach())
            if settings.get("sync_point") == "before_step":
                outer.step()
            optimizer.step()
            if settings.get("sync_point") != "before_step":
                outer.step()
            state = optimizer.state[model.weight]
            own_state = {short: state[key].clone() for short, key in KEYS[inner].items() if key in state}
            history.append({"x": model.weight.detach().clone(), **own_state})
        return history, outer.ledger.bytes_sent

    return run_sites(sites, body)


def assert_same(got, want):
    for site, (history, _) in enumerate(got):
        for step, seen in enumerate(history):
            for key, value in want[step][site].items():
                torch.testing.assert_close(
                    seen[key].double(),
                    value,
                    rtol=5e-5,
                    atol=5e-6,
                    msg=lambda m: f"site {site} step {step + 1} {key}: {m}",
                )


ALL_STATES = ("x", "u0", "u1", "v")


@pytest.mark.parametrize(
    "inner, betas, omegas, settings, periods",
    [
        ("adopt", (0.95, 0.999), None, {"method": "local_adam", "sync_every": 5}, {"x": 5, "u0": 5, "v": 5}),
        ("sgdm", (0.9,), None, {"method": "local_adam", "sync_every": 5}, {"x": 5, "u0": 5}),
        ("adopt", (0.95, 0.999), None, {"method": "des_loc", "sync_every": 2}, {"x": 2, "u0": 6, "v": 12}),
        (
            "sgdm",
            (0.9,),
            None,
            {"method": "des_loc", "sync_every": 2, "settings": {"des_loc": {"first_moment_sync_every": 3}}},
            {"x": 2, "u0": 3},
        ),
        ("qhadam", (0.99, 0.999), (0.9,), {"method": "mt_dao", "sync_every": 4}, {"x": 4, "u0": 4, "v": 4}),
        (
            "qhadam",
            (0.9, 0.99, 0.999),
            (0.3, 0.5),
            {
                "method": "mt_dao",
                "sync_every": 4,
                "settings": {"mt_dao": {"momentum_sync_every": [3, 8], "second_moment_sync_every": 7}},
            },
            {"x": 4, "u0": 3, "u1": 8, "v": 7},
        ),
        (
            "qhadopt",
            (0.9, 0.99, 0.999),
            (0.3, 0.6),
            {"method": "mt_dao", "sync_every": 4, "settings": {"mt_dao": {"momentum_sync_every": [4, 8]}}},
            {"x": 4, "u0": 4, "u1": 8, "v": 4},
        ),
        ("qhsgdm", (0.99,), (0.8,), {"method": "mt_dao", "sync_every": 4}, {"x": 4, "u0": 4}),
        ("qhadam", (0.9, 0.99, 0.999), (0.3, 0.5), {"method": "mt_dao", "sync_every": 4}, dict.fromkeys(ALL_STATES, 4)),
        (
            "qhadopt",
            (0.9, 0.99, 0.999),
            (0.3, 0.6),
            {"method": "mt_dao", "sync_every": 3},
            dict.fromkeys(ALL_STATES, 3),
        ),
        ("qhsgdm", (0.9, 0.99), (0.3, 0.6), {"method": "mt_dao", "sync_every": 4}, {"x": 4, "u0": 4, "u1": 4}),
        (
            "adam",
            (0.9, 0.95),
            None,
            {"method": "des_loc", "sync_every": 4, "sync_point": "before_step"},
            {"x": 4, "u0": 12, "v": 24},
        ),
    ],
    ids=[
        "Local ADOPT",
        "Local SGDM",
        "DES-LOC ADOPT",
        "DES-LOC SGDM",
        "MT-DAO Adam",
        "MT-DAO Adam, two momenta",
        "MT-DAO ADOPT, two momenta",
        "MT-DAO SGDM",
        "MT-DAO Adam, two momenta, no periods",
        "MT-DAO ADOPT, two momenta, no periods",
        "MT-DAO SGDM, two momenta, no periods",
        "DES-LOC, paper's order",
    ],
)
def test_every_state_at_every_step(inner, betas, omegas, settings, periods):
    got = train(inner, betas, omegas, **settings)
    sync_point = settings.get("sync_point", "after_step")
    assert_same(got, simulate(RULES[inner], periods, betas, omegas, sync_point=sync_point))
    last = STEPS - 1 if sync_point == "before_step" else STEPS
    exchanges = sum(last // period for period in periods.values())
    # T12: 2 (M - 1) / M of the payload; of what does not divide by the sites some own an element more.
    assert sum(sent for _, sent in got) == 2 * (SITES - 1) * 4 * len(START) * exchanges


def test_t1_one_site_is_the_inner_optimizer():
    for inner, betas in (("adam", (0.9, 0.95)), ("adopt", (0.95, 0.999)), ("sgdm", (0.9,))):
        got = train(inner, betas, sites=1, steps=20, method="des_loc", sync_every=3)
        weight = torch.nn.Parameter(START.float())
        optimizer = BUILD[inner]([weight], betas, None)
        for n in range(1, 21):
            weight.grad = gradient(0, n, weight.detach())
            optimizer.step()
            torch.testing.assert_close(got[0][0][n - 1]["x"], weight.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("sync_point", ["after_step", "before_step"])
def test_t2_identical_data_is_the_inner_optimizer(sync_point):
    def same(site, step, x):
        return gradient(1, step, x)

    got = train("adam", (0.9, 0.95), gradients=same, steps=20, method="des_loc", sync_every=2, sync_point=sync_point)
    alone = simulate(adam, {"x": 10**9, "u0": 10**9, "v": 10**9}, (0.9, 0.95), sites=1, steps=20, gradients=same)
    for history, _ in got:
        for step, seen in enumerate(history):
            torch.testing.assert_close(seen["x"].double(), alone[step][0]["x"], rtol=1e-5, atol=1e-6)


def test_t3_means_of_momentum_sgd_obey_its_recursion_under_any_schedule():
    for sync_point in ("after_step", "before_step"):
        seen = {}

        def noted(site, step, x):
            g = gradient(site, step, x)
            seen[site, step] = g.double()
            return g

        got = train(
            "qhsgdm",
            (0.9,),
            (1.0,),
            gradients=noted,
            method="mt_dao",
            sync_every=4,
            settings={"mt_dao": {"momentum_sync_every": [3]}},
            sync_point=sync_point,
        )
        u, x = torch.zeros_like(START), START.clone()
        for n in range(1, STEPS + 1):
            u = 0.9 * u + 0.1 * sum(seen[site, n] for site in range(SITES)) / SITES
            x = x - LR * u
            mean_u = sum(history[n - 1]["u0"].double() for history, _ in got) / SITES
            mean_x = sum(history[n - 1]["x"].double() for history, _ in got) / SITES
            torch.testing.assert_close(mean_u, u, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mean_x, x, rtol=1e-5, atol=1e-5)


def test_t4_means_of_adams_moments_obey_their_recursions():
    seen = {}

    def noted(site, step, x):
        seen[site, step] = gradient(site, step, x)
        return seen[site, step]

    got = train("adam", (0.9, 0.95), gradients=noted, method="des_loc", sync_every=2)
    u, v = torch.zeros_like(START), torch.zeros_like(START)
    for n in range(1, STEPS + 1):
        gradients = [seen[site, n].double() for site in range(SITES)]
        u = 0.9 * u + 0.1 * sum(gradients) / SITES
        v = 0.95 * v + 0.05 * sum(g * g for g in gradients) / SITES
        for key, want in (("u0", u), ("v", v)):
            mean = sum(history[n - 1][key].double() for history, _ in got) / SITES
            torch.testing.assert_close(mean, want, rtol=1e-5, atol=1e-6)


def data_parallel(rule, betas, omegas=None, steps=STEPS):
    """One optimizer on the averaged gradient."""
    s = {"x": START.clone(), "u0": torch.zeros_like(START), "v": torch.zeros_like(START)}
    history = []
    for n in range(1, steps + 1):
        rule(s, sum(gradient(site, n, s["x"]) for site in range(SITES)) / SITES, n, betas, omegas)
        history.append({key: value.clone() for key, value in s.items()})
    return history


def test_t5_t6_momentum_sgd_averaged_every_step_is_data_parallel_only_after_the_step():
    want = data_parallel(qhsgdm, (0.9,), (1.0,))
    every_step = {"method": "mt_dao", "sync_every": 1}
    for history, _ in train("qhsgdm", (0.9,), (1.0,), **every_step):
        for step, seen in enumerate(history):
            torch.testing.assert_close(seen["x"].double(), want[step]["x"], rtol=1e-5, atol=1e-6)
    papers = train("qhsgdm", (0.9,), (1.0,), sync_point="before_step", **every_step)
    assert all((papers[0][0][n]["x"] - papers[1][0][n]["x"]).abs().max() > 1e-4 for n in range(STEPS))
    assert any((papers[0][0][n]["x"].double() - want[n]["x"]).abs().max() > 1e-4 for n in range(STEPS))


@pytest.mark.parametrize("inner", ["adam", "adopt"])
def test_t7_adaptive_methods_averaged_every_step_are_not_data_parallel(inner):
    betas = (0.9, 0.95)
    want = data_parallel(RULES[inner], betas)
    got = train(inner, betas, method="local_adam", sync_every=1)
    assert (got[0][0][-1]["x"].double() - want[-1]["x"]).abs().max() > 1e-4
    if inner == "adam":
        # mean(g^2) = mean(g)^2 + Var(g): the first step shows it, before the trajectories part.
        assert (got[0][0][0]["v"].double() > want[0]["v"]).all()


def test_t8_after_the_step_is_the_papers_order_with_the_gradient_at_the_mean():
    periods, betas = {"x": 4, "u0": 3, "v": 8}, (0.9, 0.95)
    after = simulate(adam, periods, betas)
    states = [{"x": START.clone(), "u0": torch.zeros_like(START), "v": torch.zeros_like(START)} for _ in range(SITES)]
    for n in range(1, STEPS + 1):
        for key, period in periods.items():
            if n > 1 and (n - 1) % period == 0:
                mean = sum(s[key] for s in states) / SITES
                for s in states:
                    s[key] = mean.clone()
        for site, s in enumerate(states):
            adam(s, gradient(site, n, s["x"]), n, betas)
        for key in periods:
            torch.testing.assert_close(
                sum(s[key] for s in states), sum(s[key] for s in after[n - 1]), rtol=1e-9, atol=1e-12
            )
    papers = simulate(adam, periods, betas, sync_point="before_step")
    assert (papers[-1][0]["x"] - after[-1][0]["x"]).abs().max() > 1e-4


def test_t9_periods_turn_des_loc_into_its_neighbours():
    equal = {"settings": {"des_loc": {"first_moment_sync_every": 4, "second_moment_sync_every": 4}}}
    local_adam = train("adam", (0.9, 0.95), steps=20, method="local_adam", sync_every=4)
    des_loc = train("adam", (0.9, 0.95), steps=20, method="des_loc", sync_every=4, **equal)
    never = {"settings": {"des_loc": {"first_moment_sync_every": 10**6, "second_moment_sync_every": 10**6}}}
    nesterov = {"outer_optimizer": "sgd", "outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": True}
    diloco = train("adam", (0.9, 0.95), steps=20, method="diloco", sync_every=4)
    as_diloco = train("adam", (0.9, 0.95), steps=20, method="des_loc", sync_every=4, **never, **nesterov)
    for one, other in ((local_adam, des_loc), (diloco, as_diloco)):
        for (mine, _), (theirs, _) in zip(one, other):
            for a, b in zip(mine, theirs):
                assert all(torch.equal(a[key], b[key]) for key in a)


def test_t10_states_are_equal_bit_for_bit_when_they_have_been_averaged():
    got = train("adam", (0.9, 0.95), method="des_loc", sync_every=2)
    for n in range(1, STEPS + 1):
        for key, period in (("x", 2), ("u0", 6), ("v", 12)):
            values = [history[n - 1][key] for history, _ in got]
            same = all(torch.equal(values[0], each) for each in values)
            assert same == (n % period == 0), (n, key)


def test_m1_one_momentum_of_full_weight_is_des_loc_around_adam():
    equal = {"settings": {"des_loc": {"first_moment_sync_every": 4, "second_moment_sync_every": 4}}}
    des_loc = train("adam", (0.9, 0.95), method="des_loc", sync_every=4, **equal)
    mt_dao = train("qhadam", (0.9, 0.95), (1.0,), method="mt_dao", sync_every=4)
    halves = train(
        "qhadam",
        (0.9, 0.9, 0.95),
        (0.25, 0.5),
        method="mt_dao",
        sync_every=4,
        settings={"mt_dao": {"momentum_sync_every": [4, 4]}},
    )
    whole = train("qhadam", (0.9, 0.95), (0.75,), method="mt_dao", sync_every=4)
    for one, other in ((des_loc, mt_dao), (whole, halves)):
        for (mine, _), (theirs, _) in zip(one, other):
            for a, b in zip(mine, theirs):
                torch.testing.assert_close(a["x"], b["x"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "build, periods",
    [
        # ln 2 / 0.05 = 13.9 and ln 2 / 0.001 = 693.1, at the nearest multiple of 4.
        (lambda p: torch.optim.Adam(p, betas=(0.95, 0.999)), [4, 12, 692]),
        (lambda p: ADOPT(p, betas=(0.5, 0.9999)), [4, 4, 6932]),
        # The momentum of SGD and of Muon's matrices, and no second moment or that of the rest (0.99: 69.3).
        (lambda p: torch.optim.SGD(p, momentum=0.98), [4, 36, 24]),
        (lambda p: Muon(p, momentum=0.95, betas=(0.8, 0.99)), [4, 12, 68]),
        # Most elements decide, wherever they stand.
        (lambda p: torch.optim.Adam([{"params": p[1:]}, {"params": p[:1], "betas": (0.98, 0.9)}]), [4, 36, 8]),
        (lambda p: torch.optim.Adam([{"params": p[:1], "betas": (0.98, 0.9)}, {"params": p[1:]}]), [4, 36, 8]),
    ],
    ids=["adam", "adopt", "sgd", "muon", "groups", "groups the other way round"],
)
def test_periods_may_follow_the_half_lives(build, periods):
    def body(site, own):
        model = torch.nn.Linear(3, 2)
        optimizer = build([model.weight, model.bias])
        outer = outer_loop(
            model, optimizer, own, method="des_loc", sync_every=4, settings={"des_loc": {"half_life_periods": True}}
        )
        return [rule.period for rule in outer.plan.rules]

    assert run_sites(1, body) == [periods]


@pytest.mark.parametrize(
    "build, settings, state",
    [
        (lambda p: torch.optim.Adam(p, amsgrad=True), {"method": "local_adam"}, "max_exp_avg_sq"),
        (lambda p: torch.optim.NAdam(p), {"method": "des_loc"}, "mu_product"),
        (lambda p: torch.optim.Adamax(p), {"method": "des_loc"}, "exp_inf"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), {"method": "local_adam"}, "square_avg"),
        (lambda p: LowRankAdamW(p, rank=1), {"method": "des_loc"}, "low_exp_avg"),
        (
            lambda p: QHAdamW(p, betas=(0.9, 0.99, 0.999), omegas=(0.3, 0.3)),
            {"method": "mt_dao", "settings": {"mt_dao": {"momentum_sync_every": [4]}}},
            "exp_avg_1",
        ),
    ],
    ids=["amsgrad", "nadam", "adamax", "rmsprop", "lowrank", "mt_dao with too few periods"],
)
def test_states_that_a_method_would_leave_out_are_named(build, settings, state):
    def body(site, own):
        model = torch.nn.Linear(4, 4)
        with pytest.raises(ValueError, match=f"knows nothing of '{state}', which it keeps of (weight|bias)"):
            outer_loop(model, build(model.parameters()), own, sync_every=4, **settings)

    run_sites(1, body)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"method": "mt_dao", "settings": {"mt_dao": {"momentum_sync_every": []}}}, "momentum_sync_every = ()"),
        ({"method": "mt_dao", "settings": {"mt_dao": {"momentum_sync_every": [4, 0]}}}, "momentum_sync_every = (4, 0)"),
        (
            {"method": "diloco", "settings": {"mt_dao": {"momentum_sync_every": [4]}}},
            'left out unless method = "mt_dao"',
        ),
        (
            {"method": "des_loc", "settings": {"des_loc": {"half_life_periods": True, "first_moment_sync_every": 3}}},
            "half_life_periods = True",
        ),
        ({"method": "des_loc", "sync_point": "before"}, "sync_point = 'before'"),
        ({"method": "lordo", "error_feedback": True}, "error_feedback = True"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError) as caught:
        resolve(SemiSyncConfig(**settings))
    assert words in str(caught.value)
