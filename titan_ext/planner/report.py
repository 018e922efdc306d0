"""A plan as text for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from titan_ext.config.cost.cost import SiteCost
from titan_ext.launcher.text import bytes_text
from titan_ext.links.link import rate_text
from titan_ext.links.tcp import connection_rate
from titan_ext.planner.advice import Advice, Option, Variants
from titan_ext.planner.calibration import Comparison
from titan_ext.planner.prediction import Prediction, Surroundings, Workload, predict
from titan_ext.planner.range import Range

_STREAMS = (1, 4, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """The answer to the inverse question."""

    target: float
    factor: float | None
    """Times the rate of the links; None: no rate suffices."""
    slowest_rate: float | None
    """Bits a second of the slowest link then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that ``titan-ext plan`` tells."""

    file: str
    work: Workload
    around: Surroundings
    costs: Mapping[str, SiteCost]
    prediction: Prediction
    works: Variants
    advice: Advice | None
    needed: Needed | None
    comparisons: Sequence[Comparison]
    assumptions: Sequence[str]


def render(plan: Plan) -> str:
    """The plan in some lines."""
    blocks = [_head(plan), _memory(plan.costs), _rounds(plan.prediction), _whole(plan)]
    if plan.works:
        blocks += [_bytes_table(plan.works), _sync_table(plan.work, plan.around)]
    if plan.advice is not None:
        blocks.append(_advice(plan.advice))
    if plan.needed is not None:
        blocks.append(_needed(plan.needed))
    if plan.comparisons:
        blocks.append(_comparisons(plan.comparisons))
    blocks.append("\n".join(["assumed", *(f"  {line}" for line in plan.assumptions)]))
    return "\n\n".join(blocks)


def _head(plan: Plan) -> str:
    work = plan.work
    return "\n".join(
        [
            f"{plan.file}: {len(work.sites)} site(s), {work.steps} steps of {work.tokens_per_step:,} tokens",
            f"  links   {plan.around.wiring.links.describe()}",
            *(f"  step    {site}: {_seconds(each)}" for site, each in plan.around.step_seconds.items()),
        ]
    )


def _memory(costs: Mapping[str, SiteCost]) -> str:
    lines = ["memory of a rank, without activations"]
    for site, cost in costs.items():
        host = f", and {bytes_text(cost.host_bytes)} of host memory" if cost.host_bytes else ""
        lines.append(f"  {site:<12}{bytes_text(cost.memory_bytes)}{host}; {cost.parameters:,} parameters at the site")
    return "\n".join(lines)


def _rounds(prediction: Prediction) -> str:
    if not prediction.rounds:
        return "rounds\n  none: the sites exchange nothing"
    names = [_names(each.rules) for each in prediction.rounds]
    width = max(18, *map(len, names)) + 2
    lines = [f"{'rounds':<{width}}times  bytes of a site  {'a sync':<26}of that stall"]
    for name, each in zip(names, prediction.rounds, strict=True):
        overlap = f", behind {each.delay} step(s)" if each.delay else ""
        lines.append(
            f"  {name:<{width - 2}}{each.times:>5}  {bytes_text(each.site_bytes):>15}  {_seconds(each.sync_seconds):<26}"
            f"{_seconds(each.stall_seconds)}{overlap}"
        )
    return "\n".join(lines)


def _names(rules: Sequence[str]) -> str:
    return ", ".join(rules) if len(rules) < 4 else f"{rules[0]} … ({len(rules)} rules)"


def _whole(plan: Plan) -> str:
    found = plan.prediction
    lines = [
        "the run",
        f"  utilisation     {_percent(found.utilisation)}",
        f"  speed           {found.tokens_per_second.likely:,.0f} tokens/s of all sites "
        f"({found.tokens_per_second.low:,.0f} to {found.tokens_per_second.high:,.0f})",
        f"  to {plan.work.tokens:,} tokens   {_days(found.days)}; a site sends {bytes_text(found.sent_bytes)}",
    ]
    if found.participation < 1:
        lines.insert(2, f"  participation   {found.participation:.1%} of the sites' work counts, after faults")
    if found.money is not None:
        unit = f" {found.currency}".rstrip()
        lines.append(
            f"  money           {found.money.likely:,.2f} ({found.money.low:,.2f} to {found.money.high:,.2f}){unit}"
        )
    return "\n".join(lines)


def _bytes_table(works: Variants) -> str:
    codecs = list(dict.fromkeys(codec for _, codec in works))
    lines = ["bytes of a site, on average over the steps, by method and codec", "  " + " " * 14 + _row(codecs)]
    for method in dict.fromkeys(method for method, _ in works):
        cells = []
        for codec in codecs:
            work = works.get((method, codec))
            cells.append("-" if work is None else bytes_text(_bytes_per_step(work)))
        lines.append(f"  {method:<14}{_row(cells)}")
    return "\n".join(lines)


def _sync_table(work: Workload, around: Surroundings) -> str:
    """By who exchanges and over how many connections."""
    lines = ["a sync by pairing and streams, and what the slowest link carries then"]
    ranks = max(work.ranks.values())
    for pairing, connections in {"rank": ranks, "leader": 1}.items() if ranks > 1 else {"rank": 1}.items():
        for streams in sorted({*_STREAMS, around.wiring.transport.streams}):
            wiring = replace(around.wiring, connections=connections, by_leader=pairing == "leader")
            wiring = replace(wiring, transport=replace(wiring.transport, streams=streams))
            longest = max(
                predict(work, replace(around, wiring=wiring)).rounds, key=lambda each: each.sync_seconds.likely
            )
            carried = 8 * connection_rate(wiring.slowest, wiring.transport, connections)
            lines.append(
                f"  {pairing:<8}{streams or 'auto':>4} stream(s)   {_seconds(longest.sync_seconds):<28}{rate_text(carried)}"
            )
    return "\n".join(lines)


def _advice(advice: Advice) -> str:
    lines = ["advice", *_option("take", advice.best), f"  because  {advice.reason}"]
    if advice.runner_up is not None:
        lines += _option("or", advice.runner_up)
    return "\n".join(lines)


def _option(word: str, option: Option) -> list[str]:
    return [
        f"  {word:<8} {option.settings}",
        f"           utilisation {_percent(option.prediction.utilisation)}, {_days(option.prediction.days)}, loss about "
        f"{option.loss_percent:+.1f} % against synchronous training",
    ]


def _needed(needed: Needed) -> str:
    head = f"for a utilisation of {needed.target:.0%}"
    if needed.factor is None:
        return (
            f"{head}\n  no rate of the links suffices: round trips, the connections' windows and waiting cost more; sync less "
            "often (semi_sync.sync_every), behind more steps (semi_sync.fragment_sync_delay), or over more connections "
            "(semi_sync.streams)"
        )
    return (
        f"{head}\n  links of {rate_text(needed.slowest_rate)} (the slowest; {needed.factor:.3g} times what was given)"
    )


def _comparisons(comparisons: Sequence[Comparison]) -> str:
    lines = [f"{'against the ledger':<36}{'predicted':<38}measured"]
    for each in comparisons:
        low, likely, high = (
            f"{value:,.4g}" for value in (each.predicted.low, each.predicted.likely, each.predicted.high)
        )
        bounds = likely if low == high else f"{likely} ({low} to {high})"
        verdict = "within" if each.within else "outside"
        lines.append(
            f"  {each.what:<34}{bounds:<36}  {f'{each.measured:,.4g} {each.unit}':<14}{each.ratio:.3g} times, {verdict}"
        )
    return "\n".join(lines)


def _bytes_per_step(work: Workload) -> float:
    return sum(each.times * each.site_bytes for each in work.launches) / work.steps


def _row(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>12}" for cell in cells)


def _seconds(value: Range) -> str:
    low, likely, high = (
        f"{each:,.0f}" if each >= 100 else f"{each:.3g}" for each in (value.low, value.likely, value.high)
    )
    return f"{likely} s ({low} to {high})"


def _percent(value: Range) -> str:
    return f"{value.likely:.1%} ({value.low:.1%} to {value.high:.1%})"


def _days(value: Range) -> str:
    units = (("days", 1.0), ("hours", 24.0), ("minutes", 1440.0), ("seconds", 86400.0))
    unit, size = next((each for each in units if value.likely * each[1] >= 2), units[-1])
    return f"{value.likely * size:.3g} {unit} ({value.low * size:.3g} to {value.high * size:.3g})"
