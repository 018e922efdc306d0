"""Moments of sites that have taken unlike numbers of steps with a parameter, against float64 loops."""

import pytest
import torch

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.methods.test_local_methods import LR, START, gradient
from tests.semi_sync.sites import Meeting, outer_loop, run_sites
from titan_ext.optim import ADOPT, QHAdamW
from titan_ext.optim.switch import Switch, SwitchConfig

STEPS = 24
ABSENT = {
    "never first": lambda site, step: site == 1 and step <= 10,
    "now and then": lambda site, step: (step * (site + 2)) % 5 == 0 or (site == 2 and step % 2 == 0),
    "nobody at first": lambda site, step: step <= 5 or (site == 0 and step < 13),
    "one never": lambda site, step: site == 0,
}
BETAS = (0.9, 0.95)
BUILD = {
    "adam": lambda p: torch.optim.Adam(p, lr=LR, betas=BETAS),
    "fused": lambda p: torch.optim.AdamW(p, lr=LR, betas=BETAS, weight_decay=0.0, fused=True),
    "qhadam": lambda p: QHAdamW(p, lr=LR, betas=BETAS, omegas=(1.0,)),
    "adopt": lambda p: ADOPT(p, lr=LR, betas=BETAS),
}
KEYS = {name: ("exp_avg_0" if name == "qhadam" else "exp_avg", "exp_avg_sq") for name in BUILD}


def mass(name: str, key: str, steps: int) -> float:
    if name == "adopt":
        return 1.0 if key == "u" else float(steps > 0)
    return 1 - BETAS["uv".index(key)] ** steps


def inner_step(name: str, s: dict, g: torch.Tensor) -> None:
    if name == "adopt" and s["n"] == 0:
        s["v"], s["n"] = g * g, 1
        return
    if name == "adopt":
        c = (g / s["v"].sqrt().clamp(min=1e-6)).clamp(-(s["n"] ** 0.25), s["n"] ** 0.25)
        s["u"] = BETAS[0] * s["u"] + (1 - BETAS[0]) * c
        s["x"] = s["x"] - LR * s["u"]
        s["v"] = BETAS[1] * s["v"] + (1 - BETAS[1]) * g * g
        s["n"] += 1
        return
    s["n"] += 1
    s["u"] = BETAS[0] * s["u"] + (1 - BETAS[0]) * g
    s["v"] = BETAS[1] * s["v"] + (1 - BETAS[1]) * g * g
    s["x"] = s["x"] - LR * (s["u"] / (1 - BETAS[0] ** s["n"])) / ((s["v"] / (1 - BETAS[1] ** s["n"])).sqrt() + 1e-8)


def simulate(name: str, periods: dict[str, int], absent, weights: list[float]) -> list:
    """Sites agree on the moments corrected of their bias; with all of them comes the highest count."""
    sites = [{"x": START.clone(), "u": torch.zeros_like(START), "v": torch.zeros_like(START), "n": 0} for _ in weights]
    history = []
    for step in range(1, STEPS + 1):
        for site, s in enumerate(sites):
            if not absent(site, step):
                inner_step(name, s, gradient(site, step, s["x"]))
        due = [key for key in ("x", "u", "v") if step % periods[key] == 0]
        counts = [s["n"] for s in sites]
        for key in due:
            masses = [1.0 if key == "x" else mass(name, key, n) for n in counts]
            held = sum(w * m for w, m in zip(weights, masses))
            total = sum(w * s[key] for w, s in zip(weights, sites))
            for s, n in zip(sites, counts):
                goes_on = max(counts) if {"u", "v"} <= {*due} else n
                scale = 1.0 if key == "x" else mass(name, key, goes_on)
                s[key] = total / held * scale if held else total
        if {"u", "v"} <= {*due}:
            for s in sites:
                s["n"] = max(counts)
        history.append([{key: s[key] if key == "n" else s[key].clone() for key in s} for s in sites])
    return history


def train(name: str, absent, weights: list[float], **settings) -> list:
    def body(site, own):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(START.float())
        optimizer = BUILD[name]([model.weight])
        outer = outer_loop(model, optimizer, own, weighting="site", weight=weights[site], **settings)
        outer.join()
        history = []
        for step in range(1, STEPS + 1):
            model.weight.grad = None if absent(site, step) else gradient(site, step, model.weight.detach())
            optimizer.step()
            outer.step()
            state = optimizer.state[model.weight]
            seen = {short: state[key].clone() for short, key in zip("uv", KEYS[name])}
            history.append({"x": model.weight.detach().clone(), "n": int(state["step"]), **seen})
        return history

    return run_sites(len(weights), body)


CASES = [
    ("adam", "never first", [1.0, 1.0, 1.0], {"method": "local_adam", "sync_every": 4}, (4, 4, 4)),
    ("adam", "now and then", [1.0, 2.0, 0.5], {"method": "des_loc", "sync_every": 2}, (2, 6, 12)),
    ("adam", "nobody at first", [1.0, 1.0], {"method": "local_adam", "sync_every": 3}, (3, 3, 3)),
    ("fused", "one never", [1.0, 3.0], {"method": "local_adam", "sync_every": 4}, (4, 4, 4)),
    ("qhadam", "now and then", [1.0, 1.0, 1.0], {"method": "mt_dao", "sync_every": 4}, (4, 4, 4)),
    (
        "qhadam",
        "never first",
        [1.0, 1.0],
        {"method": "mt_dao", "sync_every": 2, "settings": {"mt_dao": {"second_moment_sync_every": 6}}},
        (2, 2, 6),
    ),
    ("adopt", "never first", [1.0, 1.0], {"method": "local_adam", "sync_every": 4}, (4, 4, 4)),
    ("adopt", "now and then", [1.0, 2.0, 1.0], {"method": "des_loc", "sync_every": 2}, (2, 6, 12)),
]


@pytest.mark.parametrize(
    "name, absent, weights, settings, periods", CASES, ids=[f"{case[0]}, {case[1]}" for case in CASES]
)
def test_sites_without_gradients_at_times(name, absent, weights, settings, periods):
    got = train(name, ABSENT[absent], weights, **settings)
    want = simulate(name, dict(zip("xuv", periods)), ABSENT[absent], weights)
    for site, history in enumerate(got):
        for step, seen in enumerate(history):
            expected = want[step][site]
            assert seen["n"] == expected["n"], (site, step + 1)
            for key in "xuv":
                torch.testing.assert_close(
                    seen[key].double(),
                    expected[key],
                    rtol=2e-4,
                    atol=1e-5,
                    msg=lambda m: f"{site} {step + 1} {key}: {m}",
                )


def test_a_site_that_sat_a_round_out_goes_on_like_the_others():
    """After a round's mean the next step from equal gradients is equal, bit for bit."""

    def body(site, own):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(START.float())
        optimizer = BUILD["adam"]([model.weight])
        outer = outer_loop(model, optimizer, own, method="local_adam", sync_every=3, sites_per_round=1, name=f"s{site}")
        outer.join()
        sat_out, counts = 0, []
        for step in range(1, 13):
            sat_out += outer.sits_out
            if not outer.sits_out:
                model.weight.grad = gradient(site, step, model.weight.detach())
                optimizer.step()
            outer.step()
            counts.append(int(optimizer.state[model.weight]["step"]))
        model.weight.grad = gradient(0, 99, model.weight.detach())
        optimizer.step()
        return sat_out, counts[2::3], model.weight.detach()

    results = run_sites(3, body)
    assert all(sat_out > 0 for sat_out, _, _ in results)
    assert [counts for _, counts, _ in results] == [[3, 6, 9, 12]] * 3
    assert all(torch.equal(results[0][2], value) for _, _, value in results)


def test_a_newcomer_takes_the_count_of_the_moments_and_not_the_runs_step():
    """After a switch that begins the moments anew the count is below the inner step."""
    meeting, switched = Meeting(), 4

    def body(site, own):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(START.float())
        optimizer = BUILD["adam"]([model.weight])
        switch = Switch(SwitchConfig(step=switched, reset_states=["exp_avg", "exp_avg_sq"]), [optimizer])
        outer = outer_loop(model, optimizer, own, method="local_adam", sync_every=2)
        outer.join()
        while outer.inner_step < 14:
            switch.before_step(outer.inner_step)
            if site == 0 and outer.inner_step == 7:
                meeting.arrive()
                wait_for_requests(own.lighthouse, 2)
            model.weight.grad = gradient(site, outer.inner_step + 1, model.weight.detach())
            optimizer.step()
            outer.step()
        return int(optimizer.state[model.weight]["step"]), model.weight.detach(), outer.ledger.rounds

    results = run_sites(3, body, min_sites=2, before=lambda index: meeting.wait() if index == 2 else None)
    assert [steps for steps, _, _ in results] == [14 - switched] * 3
    assert all(torch.equal(results[0][1], value) for _, value, _ in results)
    assert results[2][2] < results[0][2]
