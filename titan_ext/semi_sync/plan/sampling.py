"""Which sites train in a round, where not all do (DEPT, arXiv 2410.05021, section 2.1; FedAvg, arXiv 1602.05629)."""

import random
from collections.abc import Collection, Sequence

from titan_ext.semi_sync.plan.plan import SiteSampling


class SiteSampler:
    """Whether this site trains until the next round.

    Args:
        sampling: how sites are sampled.
        name: of this site.

    Raises:
        ValueError: sites are to be sampled, and this one has no name.
    """

    def __init__(self, sampling: SiteSampling, name: str) -> None:
        if sampling.sites_per_round is not None and not name:
            raise ValueError("sites_per_round: sites are sampled by name; give site_name")
        self._sampling, self._name = sampling, name
        self.sits_out = False

    def after_round(self, names: Sequence[str], step: int) -> None:
        """Sample anew among the sites of the round of inner step ``step``; all of them come to the same answer."""
        count, seed = self._sampling.sites_per_round, self._sampling.seed
        if count is not None:
            self.sits_out = self._name not in sampled(names, count, seed, step // self._sampling.period)


def sampled(names: Collection[str], count: int, seed: int, round_: int) -> set[str]:
    """The sites of one round: uniform, without replacement, independent of other rounds; equal at all sites.

    Args:
        names: sites to sample from, in any order.
        count: how many to sample; all of them if there are no more.
        seed: of all samples.
        round_: index of the round.
    """
    everybody = sorted(names)
    return set(random.Random(f"{seed}/{round_}").sample(everybody, min(count, len(everybody))))
