"""What others measured that fewer bytes cost in loss: good enough to order settings by, not to predict a loss with."""

import math
from collections.abc import Sequence
from itertools import pairwise

# Loss above synchronous training in percent by inner steps a round: ft-diloco's README, 51M parameters on TinyStories.
_BY_PERIOD = ((1, 0.0), (25, 2.8), (50, 4.7), (100, 6.3), (200, 7.4), (500, 9.4))

# Streaming DiLoCo (arXiv 2501.18512, tables 1 and 4): four bits cost nothing that shows at 1B; of two codecs between
# which nothing was measured, the one that keeps more comes first.
_BY_CODEC = {"fp32": 0.0, "bf16": 0.01, "int8": 0.05, "int4": 0.1}

# The same paper, figure 8: below 0.2 % up to ten steps.
_BY_DELAYED_STEP = 0.02

# DES-LOC (arXiv 2505.22549, section 5.5), 1B at 32 steps a round: perplexity 7.56 against DiLoCo's 7.63, and Local
# Adam's 8.13; in percent of the loss.
_BY_METHOD = {"des_loc": -0.45, "local_adam": 3.1}

_MOST_PERIOD = 2000


def loss_percent(method: str, sync_every: int, codec: str, delay: int) -> float:
    """Loss above synchronous training that these settings are thought to cost, in percent."""
    other = _BY_METHOD.get(method, 0.0) + _BY_CODEC.get(codec, 0.0) + _BY_DELAYED_STEP * delay
    return _interpolate(_BY_PERIOD, min(sync_every, _MOST_PERIOD)) + other


def _interpolate(points: Sequence[tuple[int, float]], period: int) -> float:
    """Between the points by the logarithm of the period, and beyond the last as between the last two."""
    stretches = list(pairwise(points))
    (low, first), (high, second) = next((each for each in stretches if period <= each[1][0]), stretches[-1])
    return first + (second - first) * math.log(period / low) / math.log(high / low)
