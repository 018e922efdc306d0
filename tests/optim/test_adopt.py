"""ADOPT against its equations in float64 and plain loops; it and its relatives on sharded parameters."""

import copy
import io
import math
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from titan_ext.optim import ADOPT, QHADOPT, QHSGDM, QHAdamW
from titan_ext.semi_sync.state.views import materialize_state

SHAPES = ((3, 2), (4,))


def reference(x, gradients, lr, betas=(0.95, 0.9999), eps=1e-6, clip_exponent=0.25, weight_decay=0.0):
    """The parameters after each gradient (Algorithm 3 of DES-LOC as its authors run it), in plain numbers."""
    x, m, v, rows = list(x), [0.0] * len(x), [0.0] * len(x), []
    for n, g in enumerate(gradients):
        for i, gi in enumerate(g):
            if n == 0:
                v[i] = gi * gi
                continue
            bound = n**clip_exponent if clip_exponent < math.inf else math.inf
            c = min(max(gi / max(math.sqrt(v[i]), eps), -bound), bound)
            m[i] = betas[0] * m[i] + (1 - betas[0]) * c
            x[i] = x[i] - lr * weight_decay * x[i] - lr * m[i]
            v[i] = betas[1] * v[i] + (1 - betas[1]) * gi * gi
        rows.append(list(x))
    return rows


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(each, generator=generator, dtype=torch.float64) for each in SHAPES]
    return [torch.nn.Parameter(each.to(dtype)) for each in values]


def flat(tensors):
    return torch.cat([each.detach().flatten() for each in tensors]).tolist()


def gradients(steps):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(steps, 10, generator=generator, dtype=torch.float64)
    # Of many sizes, so that some are clipped; and one entry that starts at 0, which eps has to hold.
    rows *= (1 + torch.arange(steps) % 7)[:, None] ** 2
    rows[0, 3] = 0
    return rows


def train(optimizer, rows):
    trail, tensors = [], optimizer.param_groups[0]["params"]
    for row in rows:
        for each, part in zip(tensors, row.split([each.numel() for each in tensors])):
            each.grad = part.view_as(each).to(each.dtype)
        optimizer.step()
        trail.append(flat(tensors))
    return trail


@pytest.mark.parametrize(
    "settings",
    [
        dict(lr=0.05),
        dict(lr=0.05, betas=(0.9, 0.99), weight_decay=0.1),
        dict(lr=0.01, betas=(0.0, 0.9), eps=0.5, clip_exponent=math.inf),
        dict(lr=0.02, betas=(0.8, 0.95), clip_exponent=0.0, weight_decay=0.5),
    ],
)
def test_equals_the_equations(settings):
    optimizer = ADOPT(parameters(), **settings)
    wanted = reference(flat(parameters()), gradients(30).tolist(), **settings)
    for row, want in zip(train(optimizer, gradients(30)), wanted, strict=True):
        assert row == pytest.approx(want, rel=1e-11)


def test_the_first_step_moves_nothing():
    optimizer = ADOPT(parameters(), lr=0.1, weight_decay=0.1)
    assert train(optimizer, gradients(1)) == [flat(parameters())]
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == 1
    assert not state["exp_avg"].any()
    assert torch.equal(state["exp_avg_sq"], gradients(1)[0, 6:] ** 2)


def create_as_torch(optimizer):
    """torch's way, and torchtitan's: the step count is not set back."""
    get_optimizer_state_dict(torch.nn.ParameterList(optimizer.param_groups[0]["params"]), optimizer)


@pytest.mark.parametrize("create", [materialize_state, create_as_torch])
def test_a_step_that_only_creates_state_is_not_the_first(create):
    fresh, created = (ADOPT(parameters(), lr=0.1, weight_decay=0.1) for _ in range(2))
    create(created)
    assert all(not state[key].any() for state in created.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert len(created.state) == 2 and flat(created.param_groups[0]["params"]) == flat(parameters())
    assert train(created, gradients(20)) == train(fresh, gradients(20))


@pytest.mark.parametrize("kept", [torch.bfloat16, None])
def test_continues_from_a_saved_state(kept):
    first = ADOPT(parameters(torch.float32), lr=0.1, state_dtype=kept)
    train(first, gradients(8))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = ADOPT(copy.deepcopy(first.param_groups[0]["params"]), lr=7.0, state_dtype=kept)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert {state["exp_avg"].dtype for state in second.state.values()} == {kept or torch.float32}
    assert train(second, gradients(5)) == train(first, gradients(5))


def test_a_learning_rate_may_be_a_tensor():
    number, tensor = ADOPT(parameters(), lr=0.25), ADOPT(parameters(), lr=torch.tensor(0.25))
    assert train(number, gradients(5)) == train(tensor, gradients(5))
    fresh = ADOPT(parameters(), lr=torch.tensor(0.25))
    materialize_state(fresh)
    assert train(fresh, gradients(5)) == train(ADOPT(parameters(), lr=0.25), gradients(5))


@pytest.mark.parametrize(
    "key, value",
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("lr", torch.ones(2)),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("eps", 0.0),
        ("clip_exponent", -0.25),
        ("weight_decay", -0.1),
        ("state_dtype", torch.float16),
    ],
)
def test_wrong_values_are_named(key, value):
    with pytest.raises(ValueError, match=f"^{key} = .*: must be "):
        ADOPT(parameters(), **{key: value})


def test_a_group_cannot_bring_omegas():
    with pytest.raises(ValueError, match="omegas = .*QHADOPT"):
        ADOPT([{"params": parameters(), "omegas": (0.5, 0.5), "betas": (0.9, 0.9, 0.9)}])


# Even and uneven shards (rank 1 has one row, or none), columns, a replica, and a replica with unsummed gradients.
LAYOUTS = [
    *(((rows, 2), Shard(0)) for rows in (4, 3, 1)),
    *(((2, 4), Shard(1)), ((5,), Replicate()), ((5,), Partial())),
]


def sharded(value, layout, mesh):
    return distribute_tensor(value, mesh, [Replicate() if layout.is_partial() else layout])


def sharded_gradient(value, layout, mesh):
    if layout.is_partial():
        return DTensor.from_local(value * (0.25 if dist.get_rank() else 0.75), mesh, [layout])
    return distribute_tensor(value, mesh, [layout])


def dtensors_equal_plain_tensors(kind, mesh):
    generator = torch.Generator().manual_seed(5)
    plain = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape, _ in LAYOUTS]
    laid = [torch.nn.Parameter(sharded(x.detach(), layout, mesh)) for x, (_, layout) in zip(plain, LAYOUTS)]
    optimizers = [kind(tensors, lr=0.1, weight_decay=0.1) for tensors in (plain, laid)]
    materialize_state(optimizers[1])
    for _ in range(6):
        for x, y, (shape, layout) in zip(plain, laid, LAYOUTS, strict=True):
            x.grad = torch.randn(shape, generator=generator)
            y.grad = sharded_gradient(x.grad, layout, mesh)
        for optimizer in optimizers:
            optimizer.step()
    for x, y in zip(plain, laid, strict=True):
        torch.testing.assert_close(y.full_tensor(), x.detach(), rtol=1e-5, atol=1e-6)
        for key, value in optimizers[0].state[x].items():
            other = optimizers[1].state[y][key]
            assert key == "step" or (isinstance(other, DTensor) and other.placements == y.placements)
            whole = other.full_tensor() if isinstance(other, DTensor) else other
            torch.testing.assert_close(whole, value, rtol=1e-5, atol=1e-6)


def replicas_round_alike(mesh):
    """The ranks' shards differ in size, but what both hold must stay the same in bfloat16 too."""
    generator = torch.Generator().manual_seed(6)
    layouts = [(torch.ones(3, 9), Shard(0)), (torch.ones(70), Replicate())]
    tensors = [torch.nn.Parameter(distribute_tensor(value, mesh, [layout])) for value, layout in layouts]
    optimizer = QHAdamW(tensors, state_dtype=torch.bfloat16)
    for _ in range(4):
        for each in tensors:
            each.grad = distribute_tensor(torch.randn(each.shape, generator=generator), mesh, each.placements)
        optimizer.step()
    for held in (tensors[1], optimizer.state[tensors[1]]["exp_avg_sq"]):
        local = held.detach().to_local().float()
        others = [torch.empty_like(local) for _ in range(2)]
        dist.all_gather(others, local)
        assert torch.equal(others[0], others[1])


def trains_under_fsdp(kind, mesh):
    torch.manual_seed(7)
    plain = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))
    model = fully_shard(copy.deepcopy(plain), mesh=mesh)
    optimizers = [kind(each.parameters(), lr=0.05, weight_decay=0.1) for each in (plain, model)]
    for n in range(5):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(n))
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            (each(x) ** 2).mean().backward()
            optimizer.step()
    for x, y in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(y.full_tensor(), x.detach(), rtol=1e-4, atol=1e-5)


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for kind in (ADOPT, QHADOPT, QHAdamW, QHSGDM):
        dtensors_equal_plain_tensors(kind, mesh)
        trains_under_fsdp(kind, mesh)
    replicas_round_alike(mesh)
    dist.barrier()
    # gloo's threads outlive the group where something still refers to it, and then abort a normal exit.
    os._exit(0)


def test_sharded_parameters_give_the_same(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
