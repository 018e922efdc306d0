"""Eager DiLoCo, SPARTA, NoLoCo, DeMo and MuLoCo against loops written from their equations."""

import pytest
import torch

from tests.lighthouse_page import wait_for_requests
from tests.semi_sync.sites import Meeting, outer_loop, run_sites
from titan_ext.optim import DeMo, Muon
from titan_ext.semi_sync.methods.demo import cosine_basis, tile_sides
from titan_ext.semi_sync.wire.gossip import partner_of

SHAPES = [(6, 4), (5,), (3, 130)]


def start(index: int) -> torch.Tensor:
    return torch.randn(SHAPES[index], generator=torch.Generator().manual_seed(index), dtype=torch.float64)


def target(site: int, index: int) -> torch.Tensor:
    return torch.randn(
        SHAPES[index], generator=torch.Generator().manual_seed(100 * site + index + 7), dtype=torch.float64
    )


class Model(torch.nn.Module):
    """Parameters pulled towards a site's own target: an inner step that anyone can write down."""

    def __init__(self) -> None:
        super().__init__()
        self.p = torch.nn.ParameterList([torch.nn.Parameter(start(index).float()) for index in range(len(SHAPES))])

    @torch.no_grad()
    def inner_step(self, site: int, rate: float = 0.1) -> None:
        for index, parameter in enumerate(self.p):
            parameter.sub_(rate * (parameter - target(site, index).float()))

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.p]


def trained(sites: int, steps: int, **settings) -> list[list[list[torch.Tensor]]]:
    """For each site the parameters after every step, and at last after ``finish``."""

    def body(site, own):
        model = Model()
        outer = outer_loop(model, [], own, **settings)
        outer.join()
        seen = []
        for _ in range(steps):
            model.inner_step(site)
            outer.step()
            seen.append(model.values())
        outer.finish()
        seen.append(model.values())
        assert outer.ledger.failed == 0
        return seen

    return run_sites(sites, body)


def assert_equal(got, want, places, tolerance=2e-6) -> None:
    for site, (mine, reference) in enumerate(zip(got, want)):
        for place in places:
            for value, expected in zip(mine[place], reference[place]):
                error = (value.double() - expected).abs().max().item()
                assert error <= tolerance, f"site {site}, step {place}: {error}"


def inner(theta, site, rate=0.1):
    return [value - rate * (value - target(site, index)) for index, value in enumerate(theta)]


def mean_of(values):
    return [sum(parts) / len(parts) for parts in zip(*values)]


def eager_reference(sites, steps, every, lr, momentum):
    outer = [[start(i) for i in range(len(SHAPES))] for _ in range(sites)]
    local = [list(each) for each in outer]
    velocity = [[torch.zeros_like(v) for v in each] for each in outer]
    stale = stale_mean = None
    seen = [[] for _ in range(sites)]
    for step in range(1, steps + 1):
        local = [inner(theta, site) for site, theta in enumerate(local)]
        if step % every == 0:
            fresh = [[o - v for o, v in zip(outer[s], local[s])] for s in range(sites)]
            for s in range(sites):
                delta = fresh[s]
                if stale is not None:
                    delta = [m + (f - o) / sites for m, f, o in zip(stale_mean, fresh[s], stale[s])]
                velocity[s] = [momentum * v + d for v, d in zip(velocity[s], delta)]
                outer[s] = [p - lr * (d + momentum * v) for p, d, v in zip(outer[s], delta, velocity[s])]
            local = [list(each) for each in outer]
            stale, stale_mean = fresh, mean_of(fresh)
        for s in range(sites):
            seen[s].append(local[s])
    final = mean_of(local)
    return [each + [final] for each in seen]


@pytest.mark.parametrize("sites", [2, 3])
def test_eager_is_its_equations(sites):
    got = trained(sites, 13, method="eager_diloco", sync_every=3, outer_lr=0.6, outer_momentum=0.7)
    assert_equal(got, eager_reference(sites, 13, 3, 0.6, 0.7), range(14))
    assert not torch.equal(got[0][6][0], got[1][6][0]), "sites differ until the end"
    assert all(torch.equal(a, b) for a, b in zip(got[0][-1], got[1][-1]))


def test_eager_with_one_site_is_diloco():
    eager = trained(1, 12, method="eager_diloco", sync_every=3)
    diloco = trained(1, 12, method="diloco", sync_every=3)
    assert_equal([[[v.double() for v in step] for step in eager[0]]], diloco, range(13))


def test_eager_with_fragments_takes_each_from_its_own_launch():
    got = trained(
        2,
        12,
        method="eager_diloco",
        sync_every=4,
        fragments=[["p.0"], ["p.1", "p.2"]],
        outer_momentum=0.0,
        nesterov=False,
    )
    whole = eager_reference(2, 12, 4, 0.7, 0.0)
    # The second fragment is launched at 4, 8, 12 like the whole model; the first at 2, 6, 10.
    for step in range(12):
        for index in (1, 2):
            torch.testing.assert_close(got[0][step][index].double(), whole[0][step][index], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[0][1][0].double(), whole[0][1][0])


def test_sparta_with_a_whole_share_averages_every_step():
    every_step = trained(2, 5, method="local_sgd", sync_every=1)
    assert_equal(
        trained(2, 5, method="sparta", settings={"sparta": {"sparta_fraction": 1.0}}, sync_every=1000),
        every_step,
        range(6),
    )


@pytest.mark.parametrize("stretch", [1, 4, 8])
def test_sparta_visits_every_element_once_a_cycle(stretch):
    """Elements that have just been averaged are equal at both sites; no others are."""
    got = trained(
        2, 3 * stretch, method="sparta", settings={"sparta": {"sparta_fraction": 1 / stretch}}, sync_every=10**6
    )
    for cycle in (1, 2):
        visits = [torch.zeros(shape) for shape in SHAPES]
        for step in range(stretch * cycle, stretch * (cycle + 1)):  # inner steps are counted from 1
            for index, count in enumerate(visits):
                count += got[0][step - 1][index] == got[1][step - 1][index]
        assert all((count == 1).all() for count in visits)


def test_sparta_with_a_share_below_one_element_sends_none_or_one():
    got = trained(2, 6, method="sparta", settings={"sparta": {"sparta_fraction": 1e-4}}, sync_every=10**6)
    for step in range(6):
        equal = sum((a == b).sum().item() for a, b in zip(got[0][step], got[1][step]))
        assert equal in (0, 1)


def test_sparta_with_diloco_has_the_mean_of_diloco():
    """Averaging samples leaves the mean of the sites where it is, so after a full sync the numbers are DiLoCo's
    where the inner step is linear."""
    settings = {"sync_every": 6, "outer_optimizer": "sgd", "outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": True}
    mixed = trained(2, 18, method="sparta", settings={"sparta": {"sparta_fraction": 0.2}}, **settings)
    plain = trained(2, 18, method="diloco", **settings)
    assert_equal(mixed, plain, [5, 11, 17])


def noloco_reference(sites, steps, every, alpha, beta, gamma):
    slow = [[start(i) for i in range(len(SHAPES))] for _ in range(sites)]
    fast = [list(each) for each in slow]
    delta = [[torch.zeros_like(v) for v in each] for each in slow]
    seen = [[] for _ in range(sites)]
    for step in range(1, steps + 1):
        fast = [inner(theta, site) for site, theta in enumerate(fast)]
        if step % every == 0:
            before = [list(each) for each in slow]
            for s in range(sites):
                partner = partner_of(s, sites, step)
                group = [s] if partner is None else [s, partner]
                progress = mean_of([[f - p for f, p in zip(fast[g], before[g])] for g in group])
                centre = mean_of([before[g] for g in group])
                delta[s] = [
                    alpha * d + beta * m - gamma * (p - c) for d, m, p, c in zip(delta[s], progress, before[s], centre)
                ]
                slow[s] = [p + d for p, d in zip(before[s], delta[s])]
            fast = [list(each) for each in slow]
        for s in range(sites):
            seen[s].append(fast[s])
    final = mean_of(fast)
    return [each + [final] for each in seen]


@pytest.mark.parametrize("sites", [1, 2, 3, 4])
def test_noloco_is_its_equations(sites):
    """The order in which sites stand in a quorum is that of their names, which are site0, site1, …"""
    got = trained(sites, 9, method="noloco", sync_every=2)
    assert_equal(got, noloco_reference(sites, 9, 2, 0.5, 0.7, 0.7), range(10))


def test_noloco_of_a_pair_is_diloco_with_heavy_ball():
    settings = {"sync_every": 2, "outer_lr": 0.7, "outer_momentum": 0.5}
    pair = trained(2, 8, method="noloco", **settings)
    assert_equal(pair, trained(2, 8, method="diloco", nesterov=False, **settings), range(9))


@pytest.mark.parametrize("sites", [2, 3, 4, 7])
def test_partners_agree_and_change(sites):
    met = set()
    for clock in range(40):
        partners = [partner_of(site, sites, clock) for site in range(sites)]
        assert partners.count(None) == sites % 2
        assert all(partners[partner] == site for site, partner in enumerate(partners) if partner is not None)
        met |= {(site, partner) for site, partner in enumerate(partners) if partner is not None}
    assert len(met) == sites * (sites - 1)


@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_cosine_basis_is_orthonormal(size):
    basis = cosine_basis(size).double()
    torch.testing.assert_close(basis @ basis.mT, torch.eye(size, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [((128, 64), (64, 64)), ((130, 3), (26, 3)), ((70,), (1, 35)), ((), (1, 1)), ((67, 64), (1, 64))],
)
def test_tiles_are_the_largest_divisors(shape, sides):
    assert tile_sides(torch.Size(shape), 64) == sides


def demo_reference(sites, steps, beta, rate, kept, chunk):
    """Dense, in float64: coefficients of every tile by matrix products."""
    theta = [start(i) for i in range(len(SHAPES))]
    momentum = [[torch.zeros_like(v) for v in theta] for _ in range(sites)]
    seen = []
    for _ in range(steps):
        gradients = [[v - target(s, i) for i, v in enumerate(theta)] for s in range(sites)]
        for index, value in enumerate(theta):
            matrix = value if value.dim() == 2 else value[None]
            high, wide = tile_sides(value.shape, chunk)
            left, right = cosine_basis(high).double(), cosine_basis(wide).double()
            total, senders = torch.zeros_like(matrix), torch.zeros_like(matrix)
            for s in range(sites):
                momentum[s][index] = beta * momentum[s][index] + rate * gradients[s][index]
                own = momentum[s][index].view(matrix.shape)
                for row in range(0, matrix.shape[0], high):
                    for column in range(0, matrix.shape[1], wide):
                        place = (slice(row, row + high), slice(column, column + wide))
                        coefficients = left @ own[place] @ right.mT
                        flat = coefficients.flatten()
                        chosen = flat.abs().topk(min(kept, flat.numel())).indices
                        mask = torch.zeros_like(flat)
                        mask[chosen] = 1
                        mask = mask.view_as(coefficients)
                        total[place] += coefficients * mask
                        senders[place] += mask
                        own[place] -= left.mT @ (coefficients * mask) @ right
            step = torch.zeros_like(matrix)
            for row in range(0, matrix.shape[0], high):
                for column in range(0, matrix.shape[1], wide):
                    place = (slice(row, row + high), slice(column, column + wide))
                    found = left.mT @ (total[place] / senders[place].clamp(min=1)) @ right
                    # In the middle of an odd side cosines are zero, which is none of float64's.
                    step[place] = found * (found.abs() > 1e-12 * found.abs().max())
            theta[index] = value - rate * step.view_as(value).sign()
        seen.append(([v.clone() for v in theta], [[m.clone() for m in each] for each in momentum]))
    return seen


@pytest.mark.parametrize(("sites", "kept", "chunk"), [(1, 3, 4), (2, 3, 4), (3, 2, 8), (2, 10**6, 4)])
def test_demo_is_its_equations(sites, kept, chunk):
    rate, beta, steps = 0.01, 0.9, 6

    def body(site, own):
        model = Model()
        optimizer = DeMo(model.parameters(), lr=rate, beta=beta)
        outer = outer_loop(
            model,
            optimizer,
            own,
            method="demo",
            settings={"demo": {"compression_topk": kept, "compression_chunk": chunk}},
        )
        outer.join()
        seen = []
        for _ in range(steps):
            for index, parameter in enumerate(model.p):
                parameter.grad = parameter.detach() - target(site, index).float()
            optimizer.step()
            outer.step()
            seen.append((model.values(), [optimizer.state[each]["momentum"].clone() for each in model.p]))
        return seen, outer.ledger.last.bytes_sent

    results = run_sites(sites, body)
    want = demo_reference(sites, steps, beta, rate, kept, chunk)
    for site, (seen, _) in enumerate(results):
        for (values, momenta), (theta, expected) in zip(seen, want):
            for value, expected_value in zip(values, theta):
                torch.testing.assert_close(value.double(), expected_value, rtol=0, atol=1e-5)
            for momentum, expected_momentum in zip(momenta, expected[site]):
                torch.testing.assert_close(momentum.double(), expected_momentum, rtol=0, atol=1e-5)
            if kept == 10**6:
                assert all(momentum.abs().max() < 1e-6 for momentum in momenta)
    assert len({tuple(v.sum().item() for v in seen[-1][0]) for seen, _ in results}) == 1
    tiles = [(torch.Size(s).numel() // (a * b), a * b) for s in SHAPES for a, b in [tile_sides(torch.Size(s), chunk)]]
    sent = sum(count * min(kept, size) for count, size in tiles)
    assert results[0][1] == (sites - 1) * (4 * sent + 12 * -(-sent // 8))


def test_muloco_of_one_site_and_one_step_is_muon():
    def train(outer_of):
        model = Model()
        optimizer = Muon(model.parameters(), lr=0.02)
        outer = outer_of(model, optimizer)
        for _ in range(4):
            for index, parameter in enumerate(model.p):
                parameter.grad = parameter.detach() - target(0, index).float()
            optimizer.step()
            if outer is not None:
                outer.step()
        return model.values()

    def body(site, own):
        def build(model, optimizer):
            outer = outer_loop(model, optimizer, own, method="muloco", sync_every=1, outer_lr=1.0, outer_momentum=0.0)
            outer.join()
            return outer

        return train(build)

    for mine, plain in zip(run_sites(1, body)[0], train(lambda model, optimizer: None)):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-6)


def test_a_site_that_joins_late_takes_over_what_the_method_shares():
    """It starts where a member stands, and never pulls the mean towards its own past."""
    for method, settings in {
        "eager_diloco": {"sync_every": 3},
        "sparta": {"sync_every": 4, "settings": {"sparta": {"sparta_fraction": 0.3}}},
        "noloco": {"sync_every": 3},
    }.items():
        meeting = Meeting()

        def body(site, own):
            model = Model()
            if site == 1:
                for parameter in model.parameters():
                    parameter.data.fill_(1e4)  # what it would bring if it were let in as it is
            outer = outer_loop(model, [], own, method=method, **settings)
            outer.join()
            while outer.inner_step < 16:
                model.inner_step(site)
                outer.step()
                if site == 0 and outer.inner_step == 5:
                    meeting.arrive()
                    wait_for_requests(own.lighthouse, 1)
            outer.finish()
            return model.values(), outer.ledger.last.participants

        def late(index):
            if index == 1:
                meeting.wait()

        (first, met), (second, _) = run_sites(2, body, min_sites=1, before=late)
        assert met == 2, method
        for mine, theirs in zip(first, second):
            assert mine.abs().max() < 100, method
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
