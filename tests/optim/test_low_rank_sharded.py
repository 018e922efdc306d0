"""LowRankAdamW on DTensors: however a matrix is cut, it takes the steps of the whole one."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from titan_ext.launcher.placement import free_port
from titan_ext.optim import LowRankAdamW
from titan_ext.optim.projection import projection, random_basis
from titan_ext.semi_sync.state.views import materialize_state

SHAPES = ((7, 4), (4, 7), (9,))
SETTINGS = {"lr": 0.1, "betas": (0.9, 0.97), "rank": 2, "omega": 0.9, "weight_decay": 0.1, "refresh_every": 3}
LOW = ("basis", "low_exp_avg", "low_exp_avg_sq", "error")
# How matrices are cut over a mesh of two processes, and over one of two by two.
CUTS = {
    2: [[Shard(0)], [Shard(1)], [Replicate()]],
    4: [
        [Shard(0), Shard(1)],
        [Shard(1), Shard(0)],
        [_StridedShard(0, split_factor=2), Shard(0)],
        [_StridedShard(1, split_factor=2), Shard(1)],
        [Replicate(), Shard(0)],
        [Shard(1), Replicate()],
    ],
}


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_cut(value, mesh, placements):
    """``value``, which all ranks have, as a DTensor; of vectors only rows can be cut."""
    if mesh is None:
        return value
    placements = [Shard(0) if each == Shard(1) and value.dim() == 1 else each for each in placements]
    if value.dim() == 1:
        placements = [Replicate() if isinstance(each, _StridedShard) else each for each in placements]
    whole = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, placements)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def steps(mesh=None, placements=()):
    """Parameters and low-rank state, whole, after nine steps with two bases from outside; and the optimizer."""
    parameters = [
        nn.Parameter(as_cut(randn(*shape, seed=place), mesh, placements)) for place, shape in enumerate(SHAPES)
    ]
    optimizer = LowRankAdamW(parameters, **SETTINGS)
    materialize_state(optimizer)
    for n in range(9):
        for place, parameter in enumerate(parameters):
            gradient = randn(*parameter.shape, seed=100 + 10 * n + place)
            if n == 0 and gradient.dim() == 2:
                gradient[:, 1:] = gradient[1:] = 0  # all ranks but one have a gradient of zeros, and go along
            if mesh is not None and all(each == Replicate() for each in placements):
                # A sum still to be done, as sequence parallelism leaves it.
                share = gradient * (0.25 if mesh.get_coordinate()[0] else 0.75)
                parameter.grad = DTensor.from_local(share, mesh, [Partial()], run_check=False)
            else:
                parameter.grad = as_cut(gradient, mesh, placements)
        optimizer.step()
        if n in (4, 7):
            changed = [optimizer.set_basis(each, random_basis(4, 2)) for each in parameters[:2]]
            assert changed == [True] * 2
            assert not optimizer.set_basis(parameters[0], random_basis(4, 2))
    states = [optimizer.state[each] for each in parameters[:2]]
    return [*map(whole, parameters), *(whole(state[key]) for state in states for key in LOW)], optimizer


def same_everywhere(tensor):
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.contiguous())
    return all(torch.equal(tensor, other) for other in others)


def hand_cut(rank, world):
    mesh = init_device_mesh("cpu", (2, 2) if world == 4 else (2,))
    expected, _ = steps()
    for placements in CUTS[world]:
        got, optimizer = steps(mesh, placements)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, msg=lambda text: f"{placements}: {text}")
            assert same_everywhere(one), placements
        for parameter in optimizer.low_rank_parameters().values():
            assert all(isinstance(optimizer.state[parameter][key], DTensor) for key in LOW)
            assert optimizer.state[parameter]["error"].placements == parameter.placements
        matrix = randn(6, 8, seed=1)
        for iterations in (0, 2):
            basis = projection(as_cut(matrix, mesh, placements), 3, iterations)
            torch.testing.assert_close(basis, projection(matrix, 3, iterations))
            assert same_everywhere(basis)
        assert torch.equal(projection(as_cut(0 * matrix, mesh, placements), 3), random_basis(6, 3))


def model(mesh=None):
    """Two matrices and two biases; over a mesh of two dimensions, FSDP around tensor parallelism."""
    layers = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 8)).double()
    with torch.no_grad():
        for place, parameter in enumerate(layers.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=place))
    if mesh is not None and mesh.ndim == 2:
        layers = parallelize_module(layers, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(layers, mesh=mesh["dp"])
    elif mesh is not None:
        fully_shard(layers, mesh=mesh)
    named = dict(layers.named_parameters())
    group = {"params": [*named.values()], "param_names": [*named]}
    return layers, LowRankAdamW([group], **SETTINGS)


def learn(layers, optimizer, ticks):
    for n in ticks:
        optimizer.zero_grad()
        layers(randn(5, 6, seed=n)).square().mean().backward()
        optimizer.step()
    return [whole(each) for each in layers.parameters()]


def fsdp_over_tensor_parallel(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layers, optimizer = model(mesh)
    cuts = [each.placements for each in layers.parameters() if each.dim() == 2]
    assert any(isinstance(placement, _StridedShard) for cut in cuts for placement in cut), cuts
    plain, plains = model()
    for one, other in zip(learn(layers, optimizer, range(7)), learn(plain, plains, range(7)), strict=True):
        torch.testing.assert_close(one, other)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = {"model": layers.state_dict(), "optimizer": get_optimizer_state_dict(layers, optimizer, options=options)}
    checkpoint.save(saved, checkpoint_id=folder)
    # Loaded by FSDP alone, which cuts everything otherwise.
    layers, optimizer = model(init_device_mesh("cpu", (4,)))
    loaded = {"model": layers.state_dict(), "optimizer": get_optimizer_state_dict(layers, optimizer, options=options)}
    checkpoint.load(loaded, checkpoint_id=folder)
    layers.load_state_dict(loaded["model"])
    set_optimizer_state_dict(layers, optimizer, loaded["optimizer"], options=options)
    for parameter, other in zip(layers.parameters(), plain.parameters(), strict=True):
        assert optimizer.state[parameter].keys() == plains.state[other].keys()
        for key, value in plains.state[other].items():
            if key != "basis":
                torch.testing.assert_close(whole(optimizer.state[parameter][key]), value, atol=1e-9, rtol=1e-6)
    for one, other in zip(learn(layers, optimizer, range(7, 11)), learn(plain, plains, range(7, 11)), strict=True):
        torch.testing.assert_close(one, other)


def process(rank, world, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    hand_cut(rank, world)
    if world == 4:
        fsdp_over_tensor_parallel(rank, folder)
    dist.barrier()
    # Gloo's threads sometimes abort a process that takes its time to exit.
    os._exit(0)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_cut_matrices_take_the_same_steps(world, tmp_path):
    port = free_port()
    multiprocessing.spawn(process, (world, port, str(tmp_path)), nprocs=world)
