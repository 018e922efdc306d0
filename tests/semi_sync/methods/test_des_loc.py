"""Local Adam and DES-LOC against a float64 reference in plain loops (papers' equations, post-step order)."""

import math

import pytest
import torch

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, outer_loop, run_sites
from titan_ext.semi_sync import PARAMETERS, SemiSyncConfig, resolve

SITES, STEPS, SIZE = 4, 50, 3
LR, BETA1, BETA2, EPS = 0.02, 0.9, 0.95, 1e-8


def gradient(site: int, step: int, values: list[float]) -> list[float]:
    """Of a quadratic of the site's own, with a step-dependent target."""
    return [(1 + 0.2 * site) * (x - 0.3 * i * (site - 1) - 0.1 * math.sin(step + site)) for i, x in enumerate(values)]


def reference(periods: dict[str, int], outer: dict[str, float] | None = None, sites: int = SITES):
    """Per step and site: x, u, v; Adam with bias correction, then the averages that are due."""
    start = [0.5, -1.0, 2.0]
    state = [{"params": list(start), "exp_avg": [0.0] * SIZE, "exp_avg_sq": [0.0] * SIZE} for _ in range(sites)]
    theta, velocity = list(start), [0.0] * SIZE
    history = []
    for n in range(1, STEPS + 1):
        for site, s in enumerate(state):
            for i, g in enumerate(gradient(site, n, s["params"])):
                s["exp_avg"][i] = BETA1 * s["exp_avg"][i] + (1 - BETA1) * g
                s["exp_avg_sq"][i] = BETA2 * s["exp_avg_sq"][i] + (1 - BETA2) * g * g
                m, v = s["exp_avg"][i] / (1 - BETA1**n), s["exp_avg_sq"][i] / (1 - BETA2**n)
                s["params"][i] -= LR * m / (math.sqrt(v) + EPS)
        for key, period in periods.items():
            if n % period:
                continue
            mean = [sum(s[key][i] for s in state) / sites for i in range(SIZE)]
            if key == "params" and outer:
                for i in range(SIZE):
                    delta = theta[i] - mean[i]
                    velocity[i] = outer["momentum"] * velocity[i] + delta
                    theta[i] -= outer["lr"] * (delta + outer["momentum"] * velocity[i])
                mean = list(theta)
            for s in state:
                s[key] = list(mean)
        history.append([{key: list(value) for key, value in s.items()} for s in state])
    return history


def train(index, own, steps=STEPS, **settings):
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
    optimizer = torch.optim.Adam([model.weight], lr=LR, betas=(BETA1, BETA2), eps=EPS)
    outer = outer_loop(model, optimizer, own, **settings)
    outer.join()
    history = []
    while outer.inner_step < steps:
        model.weight.grad = torch.tensor(gradient(index, outer.inner_step + 1, model.weight.tolist()))
        optimizer.step()
        outer.step()
        state = optimizer.state[model.weight]
        history.append(
            {
                "params": model.weight.tolist(),
                "exp_avg": state["exp_avg"].tolist(),
                "exp_avg_sq": state["exp_avg_sq"].tolist(),
            }
        )
    return history, outer.ledger


@pytest.mark.parametrize(
    "settings, periods, outer",
    [
        (dict(method="local_adam", sync_every=5), (5, 5, 5), None),
        (dict(method="des_loc", sync_every=2), (2, 6, 12), None),
        (
            dict(
                method="des_loc",
                sync_every=4,
                settings={"des_loc": {"first_moment_sync_every": 3, "second_moment_sync_every": 7}},
            ),
            (4, 3, 7),
            None,
        ),
        (
            dict(
                method="des_loc", sync_every=4, outer_optimizer="sgd", outer_lr=0.8, outer_momentum=0.5, nesterov=True
            ),
            (4, 12, 24),
            dict(lr=0.8, momentum=0.5),
        ),
        (dict(method="des_loc", sync_every=4, outer_optimizer="sgd"), (4, 12, 24), dict(lr=1.0, momentum=0.9)),
        (dict(method="local_adam", sync_every=5, outer_optimizer="sgd"), (5, 5, 5), dict(lr=1.0, momentum=0.9)),
    ],
    ids=["local_adam", "des_loc", "own-periods", "des_loc-nesterov", "des_loc-papers-nesterov", "local_adam-nesterov"],
)
def test_every_state_at_every_step(settings, periods, outer):
    results = run_sites(SITES, lambda index, own: train(index, own, **settings))
    want = reference(dict(zip(("params", "exp_avg", "exp_avg_sq"), periods)), outer)
    for site, (history, _) in enumerate(results):
        for step in range(STEPS):
            for key, values in want[step][site].items():
                assert history[step][key] == pytest.approx(values, rel=2e-5, abs=2e-6), (site, step + 1, key)
    sent = sum(4 * SIZE * (STEPS // period) for period in periods)
    # Of what does not divide by the sites some own an element more.
    assert sum(ledger.bytes_sent for _, ledger in results) == 2 * sent * (SITES - 1)


def test_default_periods_halve_the_bytes_of_local_adam():
    """T12: 1/K + 1/3K + 1/6K against 3/K."""

    def exchanges(config):
        plan = resolve(config)
        return sum(len(plan.due(step)) for step in range(1, 6 * 16 * 4 + 1))

    assert exchanges(SemiSyncConfig(method="des_loc")) * 2 == exchanges(SemiSyncConfig(method="local_adam"))


def test_newcomer_gets_the_mean_of_the_moments_and_the_step_count():
    """Whatever is due, the round that takes a site in also carries the moments."""
    newcomer_may_come = Meeting()
    joined = {}

    def before(index):
        if index == 2:
            newcomer_may_come.wait()

    def body(index, own):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        optimizer = torch.optim.Adam([model.weight], lr=LR, betas=(BETA1, BETA2), eps=EPS)
        outer = outer_loop(
            model,
            optimizer,
            own,
            method="des_loc",
            sync_every=2,
            settings={"des_loc": {"first_moment_sync_every": 100, "second_moment_sync_every": 100}},
        )
        outer.join()
        state = optimizer.state[model.weight]
        if index == 2:
            joined["clock"] = outer.inner_step
        while outer.inner_step < 12:
            if outer.inner_step == joined.get("clock"):
                break
            if index == 0 and outer.inner_step == 4:
                newcomer_may_come.arrive()
                wait_for_requests(own.lighthouse, 2)  # of the newcomer and of site 1, which is ahead
            model.weight.grad = torch.tensor(gradient(index, outer.inner_step + 1, model.weight.tolist()))
            optimizer.step()
            before_round = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
            outer.step()
            if outer.ledger.last is not None and outer.ledger.last.sites == 3:
                break
        else:
            raise AssertionError("the newcomer never came")
        own_moments = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
        return own_moments, before_round if index < 2 else None, float(state["step"]), outer.inner_step

    results = run_sites(3, body, min_sites=2, before=before)
    for key in ("exp_avg", "exp_avg_sq"):
        mean = (results[0][1][key] + results[1][1][key]) / 2
        for moments, _, _, _ in results:
            torch.testing.assert_close(moments[key], mean)
    assert len({clock for _, _, _, clock in results}) == 1
    assert {step for _, _, step, _ in results} == {float(results[0][3])}
    assert PARAMETERS == "params"


def test_t19_a_site_that_dies_between_syncs_is_missing_in_the_next_mean_and_nowhere_else():
    """All three states of the survivors are the mean over the survivors; their local steps all count."""

    def body(index, own):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        optimizer = torch.optim.Adam([model.weight], lr=LR, betas=(BETA1, BETA2), eps=EPS)
        outer = outer_loop(
            model,
            optimizer,
            own,
            method="des_loc",
            sync_every=2,
            settings={"des_loc": {"first_moment_sync_every": 2, "second_moment_sync_every": 2}},
        )
        outer.join()
        state = optimizer.state[model.weight]

        def values():
            return [each.detach().clone() for each in (model.weight, state["exp_avg"], state["exp_avg_sq"])]

        seen = []
        while outer.inner_step < 6:
            if index == 2 and outer.inner_step == 5:
                own.shutdown(wait=False)  # its heartbeats end
                return None
            model.weight.grad = torch.tensor(gradient(index, outer.inner_step + 1, model.weight.tolist()))
            optimizer.step()
            mine = values()
            outer.step()
            seen.append((mine, values(), outer.ledger.last.participants if outer.ledger.last else 0))
        return seen

    *survivors, dead = run_sites(3, body, min_sites=2)
    assert dead is None
    assert [each[5][2] for each in survivors] == [2, 2] and survivors[0][3][2] == 3
    for key in range(3):
        mean = (survivors[0][5][0][key] + survivors[1][5][0][key]) / 2
        for survivor in survivors:
            assert torch.equal(survivor[5][1][key], survivors[0][5][1][key])
            torch.testing.assert_close(survivor[5][1][key], mean)
