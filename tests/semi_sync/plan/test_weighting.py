"""Policies of the sites' weights: q-FedAvg (arXiv 1905.10497), AFL (1902.00146), TERM (2007.01162), and the plain ones."""

import itertools
import math
import random

import pytest

from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.plan.resolve import resolve
from titan_ext.semi_sync.plan.weighting import (
    WEIGHTINGS,
    Agnostic,
    OwnWork,
    QFair,
    SiteWeighting,
    Standing,
    Tilted,
    project_on_simplex,
)

BY_LOSS = {"q_fair": QFair(q=2.0), "agnostic": Agnostic(share_lr=0.3), "tilted": Tilted(tilt=0.7)}


def standings(policy: SiteWeighting, losses: list[float], **more: list[float]) -> list[Standing]:
    return [
        Standing(loss=loss, merit=policy.merit(loss), **{key: values[place] for key, values in more.items()})
        for place, loss in enumerate(losses)
    ]


def proportions(policy: SiteWeighting, losses: list[float]) -> list[float]:
    """Of the mean that the shares come to; for AFL those of the round after."""
    shares = policy.shares(standings(policy, losses))
    factors = shares.remembered or shares.factors
    return [factor / math.fsum(factors) for factor in factors]


@pytest.mark.parametrize(("q", "expected"), [(0.0, (0.95, -0.1)), (1.0, (0.9714, -0.1143)), (2.0, (0.9853, -0.1176))])
def test_q_fedavg_takes_the_paper_s_step(q, expected):
    """w = (1, 0), w_1 = (0.9, 0), w_2 = (1, -0.2), losses 1 and 2, sites' learning rate 0.1."""
    policy, start, ends = QFair(q=q, inner_lr=0.1), (1.0, 0.0), [(0.9, 0.0), (1.0, -0.2)]
    norms = [math.dist(start, end) for end in ends]
    shares = policy.shares(standings(policy, [1.0, 2.0], norm=norms))
    total = math.fsum(shares.factors)
    found = [
        start[place]
        - shares.step
        * sum(f / total * (start[place] - end[place]) for f, end in zip(shares.factors, ends, strict=True))
        for place in range(2)
    ]
    assert found == pytest.approx(expected, abs=5e-5)


def test_q_fedavg_shrinks_the_step():
    policy = QFair(q=1.0, inner_lr=0.1)
    shares = policy.shares(standings(policy, [1.0, 2.0], norm=[0.1, 0.2]))
    total = math.fsum(shares.factors)
    assert [shares.step * f / total for f in shares.factors] == pytest.approx([0.2857, 0.5714], abs=5e-5)
    assert shares.step == pytest.approx(0.857, abs=5e-4)


def test_without_a_learning_rate_q_fair_shares_by_the_power_of_the_loss():
    policy = QFair(q=2.0)
    shares = policy.shares(standings(policy, [1.0, 2.0, 3.0]))
    assert [f / math.fsum(shares.factors) for f in shares.factors] == pytest.approx([1 / 14, 4 / 14, 9 / 14])
    assert shares.step == 1.0


@pytest.mark.parametrize(("values", "expected"), [((0.5, 0.5, 0.5), (1 / 3,) * 3), ((1.2, 0.1, 0.0), (1, 0, 0))])
def test_projection_vectors(values, expected):
    assert project_on_simplex(values) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_the_nearest_point_of_the_simplex(seed):
    generator = random.Random(seed)
    values = [generator.uniform(-1, 2) for _ in range(3)]
    found = project_on_simplex(values)
    assert math.fsum(found) == pytest.approx(1) and min(found) >= 0
    assert project_on_simplex(found) == pytest.approx(found), "what lies on it stays"
    grid = [index / 40 for index in range(41)]
    points = [(a, b, 1 - a - b) for a, b in itertools.product(grid, grid) if a + b <= 1]
    assert math.dist(found, values) <= min(math.dist(point, values) for point in points) + 1e-9


def test_agnostic_shares_follow_the_losses_round_by_round():
    policy, share, reference = Agnostic(share_lr=0.1), [-1.0, -1.0], [0.5, 0.5]
    for losses in ([1.0, 2.0], [1.0, 1.5], [3.0, 0.5], [1.0, 9.0], [1.0, 9.0]):
        shares = policy.shares(standings(policy, losses, share=share))
        assert shares.factors == pytest.approx(reference), "the round's mean is of the shares before its losses"
        moved = [each + 0.1 * loss for each, loss in zip(reference, losses, strict=True)]
        # Of two sites the projection halves what is too much, and cuts off below 0.
        over = (sum(moved) - 1) / 2
        low = max(0.0, min(1.0, moved[0] - over))
        reference, share = [low, 1 - low], list(shares.remembered)
        assert share == pytest.approx(reference)
    assert share == [0.0, 1.0]


def test_agnostic_shares_of_the_sites_that_are_there_sum_to_one():
    policy = Agnostic(share_lr=0.0)
    shares = policy.shares(standings(policy, [1.0, 1.0, 1.0], share=[0.2, 0.4, -1.0]))
    assert math.fsum(shares.factors) == pytest.approx(1)


def test_tilted_shares_are_a_softmax():
    assert proportions(Tilted(tilt=1.0), [1.0, 2.0]) == pytest.approx([0.2689, 0.7311], abs=5e-5)
    objective = math.log(sum(Tilted(tilt=1.0).merit(loss) for loss in (1.0, 2.0)) / 2)
    assert objective == pytest.approx(1.6201, abs=5e-5)
    assert proportions(Tilted(tilt=32.0), [21.0, 22.0]) == pytest.approx([0, 1], abs=1e-9)


@pytest.mark.parametrize("name", BY_LOSS)
def test_shares_are_a_distribution_that_never_falls_with_the_loss(name):
    policy, generator = BY_LOSS[name], random.Random(name)
    for _ in range(20):
        losses = [generator.uniform(0.1, 4) for _ in range(4)]
        before = proportions(policy, losses)
        assert math.fsum(before) == pytest.approx(1) and min(before) >= 0
        losses[2] += generator.uniform(0, 2)
        assert proportions(policy, losses)[2] >= before[2] - 1e-12


@pytest.mark.parametrize("name", BY_LOSS)
def test_equal_losses_and_a_single_site(name):
    assert proportions(BY_LOSS[name], [1.7] * 5) == pytest.approx([0.2] * 5)
    assert proportions(BY_LOSS[name], [1.7]) == [1.0]


@pytest.mark.parametrize("name", BY_LOSS)
def test_a_site_that_does_not_know_its_loss_counts_as_the_mean_of_the_others(name):
    policy = BY_LOSS[name]
    known = standings(policy, [1.0, 3.0])
    found = policy.shares([known[0], Standing(), known[1]])
    factors = found.remembered or found.factors
    assert factors[0] < factors[1] < factors[2]
    nobody = policy.shares([Standing(), Standing()])
    assert nobody.factors[0] == nobody.factors[1] > 0


def test_plain_policies():
    work = OwnWork(fixed=0.25, tokens=8, steps=2)
    weights = {name: WEIGHTINGS.get(name)().own_weight(work) for name in ("uniform", "site", "tokens")}
    assert weights == {"uniform": 1.0, "site": 0.25, "tokens": 8.0}
    by_batch = WEIGHTINGS.get("tokens_times_batch")()
    assert by_batch.own_weight(work) == 32.0 and by_batch.own_weight(OwnWork(tokens=4, steps=2)) == 8.0
    assert by_batch.own_weight(OwnWork(tokens=0, steps=0)) == 0.0
    assert QFair(base="tokens").own_weight(work) == 8.0


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(weighting="fair"), "weighting = 'fair': must be one of"),
        (dict(settings={"q_fair": {"q": 2.0}}), 'weighting = "q_fair"'),
        (dict(weighting="tilted", num_fragments=2, sync_every=4), "weighting = 'tilted': must be other than by loss"),
        (dict(weighting="tilted", fragment_sync_delay=1, fragment_update_alpha=0.5), "other than by loss"),
        (dict(weighting="tilted", method="sparta"), "other than by loss"),
        (dict(weighting="tilted", aggregation="median"), "aggregation = 'median'"),
        (dict(weighting="q_fair", outlier_threshold=0.0, settings={"q_fair": {"inner_lr": 0.1}}), "outlier_threshold"),
        (dict(weighting="q_fair", settings={"q_fair": {"q": -1.0}}), "q = -1.0: must be from 0 to 32"),
        (dict(weighting="tilted", settings={"tilted": {"tilt": 99.0}}), "tilt = 99.0: must be from 0 to 32"),
        (dict(weighting="tilted", settings={"tilted": {"base": "loss"}}), "base = 'loss': must be one of"),
    ],
)
def test_what_cannot_be_is_refused(settings, problem):
    with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        resolve(SemiSyncConfig(**settings))
