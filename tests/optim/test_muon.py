"""Muon: what its iterations give, what it leaves to AdamW, and that cutting a matrix changes nothing."""

import os

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn

from titan_ext.launcher.placement import free_port
from titan_ext.optim import DeMo, Muon
from titan_ext.optim.muon import _COEFFICIENTS, orthonormalized


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 5)])
def test_singular_values_come_to_about_one(shape):
    generator = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))
    spectrum = torch.logspace(0, -2.5, min(shape))  # down to 0.00316 of the largest
    got = torch.linalg.svdvals(orthonormalized(left * (7 * spectrum) @ right.mT, torch.float32))
    want = (spectrum / spectrum.norm()).double()
    for a, b, c in _COEFFICIENTS:
        want = a * want + b * want**3 + c * want**5
    torch.testing.assert_close(got, want.sort(descending=True).values.float(), rtol=1e-3, atol=1e-3)
    assert got.min() > 0.9 and got.max() < 1.15
    torch.testing.assert_close(orthonormalized(torch.zeros(shape)), torch.zeros(shape))


def test_step_is_its_equation():
    generator = torch.Generator().manual_seed(2)
    parameter = nn.Parameter(torch.randn(6, 4, generator=generator))
    optimizer = Muon([parameter], lr=0.1, momentum=0.9, weight_decay=0.3)
    theta, momentum = parameter.detach().clone(), torch.zeros(6, 4)
    for _ in range(5):
        gradient = torch.randn(6, 4, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + gradient
        theta = theta * (1 - 0.1 * 0.3) - 0.1 * (6 / 4) ** 0.5 * orthonormalized(momentum)
        torch.testing.assert_close(parameter.detach(), theta)


def test_embeddings_norms_and_the_head_are_left_to_adamw():
    shapes = {
        "tok_embeddings.weight": (6, 4),
        "norm.weight": (4,),
        "output.weight": (6, 4),
        "layers.0.wq.weight": (4, 4),
    }
    torch.manual_seed(3)
    mine = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    theirs = {name: nn.Parameter(value.detach().clone()) for name, value in mine.items()}
    optimizer = Muon(
        [{"params": list(mine.values()), "param_names": list(mine)}], lr=0.1, adamw_lr=0.5, weight_decay=0.2
    )
    adamw = torch.optim.AdamW(theirs.values(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.2)
    for _ in range(4):
        for name in shapes:
            mine[name].grad = torch.randn(shapes[name])
            theirs[name].grad = mine[name].grad.clone()
        optimizer.step()
        adamw.step()
    for name in shapes:
        assert torch.allclose(mine[name], theirs[name]) == (name != "layers.0.wq.weight"), name
    assert set(optimizer.state[mine["layers.0.wq.weight"]]) == {"momentum_buffer"}


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        (Muon, {"lr": -1}, "lr = -1"),
        (Muon, {"momentum": 1.0}, "momentum = 1.0"),
        (Muon, {"weight_decay": -0.1}, "weight_decay = -0.1"),
        (Muon, {"adamw_lr": -2}, "adamw_lr = -2"),
        (Muon, {"betas": (0.9, 1.0)}, "betas"),
        (DeMo, {"lr": -1}, "lr = -1"),
        (DeMo, {"beta": 1.0}, "beta = 1.0"),
        (DeMo, {"weight_decay": -1}, "weight_decay = -1"),
    ],
)
def test_bad_settings_are_named(optimizer, settings, message):
    with pytest.raises(ValueError, match=message):
        optimizer([nn.Parameter(torch.zeros(2))], **settings)


def _train(parameter: torch.Tensor, optimizer_of) -> list[torch.Tensor]:
    """Three steps with gradients that all know."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    optimizer = optimizer_of([parameter])
    generator = torch.Generator().manual_seed(5)
    seen = []
    for _ in range(3):
        gradient = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
        optimizer.step()
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        seen.append(whole.detach().clone())
    return seen


def _sharded(rank: int, port: int, results) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for placement in (Shard(0), Shard(1)):
        for optimizer in (Muon, DeMo):
            value = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
            parameter = nn.Parameter(distribute_tensor(value, mesh, [placement]))
            seen = _train(parameter, optimizer)
            if rank == 0:
                results[f"{optimizer.__name__} {placement.dim}"] = [each.numpy() for each in seen]
    dist.barrier()
    # Gloo's threads sometimes abort a process that takes its time to exit.
    os._exit(0)


def test_cut_matrices_take_the_same_steps():
    port = free_port()
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_sharded, (port, results), nprocs=2)
        results = dict(results)
    for optimizer in (Muon, DeMo):
        value = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
        want = _train(nn.Parameter(value), optimizer)
        for dim in (0, 1):
            for got, expected in zip(results[f"{optimizer.__name__} {dim}"], want):
                torch.testing.assert_close(torch.from_numpy(got), expected)
