"""Which settings of the outer loop to take: those of least loss that keep the sites busy enough."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from titan_ext.config.cost.outer_cost import LaunchCost
from titan_ext.links.tcp import connection_rate
from titan_ext.planner.prediction import Prediction, Surroundings, Workload, predict
from titan_ext.planner.published import loss_percent
from titan_ext.planner.workload import with_settings, workload
from titan_ext.semi_sync.config import SemiSyncConfig
from titan_ext.semi_sync.plan.components import NO_OUTER_LOOP

DEFAULT_TARGET = 0.9
_PERIOD_FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_CODECS = ("fp32", "bf16", "int8", "int4")
_DELAYS = (0, 1, 2, 5)
_STREAMS = (1, 2, 4, 8, 16, 32)
_ENOUGH_OF_LINK = 0.95
_KEEPS_BOTH_MOMENTS = {"Adam", "AdamW", "ADOPT"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Settings, and what they come to."""

    method: str
    sync_every: int
    codec: str
    delay: int
    streams: int
    """0: by the distance."""
    loss_percent: float
    """Above synchronous training, by what others published."""
    prediction: Prediction

    @property
    def settings(self) -> str:
        """As lines of a file would say it."""
        streams = self.streams or '"auto"'
        return (
            f'method = "{self.method}", sync_every = {self.sync_every}, codec = "{self.codec}", '
            f"fragment_sync_delay = {self.delay}, streams = {streams}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to take, why, and what comes next."""

    best: Option
    runner_up: Option | None
    target: float
    reason: str


Variants = dict[tuple[str, str], Workload]
"""Workloads by method and codec, all else being the file's."""


def variants(sites: Sequence[Any], tokens: int | None = None) -> Variants:
    """What other methods and codecs would send; empty without an outer loop.

    Args:
        sites: all ``Site`` of a run.
        tokens: the budget.
    """
    outer, found = sites[0].config.semi_sync, {}
    for method in _methods(sites) if outer.method != NO_OUTER_LOOP else ():
        for codec in dict.fromkeys((outer.codec, *_CODECS)):
            try:
                found[method, codec] = workload(with_settings(sites, method=method, codec=codec), tokens)
            except ValueError:
                continue  # the method takes no such codec, or not the file's other settings
    return found


def advise(outer: SemiSyncConfig, works: Variants, around: Surroundings, target: float) -> Advice | None:
    """The option of least loss whose utilisation is at least ``target`` at the low end of its interval.

    Args:
        outer: the file's ``[semi_sync]``.
        works: the ``variants`` of its sites.
        around: links, speed, faults.
        target: utilisation, from 0 to 1.

    Returns:
        None without an outer loop or a second site.
    """
    if around.wiring.sites < 2 or not works:
        return None
    streams = enough_streams(around)
    around = replace(around, wiring=replace(around.wiring, transport=replace(around.wiring.transport, streams=streams)))
    found = list(_options(outer, works, around))
    reaching = [each for each in found if each.prediction.utilisation.low >= target]
    if reaching:
        order = sorted(reaching, key=lambda each: (each.loss_percent, -each.prediction.utilisation.likely))
    else:
        order = sorted(found, key=lambda each: -each.prediction.utilisation.likely)
    best = order[0]
    others = [each for each in order[1:] if (each.method, each.codec) != (best.method, best.codec)]
    return Advice(
        best=best,
        runner_up=others[0] if others else None,
        target=target,
        reason=_reason(best, found, target, bool(reaching)),
    )


def enough_streams(around: Surroundings) -> int:
    """The file's connections of a pair of ranks, 0 for those by distance, if they carry what the slowest link can; else the
    fewest that do."""
    wiring = around.wiring
    slowest = wiring.slowest

    def rate(streams: int) -> float:
        return connection_rate(slowest, replace(wiring.transport, streams=streams), wiring.connections)

    most = rate(_STREAMS[-1])
    return next(streams for streams in (wiring.transport.streams, *_STREAMS) if rate(streams) >= _ENOUGH_OF_LINK * most)


def _options(outer: SemiSyncConfig, works: Variants, around: Surroundings) -> Iterator[Option]:
    for (method, codec), work in works.items():
        for sync_every, delay in _rhythms(outer):
            changed = replace(work, launches=_at(work, outer.sync_every / sync_every, delay))
            yield Option(
                method=method,
                sync_every=sync_every,
                codec=codec,
                delay=delay,
                streams=around.wiring.transport.streams,
                loss_percent=loss_percent(method, sync_every, codec, delay),
                prediction=predict(changed, around),
            )


def _rhythms(outer: SemiSyncConfig) -> list[tuple[int, int]]:
    """Periods and delays around the file's that its fragments allow."""
    periods = {max(1, round(outer.sync_every * factor)) for factor in _PERIOD_FACTORS}
    return [
        (period, delay)
        for period in sorted(periods)
        for delay in sorted({outer.fragment_sync_delay, *_DELAYS})
        if period % outer.num_fragments == 0 and delay < period // outer.num_fragments
    ]


def _methods(sites: Sequence[Any]) -> list[str]:
    """The file's, and those that any run of the same inner optimizer could take instead."""
    names = {group.optimizer_name for site in sites for group in site.config.optimizer.param_groups}
    both_moments = ["des_loc"] if names <= _KEEPS_BOTH_MOMENTS else []
    return list(dict.fromkeys([sites[0].config.semi_sync.method, "diloco", *both_moments]))


def _at(work: Workload, often: float, delay: int) -> list[LaunchCost]:
    """The rounds with another period: as many bytes each, ``often`` times as many."""
    return [replace(each, times=max(1, math.floor(each.times * often)), delay=delay) for each in work.launches]


def _reason(best: Option, found: Sequence[Option], target: float, reached: bool) -> str:
    low = best.prediction.utilisation.low
    if not reached:
        return (
            f"no settings looked at keep the sites busy for {target:.0%} of the time at the low end of the interval; "
            f"these come nearest, with {low:.1%}"
        )
    more = [each for each in found if each.loss_percent < best.loss_percent]
    text = f"the sites are busy for at least {low:.0%} of the time, and what loses less in loss does not reach {target:.0%}"
    if not more:
        return (
            f"the sites are busy for at least {low:.0%} of the time, and nothing that was looked at loses less in loss"
        )
    nearest = max(more, key=lambda each: each.prediction.utilisation.low)
    return f"{text} (nearest: {nearest.settings}: {nearest.prediction.utilisation.low:.0%})"
