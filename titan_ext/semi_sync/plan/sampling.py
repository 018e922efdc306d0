"""Which sites train in a round, where not all do (DEPT, arXiv 2410.05021, section 2.1; FedAvg, arXiv 1602.05629)."""

import random
from collections.abc import Collection
from typing import TYPE_CHECKING

from titan_ext.semi_sync.methods import build_plan
from titan_ext.semi_sync.plan.plan import PARAMETERS

if TYPE_CHECKING:
    from titan_ext.semi_sync.config import SemiSyncConfig
    from titan_ext.semi_sync.round.round import Round


class Draw:
    """Whether this site trains until the next round.

    Args:
        config: resolved settings.
        name: of this site.

    Raises:
        ValueError: sites are to be drawn, and this one has no name.
    """

    def __init__(self, config: "SemiSyncConfig", name: str) -> None:
        if config.sites_per_round is not None and not name:
            raise ValueError("sites_per_round: sites are drawn by name; give site_name")
        self._config, self._name = config, name
        self.idle = False

    def after(self, round_: "Round") -> None:
        """Draw anew among the sites of a round; all of them come to the same answer."""
        count, seed = self._config.sites_per_round, self._config.sampling_seed
        if count is not None:
            names = [site.name for site in round_.table]
            self.idle = self._name not in drawn(names, count, seed, round_.clock // self._config.sync_every)


def drawn(names: Collection[str], count: int, seed: int, round_: int) -> set[str]:
    """The sites of one round: uniform, without replacement, independent of other rounds; equal at all sites.

    Args:
        names: sites to draw from, in any order.
        count: how many to draw; all of them if there are no more.
        seed: of all draws.
        round_: index of the round.
    """
    everybody = sorted(names)
    return set(random.Random(f"{seed}/{round_}").sample(everybody, min(count, len(everybody))))


def check_rounds(config: "SemiSyncConfig") -> None:
    """Refuse drawing sites, or forgetting the inner optimizer, where rounds have no common end.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    count = config.sites_per_round
    if count is not None and count < 1:
        raise ValueError(f"sites_per_round = {count}: must be at least 1, or left out for all sites")
    for key, value in (("sites_per_round", count), ("reset_inner_optimizer", config.reset_inner_optimizer)):
        if value and (config.num_fragments > 1 or config.fragment_sync_delay > 0):
            raise ValueError(f"{key} = {value}: must be left out with fragments or a delay: rounds overlap")
    rows = build_plan(config).rows
    if config.reset_inner_optimizer and any(row.state != PARAMETERS for row in rows):
        raise ValueError(
            f'reset_inner_optimizer = True: must be false with method = "{config.method}", which averages the states'
        )
    if count is not None and (config.order == "paper" or any(row.kind is not None for row in rows)):
        raise ValueError(f'sites_per_round = {count}: must be left out with method = "{config.method}" or order = "paper"')
