"""From a file and the flags of ``titan-ext plan`` to a plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from titan_ext.config.cost.cost import site_cost
from titan_ext.errors import UserError
from titan_ext.links.link import Link, Links, parse_links
from titan_ext.links.tcp import Transport
from titan_ext.planner.advice import DEFAULT_TARGET, advise, variants
from titan_ext.planner.calibration import calibrated, compare
from titan_ext.planner.faults import parse_faults
from titan_ext.planner.ledger import Measured, read_run
from titan_ext.planner.prediction import Surroundings, Workload, predict, rate_factor_for
from titan_ext.planner.prices import load_prices
from titan_ext.planner.range import Range
from titan_ext.planner.report import Needed, Plan
from titan_ext.planner.step_time import ASSUMED_FLOPS, given_step_seconds, parse_flops, step_from_flops
from titan_ext.planner.sync_time import LINK_SHARES, Wiring
from titan_ext.planner.workload import workload
from titan_ext.semi_sync.wire.link import bytes_per_second, number_of_streams


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user wants planned."""

    file: str
    links: Sequence[str] = ()
    """``--link`` flags."""
    steps: Sequence[str] = ()
    """``--step`` flags."""
    flops: str | None = None
    probed_steps: Mapping[str, Range] = field(default_factory=dict)
    """Step times that were measured for the plan, by site."""
    probed_links: Mapping[frozenset[str], Link] = field(default_factory=dict)
    """Links that were."""
    run: str | None = None
    """Folder of a run to learn from."""
    mtbf: Sequence[str] = ()
    recovery: str = "5min"
    prices: str | None = None
    tokens: int | None = None
    target: float | None = None


def make_plan(sites: Sequence[Any], request: Request) -> Plan:
    """The plan of a run.

    Raises:
        UserError: naming the flag, its value and what is allowed.
    """
    names = [site.name for site in sites]
    _check(request, names)
    work = workload(sites, request.tokens)
    faults = parse_faults(request.mtbf, request.recovery, names)
    around = Surroundings(
        wiring=site_wiring(sites, parse_links(request.links, names, request.probed_links)),
        step_seconds=step_times(sites, request.steps, request.flops) | dict(request.probed_steps),
        faults=faults,
        prices=load_prices(request.prices, names) if request.prices is not None else None,
    )
    measured, comparisons = None, []
    if request.run is not None:
        measured = read_run(request.run, names)
        before = predict(work, around)
        comparisons = compare(before, measured)
        around = calibrated(around, measured, work)
    works = variants(sites, request.tokens)
    outer, target = sites[0].config.semi_sync, request.target
    return Plan(
        file=request.file,
        work=work,
        around=around,
        costs={site.name: site_cost(site) for site in sites},
        prediction=predict(work, around),
        works=works,
        advice=advise(outer, works, around, target if target is not None else DEFAULT_TARGET),
        needed=_needed(target, work, around) if target is not None else None,
        comparisons=comparisons,
        assumptions=[*_assumptions(around, measured), *_told_of_steps(request, names), *_not_in_the_model(sites)],
    )


def _check(request: Request, names: Sequence[str]) -> None:
    if len(names) > 1 and not request.links and not request.probed_links:
        raise UserError(
            f"--link: none given; add --link 1gbit,80ms, or one for each pair: --link {names[0]}-{names[1]}=…"
        )
    if request.tokens is not None and request.tokens < 1:
        raise UserError(f"--tokens {request.tokens}: must be at least 1")
    if request.target is not None and not 0 < request.target < 1:
        raise UserError(f"--target-utilisation {request.target:g}: must be between 0 and 1, such as 0.95")


def site_wiring(sites: Sequence[Any], links: Links) -> Wiring:
    """How the sites use the links between them."""
    by_leader = sites[0].config.semi_sync.pairing == "leader"
    connections = 1 if by_leader else min(site.layout.ranks for site in sites)
    return Wiring(links=links, transport=_transport(sites), connections=connections, by_leader=by_leader)


def _transport(sites: Sequence[Any]) -> Transport:
    """How ranks of two sites send messages, by the sites' ``[semi_sync]``."""
    outers = [site.config.semi_sync for site in sites]
    limits = [bytes_per_second(outer.max_rate) for outer in outers if outer.max_rate is not None]
    return Transport(
        streams=max(number_of_streams(outer.streams) for outer in outers),
        peers=max(1, len(sites) - 1),
        max_rate=min(limits, default=0.0),
    )


def step_times(sites: Sequence[Any], steps: Sequence[str], flops: str | None) -> dict[str, Range]:
    """Step times by site: those of ``--step`` flags, else from the operations a second of a rank.

    Raises:
        UserError: a flag cannot be read.
    """
    names = [site.name for site in sites]
    found = given_step_seconds(steps, names)
    rate = parse_flops(flops) if flops is not None else ASSUMED_FLOPS
    # What a user says of a machine is nearer than a guess at the machine.
    bounds = (0.9, 1.15) if flops is not None else (0.5, 2.0)
    return {site.name: found.get(site.name) or Range.around(step_from_flops(site, rate), *bounds) for site in sites}


def _told_of_steps(request: Request, names: Sequence[str]) -> list[str]:
    """What had to be assumed of inner steps."""
    given = {**given_step_seconds(request.steps, names), **request.probed_steps}
    if request.run is not None or all(name in given for name in names):
        return []
    flops = parse_flops(request.flops) if request.flops is not None else ASSUMED_FLOPS
    text = f"every rank does {flops / 1e12:.3g} TFLOP/s, 6 operations for each parameter and token"
    if request.flops is None:
        text += (
            ": 40 % of an H100's peak; say better by --step 350ms, --flops 300tflops, --probe SITE or --from RUN_FOLDER"
        )
    return [text]


def _not_in_the_model(sites: Sequence[Any]) -> list[str]:
    """What of the file is left out of account, and where it can be had instead."""
    outer, lines = sites[0].config.semi_sync, []
    if outer.round_box != "steps":
        lines.append(
            f'semi_sync.round_box = "{outer.round_box}": left out; all sites are taken to take semi_sync.sync_every steps a '
            "round, for which the others wait; titan-ext lab FILE --virtual-time rehearses it"
        )
    if outer.late_work == "keep":
        lines.append(
            'semi_sync.late_work = "keep": left out; rounds are taken to be of all sites and to wait for them; titan-ext lab '
            "FILE --virtual-time rehearses it"
        )
    if any(getattr(site.config.dataloader, "has_sources", False) for site in sites):
        lines.append(
            "data.source: left out; each site is taken to train one source, and a round takes as many times longer, and has as "
            "many times the tokens, as it trains sources in turn; titan-ext lab FILE --virtual-time rehearses it"
        )
    return lines


def _needed(target: float, work: Workload, around: Surroundings) -> Needed | None:
    if around.wiring.sites < 2 or not work.launches:
        return None
    factor = rate_factor_for(target, work, around)
    slowest = min(link.rate for link in around.wiring.links.all())
    return Needed(
        target=target,
        factor=factor,
        slowest_rate=None if factor is None else slowest * factor,
    )


def _streams_of(wiring: Wiring) -> set[str]:
    return {f"{wiring.transport.streams_over(link)} over {1000 * link.rtt:g} ms" for link in wiring.links.all()}


def _assumptions(around: Surroundings, measured: Measured | None) -> list[str]:
    wiring, transport = around.wiring, around.wiring.transport
    lines = []
    if wiring.sites > 1:
        high, _, low = LINK_SHARES
        lines = [
            f"of a link's rate {low:.0%} to {high:.0%} is had, 1448 bytes of payload in each packet of 1514",
            f"a connection has at most {transport.window_bytes / 2**20:g} MiB under way (net.ipv4.tcp_rmem), starts with "
            "ten packets and doubles with each round trip; loss holds it to CUBIC's average window",
            "connections of a pair of ranks: " + ", ".join(sorted(_streams_of(wiring))),
            f"a message between sites takes {transport.message_trips:g} round trip(s), a quorum {transport.quorum_trips:g}, "
            + ("before a round" if wiring.by_leader else "beside a round")
            + "; the lighthouse is at the best connected place",
            f"inner steps vary by {wiring.step_jitter:.1%}, independently; inner steps beside an exchange take no longer",
        ]
    if measured is not None:
        lines = [
            f"calibrated by {measured.folder}: {measured.steps} steps; it is taken to have gone over these links",
            *lines[1:],
        ]
        if wiring.measured is not None:
            lines[0] += f"; a sync took {wiring.measured.likely:.2f} times as long as by the formula"
        if wiring.overhead_seconds:
            lines[0] += f", after {wiring.overhead_seconds:.3g} s of work at the sites"
    if around.faults.between:
        lines.append(f"a site that fails is back after {around.faults.recovery_seconds:g} s, by --recovery")
    return lines
