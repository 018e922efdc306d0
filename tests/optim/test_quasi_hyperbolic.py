"""Quasi-hyperbolic optimizers against their equations in float64 and plain loops, and against torch's own."""

import copy
import io
import math

import pytest
import torch

from titan_ext.optim import ADOPT, QHADOPT, QHSGDM, QHAdamW, momenta
from titan_ext.semi_sync.state.views import materialize_state

SHAPES = ((3, 2), (4,))
ALL = [QHSGDM, QHAdamW, QHADOPT]


def mixed(x, signal, u, n, lr, omegas, weight_decay, divisor=1.0, betas=None):
    """``x`` after a step along the mix; with ``betas``, of bias-corrected momenta."""
    along = (1 - sum(omegas)) * signal
    for j, omega in enumerate(omegas):
        along += omega * u[j] / (1 - betas[j] ** n if betas else 1)
    return x - lr * weight_decay * x - lr * along / divisor


def qhsgdm(x, rows, lr, betas, omegas, weight_decay=0.0):
    u = [0.0] * len(omegas)
    for n, g in enumerate(rows, 1):
        u = [betas[j] * u[j] + (1 - betas[j]) * g for j in range(len(omegas))]
        x = mixed(x, g, u, n, lr, omegas, weight_decay)
        yield x


def qhadamw(x, rows, lr, betas, omegas, weight_decay=0.0, eps=1e-8):
    u, v, last = [0.0] * len(omegas), 0.0, betas[-1]
    for n, g in enumerate(rows, 1):
        u = [betas[j] * u[j] + (1 - betas[j]) * g for j in range(len(omegas))]
        v = last * v + (1 - last) * g * g
        x = mixed(x, g, u, n, lr, omegas, weight_decay, math.sqrt(v / (1 - last**n)) + eps, betas)
        yield x


def qhadopt(x, rows, lr, betas, omegas, weight_decay=0.0, eps=1e-6):
    u, v, last = [0.0] * len(omegas), rows[0] ** 2, betas[-1]
    yield x
    for n, g in enumerate(rows[1:], 1):
        c = min(max(g / max(math.sqrt(v), eps), -(n**0.25)), n**0.25)
        u = [betas[j] * u[j] + (1 - betas[j]) * c for j in range(len(omegas))]
        x = mixed(x, c, u, n, lr, omegas, weight_decay)
        v = last * v + (1 - last) * g * g
        yield x


REFERENCES = {QHSGDM: qhsgdm, QHAdamW: qhadamw, QHADOPT: qhadopt}


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(each, generator=generator, dtype=torch.float64) for each in SHAPES]
    return [torch.nn.Parameter(each.to(dtype)) for each in values]


def flat(tensors):
    return torch.cat([each.detach().flatten() for each in tensors]).tolist()


def gradients(steps):
    rows = torch.randn(steps, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return rows * (1 + torch.arange(steps) % 5)[:, None]


def train(optimizer, rows):
    trail, tensors = [], [each for group in optimizer.param_groups for each in group["params"]]
    for row in rows:
        for each, part in zip(tensors, row.split([each.numel() for each in tensors])):
            each.grad = part.view_as(each).to(each.dtype)
        optimizer.step()
        trail.append(flat(tensors))
    return trail


def betas_of(kind, *betas, last=0.99):
    return betas if kind is QHSGDM else (*betas, last)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "betas, omegas, weight_decay",
    [
        ((0.9,), (0.7,), 0.0),
        ((0.999,), (0.98,), 0.1),
        ((0.5, 0.99), (0.3, 0.6), 0.3),
        ((0.0, 0.9, 0.99), (0.1, 0.2, 0.7), 0.1),
    ],
)
def test_equals_the_equations(kind, betas, omegas, weight_decay):
    settings = dict(lr=0.05, betas=betas_of(kind, *betas), omegas=omegas, weight_decay=weight_decay)
    trail = train(kind(parameters(), **settings), gradients(25))
    for i, x in enumerate(flat(parameters())):
        wanted = list(REFERENCES[kind](x, gradients(25)[:, i].tolist(), **settings))
        assert [row[i] for row in trail] == pytest.approx(wanted, rel=1e-11)


# Row M1 of the papers' invariants, and its like for the others.
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (
            lambda x: QHAdamW(x, lr=0.03, betas=(0.9, 0.95), omegas=(1.0,), weight_decay=0.2),
            lambda x: torch.optim.AdamW(x, lr=0.03, betas=(0.9, 0.95), weight_decay=0.2),
        ),
        (
            lambda x: QHAdamW(x, lr=0.03, betas=(0.9, 0.95), omegas=(0.0,), weight_decay=0.2),
            lambda x: torch.optim.AdamW(x, lr=0.03, betas=(0.0, 0.95), weight_decay=0.2),
        ),
        (
            lambda x: QHADOPT(x, lr=0.03, betas=(0.9, 0.95), omegas=(1.0,), weight_decay=0.2),
            lambda x: ADOPT(x, lr=0.03, betas=(0.9, 0.95), weight_decay=0.2),
        ),
        (
            lambda x: QHSGDM(x, lr=0.03, betas=(0.9,), omegas=(1.0,)),
            lambda x: torch.optim.SGD(x, lr=0.003, momentum=0.9),
        ),
        (
            lambda x: QHSGDM(x, lr=0.03, betas=(0.9,), omegas=(0.9,)),
            lambda x: torch.optim.SGD(x, lr=0.003, momentum=0.9, nesterov=True),
        ),
        (lambda x: QHSGDM(x, lr=0.03, betas=(0.9,), omegas=(0.0,)), lambda x: torch.optim.SGD(x, lr=0.03)),
    ],
)
def test_equals_its_special_cases(ours, theirs):
    trails = [train(make(parameters()), gradients(25)) for make in (ours, theirs)]
    for row, want in zip(*trails, strict=True):
        assert row == pytest.approx(want, rel=1e-11)


@pytest.mark.parametrize("kind", ALL)
def test_equal_momenta_are_one(kind):
    one = train(kind(parameters(), lr=0.03, betas=betas_of(kind, 0.9), omegas=(0.8,)), gradients(25))
    two = train(kind(parameters(), lr=0.03, betas=betas_of(kind, 0.9, 0.9), omegas=(0.3, 0.5)), gradients(25))
    for row, want in zip(two, one, strict=True):
        assert row == pytest.approx(want, rel=1e-11)


def test_moments_stay_and_drift_within_their_bounds():
    """Row T11: of gradients clipped to rho by coordinate."""
    rho, beta, last, apart = 0.5, 0.95, 0.99, 4
    optimizer = QHAdamW(parameters(), lr=0.1, betas=(beta, last))
    seen = []
    for row in gradients(25).clamp(-rho, rho):
        train(optimizer, [row])
        states = optimizer.state.values()
        seen.append([torch.cat([each[key].flatten() for each in states]) for key in ("exp_avg_0", "exp_avg_sq")])
    for (u, v), (later_u, later_v) in zip(seen, seen[apart:]):
        assert u.abs().max() <= rho and 0 <= v.min() and v.max() <= rho**2
        assert (later_u - u).abs().max() <= 2 * rho * (1 - beta**apart)
        assert (later_v - v).abs().max() <= 2 * rho**2 * (1 - last**apart)


@pytest.mark.parametrize("kind", ALL)
def test_state_has_the_promised_keys_and_can_be_created_ahead(kind):
    settings = dict(lr=0.1, betas=betas_of(kind, 0.9, 0.99), omegas=(0.3, 0.6), weight_decay=0.1)
    created = kind(parameters(), **settings)
    materialize_state(created)
    moments = {"exp_avg_0", "exp_avg_1", "exp_avg_sq"} - ({"exp_avg_sq"} if kind is QHSGDM else set())
    for state in created.state.values():
        assert set(state) == {"step"} | moments and state["step"] == 0
        assert not any(state[key].any() for key in moments)
    assert len(created.state) == 2 and flat(created.param_groups[0]["params"]) == flat(parameters())
    assert train(created, gradients(20)) == train(kind(parameters(), **settings), gradients(20))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "dtype, kept", [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_continues_from_a_saved_state(kind, dtype, kept):
    first = kind(parameters(dtype), lr=0.1, state_dtype=kept)
    train(first, gradients(8))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = kind(copy.deepcopy(first.param_groups[0]["params"]), lr=7.0, state_dtype=kept)
    second.load_state_dict(torch.load(file, weights_only=True))
    for old, new in zip(first.state.values(), second.state.values(), strict=True):
        assert new["exp_avg_0"].dtype == (kept or dtype)
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert train(second, gradients(5)) == train(first, gradients(5))


def test_a_loaded_state_takes_this_optimizers_dtype():
    first = QHAdamW(parameters(torch.float32), lr=0.1)
    train(first, gradients(3))
    second = QHAdamW(parameters(torch.float32), lr=0.1, state_dtype=torch.bfloat16)
    second.load_state_dict(first.state_dict())
    assert {state["exp_avg_sq"].dtype for state in second.state.values()} == {torch.bfloat16}
    assert second.param_groups[0]["state_dtype"] == torch.bfloat16


def test_slow_moments_in_bfloat16_follow_the_exact_ones():
    """Rounded to the nearest they would stay where they are when the gradients shrink."""
    ends = {}
    for dtype in (torch.bfloat16, torch.float64):
        parameter = torch.nn.Parameter(torch.zeros(4000, dtype=torch.float64).to(torch.float32))
        optimizer = QHAdamW([parameter], betas=(0.998, 0.999), state_dtype=dtype)
        generator = torch.Generator().manual_seed(3)
        for n in range(600):
            parameter.grad = (1 + torch.randn(4000, generator=generator)) / (1 + (n > 300) * 9)
            optimizer.step()
        ends[dtype] = [optimizer.state[parameter][key].double() for key in ("exp_avg_0", "exp_avg_sq")]
    for low, exact in zip(ends[torch.bfloat16], ends[torch.float64], strict=True):
        assert low.mean().item() == pytest.approx(exact.mean().item(), rel=0.02)
        assert (low - exact).norm() < 0.2 * exact.norm()


def test_bfloat16_parameters_stay_through_a_step_of_no_length():
    optimizer = QHAdamW(parameters(torch.bfloat16), lr=0.0)
    assert train(optimizer, gradients(3))[-1] == flat(parameters(torch.bfloat16))


@pytest.mark.parametrize("kind", ALL)
def test_each_parameter_has_its_own_dtype_and_step_count(kind, monkeypatch):
    monkeypatch.setattr(momenta, "_CPU_BATCH", 5)
    kinds = [torch.float32, torch.float64, torch.float32, torch.float32, torch.bfloat16]

    def run(places):
        generator = torch.Generator().manual_seed(4)
        tensors = [torch.nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in kinds]
        optimizer = kind([tensors[place] for place in places], lr=0.1, weight_decay=0.1)
        for n in range(6):
            for place, each in enumerate(tensors):
                gradient = torch.randn(4, generator=generator).to(each.dtype)
                # The third has none at first.
                each.grad = None if place == 2 and n < 2 else gradient
            optimizer.step()
        return [tensors[place].tolist() for place in places]

    *whole, last = run(range(5))
    assert whole == [run([place])[0] for place in range(4)]
    assert last == pytest.approx(run([4])[0], abs=6 * 2**-8)  # rounded with the noise of its place


def test_groups_have_their_own_settings():
    first, second = parameters()
    optimizer = QHAdamW([first], lr=0.1)
    optimizer.add_param_group({"params": [second], "betas": [0.5, 0.9, 0.99], "omegas": [0.2, 0.3], "lr": 0.01})
    got = train(optimizer, gradients(20))
    alone = [torch.nn.Parameter(second) for second in parameters()[1:]]
    want = train(QHAdamW(alone, lr=0.01, betas=(0.5, 0.9, 0.99), omegas=(0.2, 0.3)), gradients(20)[:, 6:])
    assert [row[6:] for row in got] == want
    with pytest.raises(ValueError, match="omegas"):
        optimizer.add_param_group({"params": parameters()[:1], "omegas": (0.7, 0.7)})
    assert len(optimizer.param_groups) == 2


def test_a_closure_is_called_with_gradients_on():
    (parameter,) = parameters()[:1]
    optimizer = QHSGDM([parameter], lr=0.1, betas=(0.9,), omegas=(0.0,))
    before = parameter.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx((before**2).sum().item())
    torch.testing.assert_close(parameter.detach(), before * 0.8)


def test_a_learning_rate_may_be_a_tensor():
    for kind in ALL:
        number, tensor = kind(parameters(), lr=0.25), kind(parameters(), lr=torch.tensor(0.25))
        assert train(number, gradients(5)) == train(tensor, gradients(5))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "wrong",
    [
        dict(lr=-1.0),
        dict(omegas=(0.6, 0.6)),
        dict(omegas=(-0.1,)),
        dict(omegas=()),
        dict(omegas=0.9),
        dict(betas=(0.9, 0.9, 0.9)),
        dict(betas=()),
        dict(betas=0.9),
        dict(weight_decay=-1),
        dict(state_dtype=torch.float16),
    ],
)
def test_wrong_values_are_named(kind, wrong):
    key = next(iter(wrong))
    with pytest.raises(ValueError, match=f"^{key} = .*: must be "):
        kind(parameters(), **wrong)


def test_a_decay_rate_of_one_and_no_floor_are_refused():
    for kind, key, value in [(QHSGDM, "betas", (1.0,)), (QHAdamW, "eps", 0), (QHADOPT, "clip_exponent", -1)]:
        with pytest.raises(ValueError, match=f"^{key} = "):
            kind(parameters(), **{key: value})
    with pytest.raises(ValueError, match="float16"):
        QHAdamW(parameters(torch.float16))


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="QHAdamW does not support sparse"):
        QHAdamW(table.parameters()).step()
