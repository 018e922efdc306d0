"""Aggregations: how the sites' contributions become one.

An aggregation is a frozen dataclass whose fields are its settings: ``[semi_sync.NAME]`` in a configuration, where NAME
is what it is registered under.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from titan_ext.optim.exact import divide_
from titan_ext.semi_sync.registry import Registry
from titan_ext.semi_sync.wire.codecs import Codec
from titan_ext.semi_sync.wire.coded_reductions import CodedReduction, ElementwiseReduction, WholeReduction
from titan_ext.semi_sync.wire.reductions import AllReduce, RankSum, Reduction

AGGREGATIONS: "Registry[type[Aggregation]]" = Registry("aggregation")
"""Aggregations by the name that ``aggregation`` accepts: ``@register_aggregation("name")`` adds one."""

_PIECE = 2**16  # elements of each site sorted at a time


register_aggregation = AGGREGATIONS.register
"""Decorate a frozen dataclass that is an ``Aggregation``, so that ``aggregation = "name"`` selects it."""


@dataclass(frozen=True)
class Aggregation(ABC):
    """How the sites' weighted contributions become one value times the sum of the weights."""

    weighted: ClassVar[bool] = False
    """Whether it takes sites of unequal weight."""

    takes_sparse: ClassVar[bool] = False
    """Whether contributions may leave elements out (a sparse codec)."""

    elementwise: ClassVar[bool] = True
    """Whether an element's result depends on that element's contributions alone, however tensors are cut."""

    @property
    def sites_needed(self) -> int:
        """Contributors below which it does less than its settings say."""
        return 1

    @abstractmethod
    def build(self, codec: Codec, bucket_elements: int) -> Reduction:
        """The reduction that does it.

        Args:
            codec: how values travel.
            bucket_elements: largest message handed to the wire at once.
        """


@register_aggregation("mean")
@dataclass(frozen=True)
class Mean(Aggregation):
    """The weighted mean: about two messages of a contribution's size, whatever the number of sites."""

    weighted = True
    takes_sparse = True

    def build(self, codec: Codec, bucket_elements: int) -> Reduction:
        """As they are, or as messages of the codec, summed in fp32."""
        return AllReduce(bucket_elements) if codec.lossless else CodedReduction(codec, bucket_elements)


@dataclass(frozen=True)
class ElementwiseAggregation(Aggregation):
    """Every site gets every contribution and computes the result itself, some elements at a time.

    None has to believe another's sum. That is ``sites - 1`` messages instead of about two: for runs of few sites.
    """

    @abstractmethod
    def combine(self, contributions: torch.Tensor) -> torch.Tensor:
        """The aggregate ``[numel]`` of fp32 contributions ``[contributors, numel]``, which may be overwritten."""

    def build(self, codec: Codec, bucket_elements: int) -> Reduction:
        """Bucket by bucket."""
        return ElementwiseReduction(codec, bucket_elements, self.combine)


@dataclass(frozen=True)
class WholeAggregation(Aggregation):
    """As ``ElementwiseAggregation``, for rules that look at a contribution as a whole: Krum, a geometric median.

    Each rank holds its shard of every site's contribution at once, so memory is that of ``sites`` contributions.
    """

    elementwise = False

    @abstractmethod
    def combine(self, contributions: torch.Tensor, rank_sum: RankSum) -> torch.Tensor:
        """The aggregate ``[numel]`` of this rank's shards of the contributions, fp32 ``[contributors, numel]``.

        Args:
            contributions: may be overwritten.
            rank_sum: sums a small tensor over the ranks of the site, so that distances are those of whole contributions;
                all ranks call it equally often.
        """

    def build(self, codec: Codec, bucket_elements: int) -> Reduction:
        """All buckets first, then the aggregate."""
        return WholeReduction(codec, bucket_elements, self.combine)


@register_aggregation("median")
@dataclass(frozen=True)
class Median(ElementwiseAggregation):
    """The median of each coordinate over the sites (Yin et al. 2018, arXiv 1803.01498)."""

    @property
    def sites_needed(self) -> int:
        """The median of two is their mean."""
        return 3

    def combine(self, contributions: torch.Tensor) -> torch.Tensor:
        """The middle one, or the mean of the middle two."""
        return _trimmed_mean(contributions, (len(contributions) - 1) // 2)


@register_aggregation("trimmed_mean")
@dataclass(frozen=True)
class TrimmedMean(ElementwiseAggregation):
    """The mean of each coordinate without its largest and smallest values (arXiv 1803.01498).

    Raises:
        ValueError: fewer than one site is to be trimmed.
    """

    sites: int = 1
    """Contributions cut off at either end; with too few contributors for it, as many as leave one."""

    def __post_init__(self) -> None:
        if self.sites < 1:
            raise ValueError(f"sites = {self.sites}: must be at least 1")

    @property
    def sites_needed(self) -> int:
        """One must be left."""
        return 2 * self.sites + 1

    def combine(self, contributions: torch.Tensor) -> torch.Tensor:
        """What is left of each coordinate."""
        return _trimmed_mean(contributions, min(self.sites, (len(contributions) - 1) // 2))


def _trimmed_mean(contributions: torch.Tensor, cut: int) -> torch.Tensor:
    out = contributions.new_empty(contributions.shape[1])
    for part, target in zip(contributions.split(_PIECE, dim=1), out.split(_PIECE), strict=True):
        # NaN sorts last: what is not a number is cut off first. A zero has one sign, or which is kept were chance.
        kept = part.add_(0.0).sort(dim=0).values[cut : len(contributions) - cut]
        # One after the other: in what order a kernel sums depends on the hardware.
        target.copy_(kept[0])
        for each in kept[1:]:
            target.add_(each)
        divide_(target, len(kept))
    return out
