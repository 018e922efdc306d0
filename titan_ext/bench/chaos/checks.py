"""What must hold after a run under faults, each with its figure."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean, linear_regression, stdev
from typing import Any

from titan_ext.bench.chaos.history import Sample, SiteHistory
from titan_ext.bench.chaos.run_config import MIN_SITES, RunConfig
from titan_ext.bench.chaos.runner import Outcome
from titan_ext.launcher.results import compare_shared_state

LEAST_PARTICIPATION = 0.9
MOST_MEMORY = (256 * 2**10, 16 * 2**20)
"""Bytes a round, and what may come together whatever the rounds: allocators fill for long, and a little more with
each change of members. An fp32 copy of the parameters has seven times as many as the first."""
MOST_DESCRIPTORS = (0.05, 4)
"""The same of descriptors."""

_WARM_UP_ROUNDS = 5  # caches and allocators fill
_FEWEST_ROUNDS = 10  # of a stretch that tells a slope from noise
_STANDARD_ERRORS = 3.0


@dataclass(frozen=True, slots=True)
class Check:
    """One of them."""

    name: str
    passed: bool
    figure: str


def commits(outcome: Outcome) -> dict[tuple, dict[str, dict[str, Any]]]:
    """Run, generation and round -> name of the site -> its line, in order of time."""
    found: dict[tuple, dict[str, dict[str, Any]]] = defaultdict(dict)
    for name, site in outcome.sites.items():
        for line in site.commits:
            found[line["run"], line["generation"], line["round"]][name] = line
    return dict(sorted(found.items(), key=lambda item: min(line["time"] for line in item[1].values())))


def contributed_tokens(outcome: Outcome) -> int:
    """Tokens behind all that was averaged."""
    return sum(next(iter(lines.values()))["tokens"] for lines in commits(outcome).values())


def finished(outcome: Outcome) -> Check:
    """Every site came to the last step by itself."""
    times = [min(line["time"] for line in lines.values()) for lines in commits(outcome).values()]
    longest = max((after - before for before, after in zip(times, times[1:])), default=0.0)
    deaths = sum(len(site.deaths) for site in outcome.sites.values())
    return Check(
        "no site hung",
        outcome.code == 0,
        f"exit code {outcome.code} after {outcome.seconds:.0f} s, {len(times)} commits, at most {longest:.1f} s "
        f"between two, {deaths} end(s) of a site that no fault of its own explains",
    )


def equal(outcome: Outcome) -> Check:
    """All that wrote a commit hold the same state after it, and after the run."""
    lines = commits(outcome)
    digests = [{line["digest"] for line in each.values()} for each in lines.values()]
    different = sum(len(each) > 1 for each in digests)
    sound, sentence = compare_shared_state(
        {name: site.summary.read() for name, site in outcome.sites.items()}, complete=True
    )
    return Check(
        "equal state",
        bool(lines) and not different and None not in set().union(*digests) and sound,
        f"{different} of {len(lines)} commits differ between sites ({sum(map(len, lines.values()))} lines); "
        f"at the end {sentence}",
    )


def in_company(outcome: Outcome) -> Check:
    """No site commits alone where the configuration wants more.

    One that has just come has no work of its own to give: then a commit of two sites is of one site's work.
    """
    lines = [next(iter(each.values())) for each in commits(outcome).values()]
    sites, contributors = ([len(line[key]) for line in lines] for key in ("sites", "contributors"))
    return Check(
        "no solo commit",
        bool(lines) and min(sites) >= MIN_SITES,
        f"{min(sites, default=0)} to {max(sites, default=0)} sites a commit, {min(contributors, default=0)} to "
        f"{max(contributors, default=0)} contributors",
    )


def participation(outcome: Outcome) -> Check:
    """Sites that no fault kept from training are in the mean."""
    live = counted = 0
    for lines in commits(outcome).values():
        moment = min(line["time"] for line in lines.values())
        present = {name for name, site in outcome.sites.items() if site.was_live(moment)}
        live += len(present)
        counted += len(present & set(next(iter(lines.values()))["contributors"]))
    share = counted / live if live else 0.0
    return Check("participation", share > LEAST_PARTICIPATION, f"{share:.1%} of {live} live sites' rounds")


def loss(outcome: Outcome, calm: Outcome, config: RunConfig) -> Check:
    """The last rounds are no worse than those of the undisturbed run of as many contributed tokens."""
    ours, theirs = _last_losses(outcome, config), _last_losses(calm, config)
    if min(len(ours), len(theirs)) < 2:
        return Check("loss", False, "too few rounds to compare")
    difference = fmean(ours) - fmean(theirs)
    noise = _STANDARD_ERRORS * (stdev(ours) ** 2 / len(ours) + stdev(theirs) ** 2 / len(theirs)) ** 0.5
    tokens = [contributed_tokens(each) for each in (outcome, calm)]
    return Check(
        "loss",
        difference <= noise,
        f"{fmean(ours):.4f} after {tokens[0]:,} contributed tokens, undisturbed {fmean(theirs):.4f} after "
        f"{tokens[1]:,}: {difference:+.4f}, noise {noise:.4f} ({_STANDARD_ERRORS:g} standard errors)",
    )


def _last_losses(outcome: Outcome, config: RunConfig) -> list[float]:
    """The mean loss of each site in each of the last rounds."""
    last = max((step["step"] for site in outcome.sites.values() for step in site.steps), default=0)
    rounds = last // config.sync_every
    first = (rounds - max(5, rounds // 10)) * config.sync_every
    groups: dict[tuple[str, int], list[float]] = defaultdict(list)
    for name, site in outcome.sites.items():
        for step in site.steps:
            if step["step"] > first:
                groups[name, (step["step"] - 1) // config.sync_every].append(step["loss"])
    return [fmean(losses) for losses in groups.values()]


def orphans(outcome: Outcome) -> Check:
    """Every process went with its site."""
    return Check(
        "no orphan process",
        not outcome.left and outcome.most_ranks <= 1,
        f"{len(outcome.left)} left at the end, at most {outcome.most_ranks} training process(es) of one site at a time",
    )


def memory(outcome: Outcome, calm: Outcome | None) -> Check:
    """Resident memory does not grow from round to round."""
    return _slope_check("memory", outcome, calm, MOST_MEMORY, lambda slope: f"{slope / 2**10:+.2f} KiB")


def descriptors(outcome: Outcome, calm: Outcome | None) -> Check:
    """Open files and sockets do not become more from round to round."""
    return _slope_check("descriptors", outcome, calm, MOST_DESCRIPTORS, lambda slope: f"{slope:+.3f}")


def _slope_check(
    name: str, outcome: Outcome, calm: Outcome | None, most: tuple[float, float], text: Callable[[float], str]
) -> Check:
    found = _slopes(outcome, name)
    if not found:
        return Check(name, False, f"no process lived through {_FEWEST_ROUNDS} rounds without a fault of its own")
    per_round, together = most
    before = [slope for _, slope in _slopes(calm, name)] if calm is not None else []
    rounds, slopes = zip(*found)
    undisturbed = f", undisturbed {text(max(before))}" if before else ""
    return Check(
        name,
        all(slope * span <= max(per_round * span, together) for span, slope in found),
        f"{text(max(slopes))} a round at most, {text(fmean(slopes))} on average over {len(found)} processes' stretches "
        f"of {min(rounds)} to {max(rounds)} rounds{undisturbed}",
    )


def _slopes(outcome: Outcome, field: str) -> list[tuple[int, float]]:
    """Rounds of each stretch, and the slope over it."""
    found = []
    for stretch in stretches(outcome):
        rounds = [each.round for each in stretch]
        values = [getattr(each, field) for each in stretch]
        found.append((rounds[-1] - rounds[0], linear_regression(rounds, values).slope))
    return found


def stretches(outcome: Outcome) -> list[list[Sample]]:
    """For each process the longest stretch of rounds without a fault of its own, its first rounds left out."""
    found = []
    for site in outcome.sites.values():
        for pid in dict.fromkeys(sample.pid for sample in site.samples):
            warm = [sample for sample in site.samples if sample.pid == pid][_WARM_UP_ROUNDS:]
            longest = max(_between_faults(site, warm), key=len, default=[])
            if len({sample.round for sample in longest}) >= _FEWEST_ROUNDS:
                found.append(longest)
    return found


def _between_faults(site: SiteHistory, samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    stretches: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        if site.was_live(sample.time):
            stretches[sum(each.since <= sample.time for each in site.interruptions)].append(sample)
    yield from stretches.values()
