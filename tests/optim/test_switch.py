"""The switch after warm-up: new decays and weights, states zeroed, the learning rate scaled (M3)."""

import pytest
import torch
from torch import nn

from titan_ext.optim import ADOPT, QHADOPT, LowRankAdamW, Muon, QHAdamW
from titan_ext.optim.switch import Switch, SwitchConfig

SWITCH = {"step": 4, "betas": [0.99, 0.999], "omegas": [0.9], "reset_states": ["exp_avg_0"], "lr_scale": 2.0}


class Run:
    """An optimizer with a schedule, stepped as a trainer does."""

    def __init__(self, taken: int = 0, **settings) -> None:
        torch.manual_seed(0)
        self.parameter = nn.Parameter(torch.randn(3))
        self.optimizer = QHAdamW([self.parameter], lr=0.1, betas=(0.9, 0.999), omegas=(1.0,))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.switch = Switch(SwitchConfig(**settings), [self.optimizer], [self.schedule])
        self.taken = taken

    def step(self) -> dict:
        self.switch.before_step(self.taken)
        group = self.optimizer.param_groups[0]
        seen = {"lr": group["lr"], "betas": group["betas"], "omegas": group["omegas"]}
        seen["moment"] = self.optimizer.state[self.parameter].get("exp_avg_0", torch.zeros(3)).clone()
        self.parameter.grad = torch.full((3,), 1.0 + self.taken)
        self.optimizer.step()
        self.schedule.step()
        self.taken += 1
        return seen


def test_m3_everything_changes_at_the_step_and_once():
    run = Run(**SWITCH)
    seen = [run.step() for _ in range(8)]
    for taken, each in enumerate(seen):
        switched = taken >= 4
        assert each["lr"] == pytest.approx(0.1 / (1 + taken) * (2 if switched else 1))
        assert each["betas"] == ((0.99, 0.999) if switched else (0.9, 0.999))
        assert each["omegas"] == ((0.9,) if switched else (1.0,))
        assert torch.equal(each["moment"], torch.zeros(3)) == (taken in (0, 4))
    second = run.optimizer.state[run.parameter]["exp_avg_sq"]
    assert (second > 0).all(), "what is not named is kept"


def test_a_run_that_resumes_behind_the_switch_keeps_its_states():
    run = Run(taken=6, **SWITCH)
    run.optimizer.state[run.parameter]["exp_avg_0"] = torch.ones(3)
    run.optimizer.state[run.parameter]["exp_avg_sq"] = torch.ones(3)
    run.optimizer.state[run.parameter]["step"] = torch.tensor(6.0)
    run.schedule.last_epoch = 6
    seen = run.step()
    assert seen["betas"] == (0.99, 0.999) and torch.equal(seen["moment"], torch.ones(3))
    assert seen["lr"] == pytest.approx(2 * 0.1 / 7)


def test_never_is_the_default():
    run, plain = Run(), Run(step=0)
    for _ in range(5):
        assert run.step()["lr"] == plain.step()["lr"]
    assert run.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"step": -1}, "step = -1"),
        ({"step": 3, "lr_scale": 0.0}, "lr_scale = 0.0"),
        ({"betas": [0.9, 0.99]}, "step = 0: must be above 0 where betas is given"),
        ({"step": 3, "betas": [0.9]}, r"betas = \[0.9\]: must be 2 number"),
        ({"step": 3, "betas": [0.9, 1.0]}, "from 0 to below 1"),
        ({"step": 3, "omegas": [0.5, 0.4]}, r"omegas = \[0.5, 0.4\]: must be 1 number"),
        ({"step": 3, "omegas": [1.5]}, "omegas"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Run(**settings)


BUILT = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.999), weight_decay=0.0), ["exp_avg", "exp_avg_sq"]),
    "qhadam": (
        lambda p: QHAdamW(p, lr=0.1, betas=(0.9, 0.99, 0.999), omegas=(0.5, 0.4)),
        ["exp_avg_0", "exp_avg_1", "exp_avg_sq"],
    ),
    "adopt": (lambda p: ADOPT(p, lr=0.1, betas=(0.9, 0.9999)), ["exp_avg", "exp_avg_sq"]),
    "qhadopt": (lambda p: QHADOPT(p, lr=0.1, betas=(0.9, 0.999)), ["exp_avg_0", "exp_avg_sq"]),
    "muon": (lambda p: Muon(p, lr=0.1), ["momentum_buffer", "exp_avg", "exp_avg_sq"]),
    "lowrank": (
        lambda p: LowRankAdamW(p, lr=0.1, betas=(0.999, 0.999), rank=2, error_feedback=False, basis_from="outer"),
        ["low_exp_avg", "low_exp_avg_sq", "exp_avg", "exp_avg_sq"],
    ),
}


def gradients(step: int, parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("before", [1, 10, 4000])
@pytest.mark.parametrize("name", BUILT)
def test_with_all_moments_zeroed_the_next_steps_are_a_fresh_optimizers(name, before):
    build, moments = BUILT[name]
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3))]
    optimizer = build(mine)
    for step in range(min(before, 3)):
        gradients(step, mine)
        optimizer.step()
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(before)
    theirs = [nn.Parameter(each.detach().clone()) for each in mine]
    fresh = build(theirs)
    if name == "lowrank":
        fresh.set_basis(theirs[0], optimizer.state[mine[0]]["basis"])
    switch = Switch(SwitchConfig(step=before, reset_states=moments), [optimizer])
    for step in range(before, before + 3):
        switch.before_step(step)
        gradients(step, mine)
        gradients(step, theirs)
        optimizer.step()
        fresh.step()
        for one, other in zip(mine, theirs):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("steps, old, new", [(1, (0.9, 0.95), (0.99, 0.9999)), (30, (0.9, 0.9999), (0.5, 0.95))])
def test_what_is_kept_under_another_decay_keeps_its_corrected_value(steps, old, new):
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=old)
    for step in range(steps):
        gradients(step, [parameter])
        optimizer.step()
    state = optimizer.state[parameter]

    def corrected():
        betas = optimizer.param_groups[0]["betas"]
        return [state[key].double() / (1 - beta**steps) for key, beta in zip(("exp_avg", "exp_avg_sq"), betas)]

    before = corrected()
    Switch(SwitchConfig(step=steps, betas=list(new)), [optimizer]).before_step(steps)
    assert optimizer.param_groups[0]["betas"] == new
    torch.testing.assert_close(corrected(), before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", list(BUILT))
def test_a_second_moment_does_not_begin_anew_alone(name):
    build, moments = BUILT[name]
    parameters = [nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(3))]
    second = [key for key in moments if key.endswith("_sq")][:1]
    with pytest.raises(ValueError, match=r"reset_states = .*exp_avg_sq.*must name '(low_)?exp_avg"):
        Switch(SwitchConfig(step=3, reset_states=second), [build(parameters)])
    with pytest.raises(ValueError, match="'exp_avg_7' must be one of"):
        Switch(SwitchConfig(step=3, reset_states=["exp_avg_7"]), [build(parameters)])


def test_two_momenta_after_warm_up_are_those_of_the_authors_runs():
    """Weights [1, 0] to [.05, .95], betas [.9, .999, .999], both momenta from zero, twice the rate; steps are counted on.

    Against the equations of MT-DAO's Adam in plain loops, every momentum divided by its own 1 - beta^n.
    """
    parameter = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = QHAdamW([parameter], lr=0.01, betas=(0.9, 0.9, 0.999), omegas=(1.0, 0.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    settings = {"betas": [0.9, 0.999, 0.999], "omegas": [0.05, 0.95], "reset_states": ["exp_avg_0", "exp_avg_1"]}
    switch = Switch(SwitchConfig(step=3, lr_scale=2.0, **settings), [optimizer], [schedule])
    x, u, v = [1.0, -2.0], [[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]
    betas, omegas, rate = (0.9, 0.9), (1.0, 0.0), 0.01
    for taken in range(8):
        if taken == 3:
            betas, omegas, rate, u = (0.9, 0.999), (0.05, 0.95), 0.02, [[0.0, 0.0], [0.0, 0.0]]
        gradient = [1.0 + taken, 0.5 * (-1) ** taken]
        for i, g in enumerate(gradient):
            v[i] = 0.999 * v[i] + 0.001 * g * g
            step = (1 - sum(omegas)) * g
            for j, (beta, omega) in enumerate(zip(betas, omegas)):
                u[j][i] = beta * u[j][i] + (1 - beta) * g
                step += omega * u[j][i] / (1 - beta ** (taken + 1))
            x[i] -= rate * step / ((v[i] / (1 - 0.999 ** (taken + 1))) ** 0.5 + 1e-8)
        switch.before_step(taken)
        assert schedule.get_last_lr() == [rate], "what is logged of the step"
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        schedule.step()
        assert parameter.tolist() == pytest.approx(x, rel=1e-9), taken
