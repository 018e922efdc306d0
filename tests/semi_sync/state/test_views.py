"""What the outer loop does to the inner optimizer's states on its own account."""

import pytest
import torch

from titan_ext.optim import ADOPT, QHSGDM, DeMo, LowRankAdamW, Muon, QHAdamW, Yogi
from titan_ext.semi_sync.state.views import materialize_state

DECAY = {"weight_decay": 0.3}
BUILT = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, **DECAY),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **DECAY),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, **DECAY),
    "adam, tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), **DECAY),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, **DECAY),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, **DECAY),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True, **DECAY),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.2, **DECAY),
    "yogi": lambda p: Yogi(p, lr=0.1),
    "adopt": lambda p: ADOPT(p, lr=0.1, **DECAY),
    "qhadam": lambda p: QHAdamW(p, lr=0.1, **DECAY),
    "qhsgdm": lambda p: QHSGDM(p, lr=0.1, **DECAY),
    "muon": lambda p: Muon(p, lr=0.1, **DECAY),
    "lowrank": lambda p: LowRankAdamW(p, lr=0.1, rank=2, **DECAY),
    "demo": lambda p: DeMo(p, lr=0.1, **DECAY),
}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(6, 4), (5,), ()]]


def train(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("name", BUILT)
def test_states_made_beforehand_change_no_step(name):
    mine, theirs = parameters(), parameters()
    primed, plain = BUILT[name](mine), BUILT[name](theirs)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in primed.param_groups]
    materialize_state(primed)
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs)), "the parameters moved"
    assert [{key: value for key, value in g.items() if key != "params"} for g in primed.param_groups] == groups
    for one, other in zip(train(primed, mine), train(plain, theirs)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["sgd", "adamw", "adopt", "qhadam", "muon", "lowrank"])
def test_states_of_parameters_that_had_no_gradient_yet_are_made_and_the_others_left(name):
    mine, theirs = parameters(), parameters()
    primed, plain = BUILT[name](mine), BUILT[name](theirs)
    for optimizer, each in ((primed, mine), (plain, theirs)):
        each[0].grad = torch.ones_like(each[0])
        optimizer.step()
    materialize_state(primed)
    assert (
        set(primed.state) == set(mine) and torch.equal(mine[0].grad, torch.ones_like(mine[0])) and mine[1].grad is None
    )
    for one, other in zip(train(primed, mine), train(plain, theirs)):
        assert torch.equal(one, other)
