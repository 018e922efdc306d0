"""Aggregation that a few wrong sites cannot steer: each coordinate's median or trimmed mean over the sites.

Coordinate-wise median and trimmed mean are those of Yin et al. 2018 (arXiv 1803.01498). Every site gets
every other's values and computes the result itself, so that none has to believe another's sum. That is
``sites - 1`` messages instead of about two: for runs of few sites.
"""

from collections.abc import Sequence

import torch

from titan_ext.semi_sync.wire.codecs import Codec, Float32
from titan_ext.semi_sync.wire.reductions import CodedReduction

_PIECE = 2**16  # elements of each site sorted at a time


class RobustReduction(CodedReduction):
    """The robust centre of the contributions, times the sum of their weights, which must be equal.

    Args:
        codec: how values travel; None is fp32.
        bucket_elements: largest message handed to the wire at once.
        trimmed: contributions cut off at either end of each coordinate; None cuts all but the middle
            one or two (the median). With too few contributors for it, as many as leave one.
    """

    def __init__(self, codec: Codec | None, bucket_elements: int, trimmed: int | None) -> None:
        super().__init__(codec or Float32(), bucket_elements, to_all=True)
        self._trimmed = trimmed

    def _combine(self, messages: torch.Tensor, weights: Sequence[float], out: torch.Tensor) -> None:
        contributors = [rank for rank, weight in enumerate(weights) if weight > 0]
        if not contributors:
            out.zero_()
            return
        values = out.new_empty(len(contributors), out.numel())
        for rank, row in zip(contributors, values):
            self._codec.decode(messages[rank], row)
        cut = (len(contributors) - 1) // 2
        cut = cut if self._trimmed is None else min(self._trimmed, cut)
        for part, target in zip(values.split(_PIECE, dim=1), out.split(_PIECE)):
            # NaN sorts last: what is not a number is cut off first.
            kept = part.sort(dim=0).values[cut : len(contributors) - cut]
            torch.mean(kept, dim=0, out=target)
        out.mul_(sum(weights))
