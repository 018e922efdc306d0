"""Updates that must not steer the mean: outliers, what is not a number, and sites that robust aggregation outvotes."""

import math

import pytest
import torch

from tests.semi_sync.sites import outer_loop, run_sites
from tests.semi_sync.test_membership import one_weight
from titan_ext.semi_sync.round.contributions import Contributions


class Blobs(torch.nn.Module):
    """Two parameters, so that the norm of an update is one over several."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(3))
        self.second = torch.nn.Parameter(torch.zeros(2, 2))

    def add(self, amount: float) -> None:
        for parameter in self.parameters():
            parameter.data += amount

    def values(self) -> set[float]:
        return {round(value, 5) for parameter in self.parameters() for value in parameter.flatten().tolist()}


def rounds(amounts, **settings):
    """Each site adds its amount once a round, two rounds; what every site's model then holds, and its records."""

    def body(index, own):
        model, records = Blobs(), []
        outer = outer_loop(model, [], own, sync_every=1, on_round=records.append, **settings)
        outer.join()
        for _ in range(2):
            model.add(amounts[index])
            outer.step()
        return model.values(), [record.participants for record in records], outer.shared_state_sha256()

    results = run_sites(len(amounts), body)
    assert len({digest for _, _, digest in results}) == 1
    return results


PLAIN = dict(outer_optimizer="sgd", outer_lr=1.0, outer_momentum=0.0)


@pytest.mark.parametrize(
    "settings, steps, each",
    [
        (dict(method="local_sgd", sync_every=1), 2, 2),
        (dict(method="diloco", sync_every=1, **PLAIN), 2, 2),
        (dict(method="diloco", sync_every=2, fragment_sync_delay=1, **PLAIN), 2, 1),  # launched after 1, lands after 2
    ],
    ids=["values", "pseudo-gradients", "in flight"],
)
def test_an_outlier_is_clipped_to_the_threshold(settings, steps, each, caplog):
    """Amounts 1, 1 and 100: the third counts as 5."""

    def body(index, own):
        model = Blobs()
        outer = outer_loop(model, [], own, outlier_threshold=5.0, **settings)
        outer.join()
        for _ in range(steps):
            model.add([1.0, 1.0, 100.0][own.participating_rank()])
            outer.step()
        return sorted({value for part in outer.global_parameters().values() for value in part.flatten().tolist()})

    for low_to_high in run_sites(3, body):
        assert low_to_high == pytest.approx([each * (1 + 1 + 5) / 3] * len(low_to_high))
    assert "site #2: its update" in caplog.text and "clipped" in caplog.text


def test_an_outlier_is_left_out_and_takes_the_others_mean(caplog):
    results = rounds([1.0, 2.0, 100.0], method="local_sgd", outlier_threshold=5.0, outlier_action="drop")
    for values, participants, _ in results:
        assert values == {3.0}
        assert participants == [2, 2]
    assert "left out" in caplog.text


def test_of_two_updates_none_is_the_outlier():
    for values, participants, _ in rounds([1.0, 1000.0], method="local_sgd", outlier_threshold=2.0):
        assert values == {1001.0} and participants == [2, 2]


def test_without_a_threshold_everything_passes():
    for values, _, _ in rounds([1.0, 1.0, 100.0], method="local_sgd", outlier_threshold=0.0):
        assert values == {68.0}


def test_factors_bring_an_outlier_back_to_the_bound():
    contributions = Contributions([1.0, 1.0, 0.0, 1.0], [[1.0, 2.0], [3.0, 2.0], [9e9, 0.0], [60.0, 2.0]])
    assert contributions.outliers(10.0) == {3: [30.0 / 60.0, 1.0]}
    assert contributions.outliers(0.0) == {}
    contributions.guard(10.0, "drop")
    assert contributions.contributors == [0, 1] and contributions.total_weight == 2.0


@pytest.mark.parametrize(
    "norms, outliers",
    [
        ([0.0, 0.0, 1.0], {}),
        ([0.0, 0.0, 0.0], {}),
        ([0.0, 1.0, 100.0], {2: 0.1}),  # the median is no zero
        ([0.0] * 5 + [1.0, 1.0], {}),  # of two updates none is the outlier
        ([0.0] * 5 + [1.0, 2.0, 100.0], {7: 0.2}),
        ([1.0, 1.0, math.inf], {2: 0.0}),  # finite numbers with a norm that fp32 does not have
        ([0.0, 0.0, math.inf], {}),
    ],
)
def test_who_did_not_move_is_no_measure(norms, outliers):
    found = Contributions([1.0] * len(norms), [[norm] for norm in norms]).outliers(10.0)
    assert found == {rank: [pytest.approx(factor)] for rank, factor in outliers.items()}


@pytest.mark.parametrize("action", ["clip", "drop"])
@pytest.mark.parametrize("method", ["local_sgd", "diloco"])
def test_the_one_site_that_moved_counts_in_full(method, action):
    settings = PLAIN if method == "diloco" else {}
    for values, participants, _ in rounds([0.0, 0.0, 3.0], method=method, outlier_action=action, **settings):
        assert values == {2.0} and participants == [3, 3]


@pytest.mark.parametrize("action, want", [("clip", {2 / 3}), ("drop", {1.0})])
def test_an_update_whose_norm_overflows_is_an_outlier(action, want, caplog):
    def body(index, own):
        model = Blobs()
        outer = outer_loop(model, [], own, method="diloco", sync_every=1, outlier_action=action, **PLAIN)
        outer.join()
        model.add([1.0, 1.0, 1e25][index])
        outer.step()
        return model.values()

    assert all(values == {round(value, 5) for value in want} for values in run_sites(3, body))
    assert "inf times" in caplog.text


AMOUNTS = [1.0, 2.0, 3.0, 4.0, -5000.0]


@pytest.mark.parametrize(
    "settings, want",
    [
        (dict(aggregation="median"), 2.0),
        (dict(aggregation="trimmed_mean"), 2.0),
        (dict(aggregation="trimmed_mean", settings={"trimmed_mean": {"sites": 7}}), 2.0),
        (dict(aggregation="median", codec="bf16"), 2.0),
        (dict(aggregation="median", codec="int8"), 2.0),
    ],
)
def test_a_wrong_site_does_not_steer_robust_aggregation(settings, want):
    """The median and the mean of the middle three of -5000, 1, 2, 3 and 4 are 2."""
    for values, participants, _ in rounds(AMOUNTS, method="local_sgd", outlier_threshold=0.0, **settings):
        assert all(value == pytest.approx(2 * want, rel=0.01) for value in values)
        assert participants == [5, 5]


def test_median_of_an_even_count_is_the_mean_of_the_middle_two():
    for values, _, _ in rounds([0.0, 1.0, 2.0, 30.0], method="local_sgd", outlier_threshold=0.0, aggregation="median"):
        assert values == {3.0}


def test_a_site_that_is_not_a_number_does_not_count_in_the_median():
    amounts = [1.0, 2.0, math.nan]

    def body(index, own):
        model = one_weight(0.0)
        outer = outer_loop(model, [], own, method="local_sgd", sync_every=1, aggregation="median")
        outer.join()
        model.weight.data += amounts[index]
        outer.step()
        return model.weight.tolist()

    assert run_sites(3, body) == [[1.5] * 3] * 3
