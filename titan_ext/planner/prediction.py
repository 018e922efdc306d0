"""From what travels, over which links and how often: stall, utilisation, days and money."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from titan_ext.config.cost.outer_cost import LaunchCost
from titan_ext.links.link import Link, Links
from titan_ext.planner.faults import Faults
from titan_ext.planner.prices import Prices
from titan_ext.planner.range import Range
from titan_ext.planner.sync_time import Wiring, stall_seconds, sync_seconds, utilisation

_DAY = 86400.0
_MOST_RATE = 1e15
"""Bits a second above which a rate is not looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a run is to do."""

    sites: Sequence[str]
    steps: int
    """Inner steps of the file."""
    tokens_per_step: int
    """Of all sites together."""
    tokens: int
    """The budget."""
    launches: Sequence[LaunchCost]
    """Empty where nothing is exchanged."""
    ranks: Mapping[str, int]
    """By site."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPrediction:
    """A kind of round."""

    rules: tuple[str, ...]
    times: int
    site_bytes: int
    """Sent, and received, by a site each time."""
    delay: int
    sync_seconds: Range
    """From launch to result."""
    stall_seconds: Range
    """In which no inner step is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a run comes to."""

    rounds: tuple[RoundPrediction, ...]
    step_seconds: Range
    """Of the slowest site."""
    utilisation: Range
    """Share of the time in which inner steps are taken."""
    participation: float
    """Share of the sites' work that counts, after faults."""
    tokens_per_second: Range
    """Of all sites, those that count."""
    days: Range
    """To the budget of tokens."""
    sent_bytes: float
    """By a site, to the budget."""
    money: Range | None = None
    currency: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a run meets: links, speed of the sites, faults, prices."""

    wiring: Wiring
    step_seconds: Mapping[str, Range]
    """Of an inner step, by site."""
    faults: Faults = field(default_factory=Faults)
    prices: Prices | None = None

    @property
    def slowest_step(self) -> Range:
        """All wait for the slowest site."""
        steps = self.step_seconds.values()
        return Range(max(s.low for s in steps), max(s.likely for s in steps), max(s.high for s in steps))

    def scaled(self, factor: float) -> "Surroundings":
        """The same with ``factor`` times the rate of every link."""
        links = self.wiring.links
        pairs = {
            frozenset((one, other)): _scaled(links.between(place, place + 1 + more), factor)
            for place, one in enumerate(links.sites)
            for more, other in enumerate(links.sites[place + 1 :])
        }
        return replace(self, wiring=replace(self.wiring, links=Links(links.sites, pairs, None)))


def predict(work: Workload, around: Surroundings) -> Prediction:
    """What a run comes to."""
    step = around.slowest_step
    period = work.steps / max(1, sum(each.times for each in work.launches))
    rounds = tuple(_round(each, period, around, step) for each in work.launches)
    stalls = Range(
        sum(each.times * each.stall_seconds.low for each in rounds),
        sum(each.times * each.stall_seconds.likely for each in rounds),
        sum(each.times * each.stall_seconds.high for each in rounds),
    )
    # Fast steps hide less and are a smaller share.
    share = Range(
        utilisation(step.low, work.steps, [stalls.high]),
        utilisation(step.likely, work.steps, [stalls.likely]),
        utilisation(step.high, work.steps, [stalls.low]),
    )
    count = sum(each.times for each in rounds)
    cadence = (step.likely * work.steps + stalls.likely) / max(1, count)
    sync = sum(each.times * each.sync_seconds.likely for each in rounds) / max(1, count)
    regroup = around.wiring.transport.regroup_trips * around.wiring.lighthouse_rtt
    slower = 1 + around.faults.stall_share(sync, cadence, regroup)
    participation = around.faults.participation(work.sites, cadence)
    share = share.map(lambda value: value / slower)
    seconds = (step.map(lambda each: each * work.steps) + stalls).map(lambda value: value * slower / work.steps)
    useful = work.tokens_per_step * participation
    days = seconds.map(lambda value: days_for(work.tokens, useful / value))
    sent = sum(each.times * each.site_bytes for each in rounds) * work.tokens / (useful * work.steps)
    return Prediction(
        rounds=rounds,
        step_seconds=step,
        utilisation=share,
        participation=participation,
        tokens_per_second=Range(useful / seconds.high, useful / seconds.likely, useful / seconds.low),
        days=days,
        sent_bytes=sent,
        money=None if around.prices is None else days.map(lambda value: _money(value, sent, work, around.prices)),
        currency="" if around.prices is None else around.prices.currency,
    )


def days_for(budget: float, per_second: float) -> float:
    """Days until a budget of tokens, sequences … is used up."""
    return budget / per_second / _DAY


def rate_factor_for(target: float, work: Workload, around: Surroundings) -> float | None:
    """By how much the links' rates may differ for a likely utilisation of ``target``; None if no rate suffices."""

    def reached(factor: float) -> bool:
        return predict(work, around.scaled(factor)).utilisation.likely >= target

    rate = min(link.rate for link in around.wiring.links.all())
    low, high = 1.0 / rate, _MOST_RATE / rate
    if not reached(high):
        return None
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def _round(launch: LaunchCost, period: float, around: Surroundings, step: Range) -> RoundPrediction:
    """A kind of round; ``period`` inner steps after the one before, of whichever kind."""
    sync = sync_seconds(launch, around.wiring, period, step.likely)
    return RoundPrediction(
        rules=launch.rules,
        times=launch.times,
        site_bytes=launch.site_bytes,
        delay=launch.delay,
        sync_seconds=sync,
        stall_seconds=Range(
            stall_seconds(sync.low, launch.delay * step.high),
            stall_seconds(sync.likely, launch.delay * step.likely),
            stall_seconds(sync.high, launch.delay * step.low),
        ),
    )


def _money(days: float, sent: float, work: Workload, prices: Prices) -> float:
    return sum(prices.by_site[site].of(24 * days, work.ranks[site], sent) for site in work.sites)


def _scaled(link: Link, factor: float) -> Link:
    return replace(link, rate=link.rate * factor)
