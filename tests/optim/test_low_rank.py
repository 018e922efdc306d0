"""LowRankAdamW against its equations in float64 and plain loops, and LoRDO's claims T13 to T18."""

import copy
import io
import logging

import pytest
import torch
from torch import nn

from titan_ext.optim import LowRankAdamW, QHAdamW
from titan_ext.optim.projection import projection, random_basis, rotated
from titan_ext.semi_sync.state.views import materialize_state

LEFT, RIGHT, SQUARE = (4, 6), (6, 4), (5, 5)


def randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def times(a, b):
    return [[sum(x * y for x, y in zip(row, column)) for column in zip(*b)] for row in a]


def turned(a):
    return [list(row) for row in zip(*a)]


def each(function, *matrices):
    return [[function(*entries) for entries in zip(*rows)] for rows in zip(*matrices)]


def zeros(rows, columns):
    return [[0.0] * columns for _ in range(rows)]


def in_new_basis(u, v, old, new, n, betas):
    """Moments after n steps in the basis ``new``: section 3b's rotation."""
    r = times(turned(new), old)
    c1, c2 = 1 - betas[0] ** n, 1 - betas[1] ** n
    mean = each(lambda a: a / c1, u)
    spread = each(lambda a, m: max(a / c2 - m * m, 0), v, mean)
    squares = times(each(lambda a: a * a, r), spread)
    return times(r, u), each(lambda a, m: c2 * abs(a + m * m), squares, times(r, mean))


def left_steps(w, gradients, basis_at, lr, betas, eps, omega, weight_decay, error_feedback):
    """``(W, E)`` after each step, by LoRDO's equations with a left basis; ``basis_at(n, A)`` is a new one or None."""
    error, q = zeros(len(w), len(w[0])), None
    for n, g in enumerate(gradients, 1):
        a = each(lambda x, y: x + y, g, error)
        new = basis_at(n - 1, a)
        if q is None:
            u, v = zeros(len(new[0]), len(w[0])), zeros(len(new[0]), len(w[0]))
        elif new is not None:
            u, v = in_new_basis(u, v, q, new, n - 1, betas)
        q = new or q
        s = times(turned(q), a)
        if error_feedback:
            error = each(lambda x, y: x - y, a, times(q, s))
        u = each(lambda x, y: betas[0] * x + (1 - betas[0]) * y, u, s)
        v = each(lambda x, y: betas[1] * x + (1 - betas[1]) * y * y, v, s)
        d = each(lambda x: (x / (1 - betas[1] ** n)) ** 0.5 + eps, v)
        mu = sum(map(sum, d)) / (len(d) * len(d[0]))
        momentum = times(q, each(lambda x, y: x / (1 - betas[0] ** n) / y, u, d))
        w = each(lambda x, y, z: x * (1 - lr * weight_decay) - lr * ((1 - omega) * y / mu + omega * z), w, g, momentum)
        yield w, error


def leading(a, rank):
    return torch.linalg.svd(torch.tensor(a, dtype=torch.float64)).U[:, :rank].tolist()


@pytest.mark.parametrize("basis_from", ["gradient", "outer"])
@pytest.mark.parametrize("omega", [1, 0.97])
@pytest.mark.parametrize("error_feedback", [True, False])
@pytest.mark.parametrize("shape", [LEFT, RIGHT, SQUARE])
def test_steps_are_the_equations(shape, error_feedback, omega, basis_from):
    settings = {"lr": 0.1, "betas": (0.9, 0.97), "eps": 1e-6, "omega": omega, "weight_decay": 0.3}
    settings["error_feedback"] = error_feedback
    start, gradients = randn(*shape), [randn(*shape, seed=10 + n) * (1 + n % 5) for n in range(24)]
    given = {n: random_basis(min(shape), 3)[:, 1:] if n % 2 else random_basis(min(shape), 2) for n in (0, 7, 14, 15)}

    def basis_at(n, a):
        if basis_from == "outer":
            return given[n].tolist() if n in given else None
        return leading(a, 2) if n % 5 == 0 else None

    parameter = nn.Parameter(start.clone())
    optimizer = LowRankAdamW([parameter], rank=2, basis_from=basis_from, refresh_every=5, **settings)
    right = shape[0] >= shape[1]
    flip = turned if right else list
    expected = left_steps(flip(start.tolist()), [flip(g.tolist()) for g in gradients], basis_at, **settings)
    for n, (gradient, (weight, error)) in enumerate(zip(gradients, expected, strict=True)):
        if basis_from == "outer" and n in given:
            assert optimizer.set_basis(parameter, given[n])
        parameter.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), torch.tensor(flip(weight), dtype=torch.float64))
        if error_feedback:
            kept = optimizer.state[parameter]["error"]
            torch.testing.assert_close(kept, torch.tensor(flip(error), dtype=torch.float64), atol=1e-9, rtol=1e-7)
    assert torch.equal(parameter.grad, gradients[-1])
    state = optimizer.state[parameter]
    assert set(state) == {"step", "basis", "low_exp_avg", "low_exp_avg_sq"} | ({"error"} if error_feedback else set())
    assert state["low_exp_avg"].shape == state["low_exp_avg_sq"].shape == ((shape[0], 2) if right else (2, shape[1]))


def rounds(omega, error_feedback, shape=(7, 10), rank=3, workers=2):
    """Rounds of LoRDO with workers in one process: ``(pseudo-gradient, old basis, new basis)`` of each."""
    weights = [nn.Parameter(randn(*shape)) for _ in range(workers)]
    settings = {"lr": 0.02, "rank": rank, "omega": omega, "error_feedback": error_feedback, "basis_from": "outer"}
    optimizers = [LowRankAdamW([each], betas=(0.9, 0.99), **settings) for each in weights]
    basis, reference = random_basis(min(shape), rank), weights[0].detach().clone()
    for weight, optimizer in zip(weights, optimizers):
        optimizer.set_basis(weight, basis)
    for place in range(3):
        for n in range(4):
            for worker, (weight, optimizer) in enumerate(zip(weights, optimizers)):
                noise = randn(*shape, seed=100 * place + 10 * n + worker)
                weight.grad = weight.detach() - randn(*shape, seed=50 + worker) + 0.1 * noise
                optimizer.step()
        average = sum(each.detach() for each in weights) / workers
        delta = average - reference
        new = projection(delta, rank)
        for weight, optimizer in zip(weights, optimizers):
            weight.data.copy_(average)
            assert optimizer.set_basis(weight, new)
        yield delta, basis, new
        basis, reference = new, average


def overlap(one, other):
    """1 if the two bases span the same space."""
    return float(torch.linalg.svdvals(one.mT @ other).square().mean())


@pytest.mark.parametrize("error_feedback", [True, False])
def test_without_the_full_rank_term_the_subspace_never_moves(error_feedback):
    for delta, old, new in rounds(1, error_feedback):
        assert torch.linalg.matrix_rank(delta, rtol=1e-10) <= 3
        assert overlap(old, new) == pytest.approx(1, abs=1e-10)


def test_the_full_rank_term_moves_it():
    for delta, old, new in rounds(0.9, True):
        assert torch.linalg.matrix_rank(delta, rtol=1e-10) == 7
        assert overlap(old, new) < 1 - 1e-6


@pytest.mark.parametrize("shape", [LEFT, RIGHT])
def test_the_error_is_what_the_projection_lost(shape):
    parameter, optimizer = trained(shape, 0)
    for n in range(6):
        error = optimizer.state[parameter].get("error", torch.zeros(shape)).clone()
        parameter.grad = randn(*shape, seed=n)
        optimizer.step()
        state = optimizer.state[parameter]
        basis = state["basis"]
        signal, left = parameter.grad + error, shape == LEFT
        kept = basis @ (basis.mT @ signal) if left else signal @ basis @ basis.mT
        torch.testing.assert_close(kept + state["error"], signal)
        lost = basis.mT @ state["error"] if left else state["error"] @ basis
        assert lost.abs().max() < 1e-12
    before = state["error"].clone()
    optimizer.set_basis(parameter, random_basis(4, 2))
    assert torch.equal(state["error"], before)


def trained(shape, steps, dtype=torch.float64, **settings):
    parameter = nn.Parameter(randn(*shape, dtype=dtype))
    settings = {"lr": 0.1, "betas": (0.9, 0.97), "rank": 2, "refresh_every": 5} | settings
    optimizer = LowRankAdamW([parameter], **settings)
    for n in range(steps):
        parameter.grad = randn(*shape, seed=n, dtype=dtype)
        optimizer.step()
    return parameter, optimizer


def within(shape, columns, basis, other, omega=1.0):
    """Weights after steps with gradients of a few columns, in a basis and by another optimizer; and the error."""
    mine, optimizer = trained(shape, 0, omega=omega, basis_from="outer", weight_decay=0.1)
    theirs = nn.Parameter(mine.detach().clone())
    other = other([theirs], lr=0.1, weight_decay=0.1)
    optimizer.set_basis(mine, basis)
    for n in range(8):
        mine.grad = torch.zeros(shape, dtype=torch.float64)
        mine.grad[:, columns] = randn(shape[0], 2, seed=n)
        theirs.grad = mine.grad.clone()
        optimizer.step()
        other.step()
    return mine.detach(), theirs.detach(), optimizer.state[mine]["error"]


def test_in_the_gradients_own_coordinates_it_is_adamw():
    def adamw(params, **settings):
        return torch.optim.AdamW(params, betas=(0.9, 0.97), **settings)

    def qhadamw(params, **settings):
        return QHAdamW(params, betas=(0.9, 0.97), omegas=(0.9,), **settings)

    own = torch.zeros(4, 2, dtype=torch.float64)
    own[3, 0], own[1, 1] = -1, 1
    mine, theirs, error = within(RIGHT, [1, 3], own, adamw)
    torch.testing.assert_close(mine, theirs)
    assert error.abs().max() < 1e-12
    # Adam sees coordinates: the same space by other axes is another optimizer.
    turn = random_basis(2, 2)
    mine, theirs, error = within(RIGHT, [1, 3], own @ turn, adamw)
    assert not torch.allclose(mine, theirs) and error.abs().max() < 1e-12
    mine, theirs, _ = within(RIGHT, [1, 3], own, qhadamw, omega=0.9)
    assert not torch.allclose(mine, theirs)


@pytest.mark.parametrize("shape", [LEFT, RIGHT])
def test_a_change_of_basis_keeps_what_it_can(shape):
    parameter, optimizer = trained(shape, 6)
    state, dim = optimizer.state[parameter], 1 if shape == RIGHT else 0
    u, v, basis = (state[key].clone() for key in ("low_exp_avg", "low_exp_avg_sq", "basis"))
    assert not optimizer.set_basis(parameter, basis.clone())
    assert torch.equal(state["low_exp_avg"], u) and torch.equal(state["low_exp_avg_sq"], v)
    corrections = (1 - 0.9**6, 1 - 0.97**6)
    wide = v + corrections[1] * (u / corrections[0]) ** 2  # a second moment of at least the first's square
    same = rotated(u, wide, torch.eye(2, dtype=torch.float64), dim, corrections)
    torch.testing.assert_close(same, (u, wide))
    least = rotated(u, 0 * v, torch.eye(2, dtype=torch.float64), dim, corrections)[1]
    torch.testing.assert_close(least, corrections[1] * (u / corrections[0]) ** 2)
    assert optimizer.set_basis(parameter, basis.flip(1) * torch.tensor([-1, 1]))
    swapped = u.flip(dim) * torch.tensor([-1, 1]).view((1, 2) if dim == 1 else (2, 1))
    torch.testing.assert_close(state["low_exp_avg"], swapped)
    assert optimizer.set_basis(parameter, random_basis(4, 2))
    assert state["low_exp_avg"].norm() < u.norm() and (state["low_exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("iterations", [0, 8])
@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (30, 30)])
def test_projection_is_the_leading_singular_vectors(shape, iterations):
    spectrum = torch.logspace(0, -3, min(shape))
    left, right = (random_basis(side, min(shape)).float() for side in shape)
    matrix = 1e-25 * (left * spectrum) @ right.mT  # its squares are not float32 numbers
    basis = projection(matrix, 5, iterations)
    u, _, vh = torch.linalg.svd(matrix.double() * 1e25, full_matrices=False)
    want = vh[:5].mT if shape[0] >= shape[1] else u[:, :5]
    assert basis.shape == want.shape and basis.dtype == torch.float32
    torch.testing.assert_close((basis.double().mT @ want).abs(), torch.eye(5).double(), atol=1e-4, rtol=0)
    assert (basis.mT @ basis - torch.eye(5)).abs().max() < 1e-5
    assert torch.equal(basis, projection(matrix.clone(), 5, iterations))
    assert projection(matrix.bfloat16(), 5, iterations).dtype == torch.float32


def test_projection_tells_small_singular_vectors_apart():
    spectrum = torch.tensor([1, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-6, 1e-6])
    matrix = (random_basis(30, 8).float() * spectrum) @ random_basis(20, 8).float().mT
    want = torch.linalg.svd(matrix.double(), full_matrices=False).Vh[:5].mT
    assert overlap(projection(matrix, 5).double(), want) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("iterations", [0, 2])
def test_projection_of_nothing_is_random_and_known(iterations):
    for matrix in (torch.zeros(8, 5), torch.full((8, 5), torch.inf), torch.full((8, 5), torch.nan)):
        basis = projection(matrix, 3, iterations)
        assert torch.equal(basis, random_basis(5, 3).float())
    thin = torch.outer(torch.arange(8.0), torch.ones(5))
    basis = projection(thin, 3, iterations)
    assert (basis.mT @ basis - torch.eye(3)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="rank = 6: must be from 1 to 5"):
        projection(thin, 6)


def test_embeddings_norms_and_small_matrices_are_left_to_adamw(caplog):
    shapes = {"tok_embeddings.weight": (9, 4), "norm.weight": (4,), "gate.weight": (2, 9), "wq.weight": (4, 4)}
    mine = {name: nn.Parameter(randn(*shape)) for name, shape in shapes.items()}
    theirs = {name: nn.Parameter(value.detach().clone()) for name, value in mine.items()}
    named = [{"params": list(mine.values()), "param_names": list(mine)}]
    with caplog.at_level(logging.INFO, "titan_ext.optim.low_rank"):
        optimizer = LowRankAdamW(named, lr=0.1, adamw_lr=0.5, weight_decay=0.2, rank=2)
    assert optimizer.full_rank_names() == ["tok_embeddings.weight", "norm.weight", "gate.weight"]
    assert [*optimizer.low_rank_parameters()] == ["wq.weight"]
    assert "1 parameters are low rank; AdamW has tok_embeddings.weight, norm.weight, gate.weight" in caplog.text
    adamw = torch.optim.AdamW(theirs.values(), lr=0.05, weight_decay=0.2)
    for n in range(4):
        for name, shape in shapes.items():
            mine[name].grad = randn(*shape, seed=n)
            theirs[name].grad = mine[name].grad.clone()
        optimizer.step()
        adamw.step()
    for name in shapes:
        assert torch.allclose(mine[name], theirs[name], rtol=1e-12) == (name != "wq.weight"), name
    assert set(optimizer.state[mine["norm.weight"]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert LowRankAdamW([mine["norm.weight"], mine["wq.weight"]], rank=2).full_rank_names() == ["#0.0"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", ["loaded", "copied"])
def test_a_restored_optimizer_goes_on(how, dtype):
    parameter, optimizer = trained(RIGHT, 7, dtype)
    other = nn.Parameter(parameter.detach().clone())
    if how == "copied":
        other, again = copy.deepcopy((parameter, optimizer))
    else:
        again = LowRankAdamW([other], rank=2)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again.load_state_dict(torch.load(file))
    for n in range(7, 13):
        parameter.grad = randn(*RIGHT, seed=n, dtype=dtype)
        other.grad = parameter.grad.clone()
        optimizer.step()
        again.step()
    assert torch.equal(parameter, other)
    assert again.state[other]["low_exp_avg"].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("basis_from", ["gradient", "outer"])
def test_materialized_state_is_that_of_no_step(basis_from):
    fresh, one = trained(LEFT, 0, basis_from=basis_from)
    parameter, optimizer = trained(LEFT, 0, basis_from=basis_from)
    materialize_state(optimizer)
    assert all(not value.any() for value in optimizer.state[parameter].values())
    assert set(optimizer.state[parameter]) == {"step", "basis", "low_exp_avg", "low_exp_avg_sq", "error"}
    assert torch.equal(parameter, fresh)
    for n in range(8):
        fresh.grad = randn(*LEFT, seed=n)
        parameter.grad = fresh.grad.clone()
        one.step()
        optimizer.step()
        assert torch.equal(parameter, fresh)
    # A newcomer has its peers' state written into its own.
    late, other = trained(LEFT, 0, basis_from=basis_from)
    materialize_state(other)
    for key, value in optimizer.state[parameter].items():
        other.state[late][key].copy_(value)
    late.data.copy_(parameter.data)
    for each_parameter, each_optimizer in ((parameter, optimizer), (late, other)):
        each_parameter.grad = randn(*LEFT, seed=30)
        each_optimizer.step()
    assert torch.equal(parameter, late)


def test_a_first_gradient_of_zeros_waits_for_one_with_directions():
    parameter, optimizer = trained(RIGHT, 0, weight_decay=0.5, basis_from="outer")
    start = parameter.detach().clone()
    for gradient in (torch.zeros(RIGHT), torch.zeros(RIGHT)):
        parameter.grad = gradient.double()
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), start * 0.95**2)
    parameter.grad = randn(*RIGHT)
    optimizer.step()
    basis = optimizer.state[parameter]["basis"]
    assert overlap(basis, projection(parameter.grad, 2)) == pytest.approx(1)
    parameter.grad = randn(*RIGHT, seed=9)
    optimizer.step()
    assert torch.equal(optimizer.state[parameter]["basis"], basis)


def test_the_first_step_keeps_a_basis_that_is_there_and_finds_one_that_is_not():
    parameter, optimizer = trained(RIGHT, 0)
    optimizer.set_basis(parameter, random_basis(4, 2))
    for n in range(3):
        parameter.grad = randn(*RIGHT, seed=n)
        optimizer.step()
        assert torch.equal(optimizer.state[parameter]["basis"], random_basis(4, 2))
    for value in optimizer.state[parameter].values():
        value.zero_()  # as a rollback to the start does, in place
    optimizer.step()
    assert overlap(optimizer.state[parameter]["basis"], projection(parameter.grad, 2)) == pytest.approx(1)


def test_bfloat16_parameters_move_by_float32_state():
    narrow, one = trained(LEFT, 0, torch.bfloat16)
    wide = nn.Parameter(narrow.detach().float())
    other = LowRankAdamW([wide], lr=0.1, betas=(0.9, 0.97), rank=2, refresh_every=5)
    for n in range(8):
        narrow.grad = randn(*LEFT, seed=n, dtype=torch.bfloat16)
        wide.grad = narrow.grad.float()
        one.step()
        other.step()
        torch.testing.assert_close(narrow.detach(), wide.detach().bfloat16())
        wide.data.copy_(narrow.data)
    for key in ("basis", "low_exp_avg", "low_exp_avg_sq", "error"):
        assert torch.equal(one.state[narrow][key], other.state[wide][key])


def test_a_closure_a_rate_in_a_tensor_and_power_iterations():
    parameter, optimizer = trained((40, 30), 0, lr=torch.tensor(0.1), rank=6, power_iterations=4)
    target = parameter.detach() + randn(40, 3, seed=3) @ randn(3, 30, seed=4)

    def loss():
        optimizer.zero_grad()
        value = (parameter - target).square().mean()
        value.backward()
        return value.detach()

    losses = [float(optimizer.step(loss)) for _ in range(200)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1}, "lr = -1: must be one number, at least 0"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1: must be at least 0"),
        ({"eps": 0}, "eps = 0: must be above 0"),
        ({"betas": (0.9, 1.0)}, r"betas = \(0.9, 1.0\): must be two numbers in \[0, 1\)"),
        ({"betas": 0.9}, "betas = 0.9"),
        ({"adamw_betas": (0.9,)}, "adamw_betas"),
        ({"adamw_lr": -2}, "adamw_lr = -2"),
        ({"omega": 1.1}, "omega = 1.1: must be from 0 to 1"),
        ({"rank": 0}, "rank = 0: must be a whole number, at least 1"),
        ({"rank": 1.5}, "rank = 1.5"),
        ({"refresh_every": 0}, "refresh_every = 0: must be a whole number, at least 1"),
        ({"power_iterations": -1}, "power_iterations = -1"),
        ({"error_feedback": "no"}, "error_feedback = 'no': must be True or False"),
        ({"basis_from": "delta"}, "basis_from = 'delta': must be 'gradient' or 'outer'"),
        ({"adamw_names": "embed"}, "adamw_names = 'embed': must be a list of words"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LowRankAdamW([nn.Parameter(torch.zeros(2))], **settings)


def test_a_bad_group_is_not_added():
    parameter, optimizer = trained(LEFT, 0)
    with pytest.raises(ValueError, match="omega = -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "omega": -1})
    assert len(optimizer.param_groups) == 1


def test_a_bad_basis_is_named():
    parameter, optimizer = trained(LEFT, 1)
    kept = optimizer.state[parameter]["basis"].clone()
    with pytest.raises(ValueError, match=r"shape \[6, 2\]: must be \[4, 2\]"):
        optimizer.set_basis(parameter, random_basis(6, 2))
    for bad in (2 * kept, kept * torch.nan):
        with pytest.raises(ValueError, match="must be below 1e-3"):
            optimizer.set_basis(parameter, bad)
    with pytest.raises(ValueError, match="low_rank_parameters"):
        optimizer.set_basis(nn.Parameter(torch.zeros(4, 6)), kept)
    assert torch.equal(optimizer.state[parameter]["basis"], kept)


def test_sparse_gradients_are_refused():
    parameter, optimizer = trained(LEFT, 0)
    parameter.grad = torch.zeros(LEFT, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
