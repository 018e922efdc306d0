"""The planner's formulas against the tables of papers."""

import math

import pytest

from titan_ext.planner.prediction import days_for
from titan_ext.planner.sync_time import (
    all_to_all_seconds,
    parameter_server_seconds,
    ring_seconds,
    stall_seconds,
    utilisation,
)

# Photon (arXiv 2411.02908), wall-clock table at 10 Gbit/s: bytes of the model in bfloat16, sites, local steps a second,
# seconds of a ring all-reduce; hours of computing and of communicating, federated (500 local steps a round) and
# centralised.
TEN_GBIT = 1250e6
PHOTON = {
    "1.3B": (2631.93e6, 8, 0.147, 3.6847, 19, (17.95, 0.019), 0.8396, 19_759, (6.54, 20.22)),
    "3B": (5303.67e6, 4, 0.144, 6.3644, 26, (25.08, 0.046), 0.395, 22_900, (16.10, 40.48)),
    "7B": (13317.72e6, 4, 0.032, 15.9813, 22, (95.49, 0.098), 0.120, 21_908, (50.71, 97.25)),
}


@pytest.mark.parametrize("model", PHOTON)
def test_photons_wall_clock_table(model: str) -> None:
    payload, sites, local_rate, ring, rounds, federated, central_rate, steps, centralised = PHOTON[model]
    seconds = ring_seconds(payload, sites, TEN_GBIT)
    assert seconds == pytest.approx(ring, abs=5e-5)
    computing, communicating = rounds * 500 / local_rate / 3600, rounds * seconds / 3600
    assert (round(computing, 2), round(communicating, 3)) == federated
    assert (round(steps / central_rate / 3600, 2), round(steps * seconds / 3600, 2)) == centralised
    share = computing / (computing + communicating)
    assert utilisation(1 / local_rate, 500 * rounds, [rounds * seconds]) == pytest.approx(share)


def test_photons_topologies_at_7b() -> None:
    payload = PHOTON["7B"][0]
    found = [f(payload, 4, TEN_GBIT) for f in (parameter_server_seconds, all_to_all_seconds, ring_seconds)]
    assert [round(each, 2) for each in found] == [85.23, 31.96, 15.98]


def test_intellect_1_kept_its_nodes_busy() -> None:
    assert round(utilisation(2280 / 100, 100, [469]), 3) == 0.829


# Streaming DiLoCo (arXiv 2501.18512), Gbit/s needed for a compute utilisation; layers, seconds of a step, parameters.
TARGETS = (0.5, 0.8, 0.9, 0.95, 0.99)
MODELS = {"1B": (24, 0.1, 1e9), "10B": (48, 0.8, 10e9), "100B": (108, 4.9, 100e9)}
# Steps between two syncs of a layer, layers of a fragment (None: all), overlapped steps, bits of a value.
METHODS = {
    "data-parallel": (1, None, 0, 16),
    "diloco": (100, None, 0, 16),
    "streaming": (100, 3, 0, 16),
    "overlap": (100, 3, 1, 16),
    "fp4": (100, 3, 1, 4),
}
GBIT = {
    ("1B", "data-parallel"): (86.8, 152.6, 184.2, 222.3, 569.0),
    ("1B", "diloco"): (1.4, 6.2, 13.3, 23.3, 86.8),
    ("1B", "streaming"): (1.4, 5.2, 9.1, 16.0, 28.1),
    ("1B", "overlap"): (1.4, 4.3, 6.2, 9.1, 11.0),
    ("1B", "fp4"): (0.4, 0.9, 1.7, 2.0, 3.0),
    ("10B", "data-parallel"): (104.8, 222.3, 222.3, 268.3, 471.5),
    ("10B", "diloco"): (1.7, 7.5, 16.0, 33.9, 104.8),
    ("10B", "streaming"): (1.7, 5.2, 9.1, 13.3, 19.3),
    ("10B", "overlap"): (1.7, 3.6, 5.2, 6.2, 7.5),
    ("10B", "fp4"): (0.4, 0.9, 1.4, 1.4, 1.7),
    ("100B", "data-parallel"): (184.2, 323.8, 390.7, 390.7, 471.5),
    ("100B", "diloco"): (3.0, 11.0, 23.3, 49.4, 184.2),
    ("100B", "streaming"): (2.4, 6.2, 9.1, 11.0, 19.3),
    ("100B", "overlap"): (1.7, 3.6, 4.3, 5.2, 5.2),
    ("100B", "fp4"): (0.5, 0.9, 1.1, 1.1, 1.4),
}
# The paper looked at bandwidths this factor apart, and prints one digit after the point.
GRID = 10 ** (4 / 49)


def busy(model: str, method: str, gbit: float) -> float:
    """The utilisation of the paper's simulator: two sites; a layer is sent when its backward pass is over, and needed
    when the next forward pass comes to it."""
    layers, step, parameters = MODELS[model]
    period, together, overlapped, bits = METHODS[method]
    together = together or layers
    fragments = layers // together
    layer = ring_seconds(parameters / layers * bits / 8, 2, gbit * 1e9 / 8)
    stalls = []
    for fragment in range(fragments):
        # The lowest layer arrives last, and the next forward pass, a third of a step, needs it first.
        hidden = overlapped * step + step / 3 * fragment / layers
        # So many layers are left when the backward pass, two thirds of a step, has come down to this one.
        stalls.append(
            max(
                stall_seconds(layer * (place + 1), hidden + step * 2 / 3 * below / layers)
                for place, below in enumerate(range(fragment, layers, fragments))
            )
        )
    return utilisation(step, period, stalls)


def needed_gbit(model: str, method: str, target: float) -> float:
    low, high = 1e-3, 1e6
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if busy(model, method, middle) >= target else (middle, high)
    return high


@pytest.mark.parametrize(("model", "method"), GBIT)
def test_bandwidth_for_utilisation_of_streaming_diloco(model: str, method: str) -> None:
    for target, printed in zip(TARGETS, GBIT[model, method], strict=True):
        ours = needed_gbit(model, method, target)
        rounding = 0.05 / printed
        assert 1 / GRID - rounding <= ours / printed <= GRID + rounding, (target, ours, printed)


# DES-LOC (arXiv 2505.22549): table 5's sequences a second, table 2's days to twice the compute-optimal tokens, at K = 16
# and 256; 1B is 20,480 steps of 1,024 sequences, 7B four and 13B eight times as many.
SEQUENCES = {"1B": 20_480 * 1_024, "7B": 4 * 20_480 * 1_024, "13B": 8 * 20_480 * 1_024}
DES_LOC = {
    "1B": {
        "DDP": ((171.9, 1.41),),
        "FAVG+OPT": ((304.9, 0.80), (385.4, 0.63)),
        "Local Adam": ((253.1, 0.96), (380.1, 0.64)),
        "DES-LOC": ((299.2, 0.81), (384.1, 0.63)),
    },
    "7B": {
        "DDP": ((25.1, 38.74),),
        "FAVG+OPT": ((34.0, 28.52), (40.4, 24.01)),
        "Local Adam": ((30.9, 31.46), (40.2, 24.18)),
        "DES-LOC": ((33.7, 28.80), (40.4, 24.06)),
    },
    "13B": {
        "DDP": ((11.1, 175.50),),
        "FAVG+OPT": ((19.4, 100.21), (23.5, 82.66)),
        "Local Adam": ((16.7, 116.10), (23.3, 83.34)),
        "DES-LOC": ((19.0, 102.03), (23.5, 82.68)),
    },
}


@pytest.mark.parametrize("model", DES_LOC)
def test_days_of_des_loc(model: str) -> None:
    """Every number of table 2 is what table 5's throughput, which has one digit after the point, comes to."""
    for printed in DES_LOC[model].values():
        for throughput, days in printed:
            least = days_for(SEQUENCES[model], throughput + 0.05) - 0.005
            assert least <= days <= days_for(SEQUENCES[model], throughput - 0.05) + 0.005
    if model == "1B":  # whose throughput has four digits
        for printed in DES_LOC[model].values():
            assert [round(days_for(SEQUENCES[model], rate), 2) for rate, _ in printed] == [days for _, days in printed]
