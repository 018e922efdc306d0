"""Outer optimizers and robust means of titan_ext beside Flower's strategies, on arrays."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from titan_ext.bench.conformance.checks import Check, Part, close
from titan_ext.semi_sync.state.outer_optimizers import OUTER_OPTIMIZERS
from titan_ext.semi_sync.wire.aggregations import Median, TrimmedMean

_ROUNDS, _SITES, _NUMBERS = 8, 5, 40


def _sites(round_number: int, start: np.ndarray) -> list[np.ndarray]:
    """What the sites come to from ``start``, the same for all strategies but for where they start."""
    generator = np.random.default_rng(round_number)
    return [start + 0.1 * generator.standard_normal(_NUMBERS) for _ in range(_SITES)]


def _of_flower(strategy: Any, first_round: int) -> np.ndarray:
    where = np.zeros(_NUMBERS)
    for number in range(_ROUNDS):
        where = _once(strategy, _sites(number, where), first_round + number)
    return where


def _of_ours(name: str, settings: dict[str, Any]) -> torch.Tensor:
    where = torch.zeros(_NUMBERS)
    optimizer = OUTER_OPTIMIZERS.get(name)(**settings).build([where])
    for number in range(_ROUNDS):
        mean = np.mean(_sites(number, where.double().numpy()), axis=0)
        where.grad = where - torch.from_numpy(mean).float()
        optimizer.step()
    return where


def _outer_optimizers(part: str, strategies: Any) -> Iterator[Check]:
    """With a floor of next to nothing: Flower's moments begin at 0, the paper's at the floor's square.

    Flower's FedAdam corrects its bias as if one round more had been; counted from 0, its rounds are Adam's.
    """
    from flwr.common import ndarrays_to_parameters

    first = {"initial_parameters": ndarrays_to_parameters([np.zeros(_NUMBERS)])}
    theirs: dict[str, Any] = {"eta": 0.05, "tau": 1e-9} | first
    own: dict[str, Any] = {"lr": 0.05, "eps": 1e-9}
    betas = {"beta_1": 0.9, "beta_2": 0.99}
    pairs = [
        (
            "sgd",
            {"lr": 0.7, "momentum": 0.9, "nesterov": False},
            "FedAvgM",
            {"server_learning_rate": 0.7, "server_momentum": 0.9} | first,
        ),
        ("adam", own | {"betas": (0.9, 0.99), "reading": "torch"}, "FedAdam", theirs | betas),
        ("yogi", own | {"betas": (0.9, 0.99)}, "FedYogi", theirs | betas),
        ("adagrad", own | {"betas": (0.0, 0.99)}, "FedAdagrad", theirs),
    ]
    for ours, settings, name, given in pairs:
        found = _of_flower(getattr(strategies, name)(**given), first_round=0 if name == "FedAdam" else 1)
        yield close(
            part, f'{name}: outer_optimizer = "{ours}"', _of_ours(ours, settings), torch.from_numpy(found), 1e-4
        )


def _robust_means(part: str, strategies: Any) -> Iterator[Check]:
    arrays = np.stack(_sites(0, np.zeros(_NUMBERS)))
    arrays[0] = 1e6  # a site that is off
    pairs = {
        "FedMedian": (Median(), strategies.FedMedian()),
        "FedTrimmedAvg": (TrimmedMean(sites=1), strategies.FedTrimmedAvg(beta=1 / _SITES)),
    }
    for name, (ours, strategy) in pairs.items():
        combined = ours.combine(torch.from_numpy(arrays).float())
        yield close(part, name, combined, torch.from_numpy(_once(strategy, arrays)), 1e-5)


def _once(strategy: Any, arrays: Iterable[np.ndarray], number: int = 1) -> np.ndarray:
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays

    found = [(None, FitRes(Status(Code.OK, ""), ndarrays_to_parameters([each]), 1, {})) for each in arrays]
    return parameters_to_ndarrays(strategy.aggregate_fit(number, found, [])[0])[0]


def _run(part: str) -> Iterator[Check]:
    from flwr.server import strategy as strategies  # type: ignore[import-not-found]

    yield from _outer_optimizers(part, strategies)
    yield from _robust_means(part, strategies)


FLOWER = Part({"flwr": "flwr"}, _run)
