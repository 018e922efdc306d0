"""The switch after warm-up: new decays and weights, states zeroed, the learning rate scaled (M3)."""

import pytest
import torch
from torch import nn

from titan_ext.optim import QHAdamW
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
