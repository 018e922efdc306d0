"""Outer optimizers against their equations in float64, and that each of their operations is rounded once."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from titan_ext.optim import Yogi, exact
from titan_ext.optim.exact import ExactAdagrad, ExactAdam, ExactSGD, FedAdagrad, FedAdam, divide_

LR, BETAS, EPS, MOMENTUM = 0.05, (0.9, 0.99), 1e-3, 0.7
BUILT = {
    "sgd": lambda p: ExactSGD(p, lr=LR),
    "momentum": lambda p: ExactSGD(p, lr=LR, momentum=MOMENTUM),
    "nesterov": lambda p: ExactSGD(p, lr=LR, momentum=MOMENTUM, nesterov=True),
    "adam": lambda p: FedAdam(p, lr=LR, betas=BETAS, eps=EPS),
    "adagrad": lambda p: FedAdagrad(p, lr=LR, betas=BETAS, eps=EPS),
    "yogi": lambda p: Yogi(p, lr=LR, betas=BETAS, eps=EPS),
    "torch's adam": lambda p: ExactAdam(p, lr=LR, betas=BETAS, eps=EPS),
    "torch's adagrad": lambda p: ExactAdagrad(p, lr=LR, betas=BETAS, eps=EPS),
}
TORCHS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR),
    "momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=MOMENTUM),
    "nesterov": lambda p: torch.optim.SGD(p, lr=LR, momentum=MOMENTUM, nesterov=True),
    "torch's adam": lambda p: torch.optim.Adam(p, lr=LR, betas=BETAS, eps=EPS),
    "torch's adagrad": lambda p: torch.optim.Adagrad(p, lr=LR, eps=EPS),
}


def step(name: str, s: dict, g, n: int, one):
    """One step of the equations; ``one`` makes a number of the type that is computed in."""
    root, rest = np.sqrt, lambda beta: one(1 - beta)
    if name in ("sgd", "momentum", "nesterov"):
        mu = one(0 if name == "sgd" else MOMENTUM)
        s["v"] = s["v"] * mu + g
        s["x"] = s["x"] - (s["v"] * mu + g if name == "nesterov" else s["v"]) * one(LR)
        return
    if name == "torch's adagrad":
        s["v"] = s["v"] + g * g
        s["x"] = s["x"] - g / (root(s["v"]) + one(EPS)) * one(LR)
        return
    s["m"] = s["m"] * one(BETAS[0]) + g * rest(BETAS[0])
    if name == "adagrad":
        s["v"] = s["v"] + g * g
    elif name == "yogi":
        s["v"] = s["v"] - g * g * rest(BETAS[1]) * np.sign(s["v"] - g * g)
    else:
        s["v"] = s["v"] * one(BETAS[1]) + g * g * rest(BETAS[1])
    if name == "torch's adam":
        s["x"] = s["x"] - s["m"] / (root(s["v"]) / one(math.sqrt(1 - BETAS[1] ** n)) + one(EPS)) * one(
            LR / (1 - BETAS[0] ** n)
        )
        return
    s["x"] = s["x"] - s["m"] / (root(s["v"]) + one(EPS)) * one(LR)


def start(name: str, dtype, size: int) -> dict:
    x = np.random.default_rng(1).standard_normal(size).astype(dtype)
    first = EPS**2 if name in ("adam", "adagrad", "yogi") else 0.0
    return {"x": x, "m": np.zeros(size, dtype), "v": np.full(size, first, dtype)}


def gradients(dtype, size: int, steps: int):
    random = np.random.default_rng(2)
    return [(random.standard_normal(size) * 10.0 ** random.integers(-4, 1)).astype(dtype) for _ in range(steps)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", BUILT)
def test_steps_are_the_equations_and_in_fp32_to_the_bit(name, dtype, monkeypatch):
    """numpy rounds every operation once and knows no fused one: equal bits mean that nothing else happens here."""
    monkeypatch.setattr(exact, "_PIECE_ON_CPU", 300)
    size, steps, kind = 1003, 30, np.dtype(dtype).type
    s = start(name, dtype, size)
    parameters = [torch.nn.Parameter(part.clone()) for part in torch.from_numpy(s["x"].copy()).split([1000, 3])]
    optimizer = BUILT[name](parameters)
    for n, g in enumerate(gradients(dtype, size, steps), 1):
        step(name, s, g, n, kind)
        for parameter, part in zip(parameters, torch.from_numpy(g).split([1000, 3])):
            parameter.grad = part.clone()
        optimizer.step()
        got = torch.cat([parameter.detach() for parameter in parameters])
        if dtype == "float32":
            assert torch.equal(got, torch.from_numpy(s["x"])), n
        else:
            torch.testing.assert_close(got, torch.from_numpy(s["x"]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", TORCHS)
def test_steps_are_torchs_up_to_rounding(name):
    mine, theirs = (torch.nn.Parameter(torch.from_numpy(start(name, "float32", 50)["x"].copy())) for _ in range(2))
    optimizers = BUILT[name]([mine]), TORCHS[name]([theirs])
    for g in gradients("float32", 50, 30):
        mine.grad, theirs.grad = torch.from_numpy(g.copy()), torch.from_numpy(g.copy())
        for each in optimizers:
            each.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", [3.0, 0.1, 7e5, 1.0])
def test_a_quotient_is_no_product_with_the_reciprocal(by):
    values = torch.randn(10_000)
    assert divide_(values.clone(), by).tolist() == (values.numpy() / np.float32(by)).tolist()


@pytest.mark.parametrize("wrong", [dict(lr=-1), dict(lr=1, momentum=1.0), dict(lr=1, momentum=-0.1)])
def test_wrong_values_are_named(wrong):
    with pytest.raises(ValueError, match=[*wrong][-1]):
        ExactSGD([torch.nn.Parameter(torch.zeros(1))], **wrong)


def test_the_root_of_any_number_is_rounded_once():
    """All mantissas of two binades, which is all that a root depends on, and the edges."""
    values = torch.arange(0x3F800000, 0x40800000, 37, dtype=torch.int32).view(torch.float32)
    edges = torch.tensor([0.0, 1e-45, 1.17e-38, 3.4e38, math.inf])
    for each in (values, edges):
        assert torch.equal(exact.root(each), torch.from_numpy(np.sqrt(each.numpy())))


_ELSEWHERE = """
import hashlib, sys, torch
from tests.optim.test_exact import BUILT, gradients, start
digest = hashlib.sha256()
for name in BUILT:
    parameter = torch.nn.Parameter(torch.from_numpy(start(name, "float32", 5003)["x"].copy()))
    optimizer = BUILT[name]([parameter])
    for g in gradients("float32", 5003, 20):
        parameter.grad = torch.from_numpy(g)
        optimizer.step()
    digest.update(parameter.detach().numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())
"""


def test_another_instruction_set_comes_to_the_same_bits():
    seen = {}
    for capability in ("default", "avx2", ""):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        told = subprocess.run(
            [sys.executable, "-c", _ELSEWHERE], env=environment, capture_output=True, text=True, check=True
        )
        chosen, digest = told.stdout.split()
        seen[chosen] = digest
    assert "DEFAULT" in seen and len(set(seen.values())) == 1, seen
