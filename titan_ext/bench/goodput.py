"""How much of what sites can do reaches the model while they die and falter, by the outer loop.

Sites of one process train in virtual time (``titan_ext.lab``) with real outer loops, a simulated network and torchft's rules
of membership. At random times a site is killed and starts again later, or takes ``--slowdown`` times as long for its inner
steps for a while; every arm has the same faults. The arms are

  all at once    DiLoCo: all of the model every ``--sync-every`` inner steps, and all wait for all;
  fragments      Streaming DiLoCo: one fragment at a time, beside inner steps, which wait where its result is overdue;
  nobody waits   Decoupled DiLoCo's loop: the same fragments, ``late_work = "keep"``, ``overdue_result = "train_on"``, and
                 the grace of ``--grace`` seconds for a site that is alive and late.

The table has, for each, as the mean over seeds with a 95% interval of Student's t,

  goodput        inner steps that are in committed rounds, as a share of those that the sites could take, as slow as they
                 were, while they were there: what the killed ones had not brought yet is lost in all arms;
  training       share of that time in which they took inner steps;
  stalled        the longest time for which inner steps of a site stood still, in a round or waiting for one;
  absent         the longest time for which all sites of a committed round were there and waited for others, beside inner
                 steps or not, until they had agreed without those;
  failed         rounds that were not committed, as a share of those that one site saw;
  stale          contributions of sites that rounds before had not waited for, and the largest number of commits missed.

With ``--train`` a small model trains at the sites, on parts of a text of their own, and the table has

  loss           of what they share, on held-out text, after as many tokens of committed rounds as the arm with fewest
                 has; and its mean difference to that of "all at once", as a share, with its 95% interval.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from titan_ext.bench.flags import Numbers, add_numbers, check_numbers, require_flag

if TYPE_CHECKING:
    from titan_ext.lab.faults import Fault
    from titan_ext.lab.rehearsal import Script
    from titan_ext.lab.trace import Outcome

Losses = Sequence[tuple[int, float]]
"""Loss after so many tokens of committed rounds."""

ALL, FREE = "all at once", "nobody waits"
HELP = "work of the surviving sites that reaches the model under faults: synchronous and asynchronous outer loops"

_NUMBERS: Numbers = {
    "sites": (8, 3, "sites"),
    "minutes": (20.0, 1.0, "minutes of virtual time"),
    "fault_seconds": (60.0, 1.0, "seconds from one fault to the next, on average"),
    "restart_seconds": (30.0, 1.0, "seconds until a killed site starts again, or a slow one is as fast as before"),
    "slow_share": (0.5, 0.0, "share of the faults that slow a site down instead of killing it"),
    "slowdown": (3.0, 1.0, "times that a step of a slowed site takes longer"),
    "step_seconds": (1.0, 0.01, "seconds of an inner step"),
    "sync_every": (24, 4, "inner steps between two syncs of the same parameters"),
    "fragments": (4, 1, "fragments of the model; a divisor of --sync-every"),
    "delay": (2, 1, "inner steps that overlap an exchange, in the arms with fragments"),
    "grace": (9.0, 0.1, "seconds that a round of the last arm waits for a site that is alive"),
    "seeds": (3, 1, "seeds of the faults"),
}
_MODEL = 'flavor = "debugmodel"'
_SMALL_MODEL = """\
flavor = "tiny"
dim = 32
n_layers = 4
n_heads = 1
n_kv_heads = 1
ffn_dim = 85

[optimizer]
lr = 3e-3
"""
_FILE = """
[model]
name = "llama3"
{model}

[training]
seq_len = {length}
steps = 1000000
local_batch_size = {batch}

[semi_sync]
method = "diloco"

[[site]]
name = "site0"
data = "builtin:code"
"""
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # quantiles of Student's t by the number of seeds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sites, the faults and the links."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_numbers(parser, _NUMBERS)
    parser.add_argument("--train", action="store_true", help="train a small model, to compare losses (minutes)")
    parser.add_argument("--link", default="1gbit,80ms", help="between each two sites (default: 1gbit,80ms)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rehearse every arm with every seed, print the table, and return its figures.

    Raises:
        UserError: an option is out of range.
    """
    check_numbers(options, _NUMBERS)
    _check(options)
    results: dict[str, list[dict[str, float]]] = {}
    losses: dict[str, list[Losses]] = {}
    for seed in range(options.seeds):
        for name, found, curve in _rehearsals(options, seed):
            results.setdefault(name, []).append(found)
            losses.setdefault(name, []).append(curve)
            print(f"seed {seed}, {name}: goodput {found['goodput']:.1%}", flush=True)
    rows: list[dict[str, Any]] = [{"arm": name, **_summary(each)} for name, each in results.items()]
    if options.train:
        rows = [row | compared for row, compared in zip(rows, _compare(losses), strict=True)]
    _print(options, rows)
    return {**{key: getattr(options, key) for key in _NUMBERS}, "link": options.link, "rows": rows}


def _check(options: argparse.Namespace) -> None:
    require_flag(options.slow_share <= 1, "slow_share", options.slow_share, "at most 1")
    count = options.fragments
    require_flag(
        options.sync_every % count == 0, "fragments", count, f"a divisor of --sync-every ({options.sync_every})"
    )
    spacing = options.sync_every // count
    require_flag(options.delay < spacing, "delay", options.delay, f"below --sync-every / --fragments ({spacing})")
    least = spacing * options.step_seconds
    allowed = f"above the inner steps between two rounds ({least:g} s), in the midst of which a late site asks"
    require_flag(options.grace > least, "grace", options.grace, allowed)


def arms(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """``[semi_sync]`` of each arm."""
    whole = {"method": "diloco", "sync_every": options.sync_every}
    fragments = {**whole, "num_fragments": options.fragments, "fragment_sync_delay": options.delay}
    free = {**fragments, "method": "decoupled_diloco", "late_work": "keep", "overdue_result": "train_on"}
    return {ALL: whole, "fragments": fragments, FREE: free}


def _rehearsals(options: argparse.Namespace, seed: int) -> Iterator[tuple[str, dict[str, float], Losses]]:
    from titan_ext.bench.goodput_loss import BATCH, LENGTH
    from titan_ext.config.load import load_run
    from titan_ext.lab.build import Request, make_script
    from titan_ext.lab.rehearsal import Rehearsal
    from titan_ext.planner.step_time import tokens_per_step
    from titan_ext.planner.workload import with_settings

    faults = draw_faults(options, seed)
    request = Request(
        sites=options.sites,
        links=[options.link],
        steps=[f"{options.step_seconds}s"],
        until=f"{options.minutes}min",
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.toml")
        sizes = {"length": LENGTH, "batch": BATCH} if options.train else {"length": 64, "batch": 2}
        model = _SMALL_MODEL if options.train else _MODEL
        file.write_text(_FILE.format(model=model, **sizes), encoding="utf-8")
        for name, settings in arms(options).items():
            sites = with_settings(load_run(file, [], needs=()).sites, **settings)
            own = {"join_timeout_seconds": options.grace} if name == FREE else {}
            sites[0].config.replica = replace(sites[0].config.replica, min_sites=_quorum(options), **own)
            script = replace(make_script(sites, request), faults=faults)
            tokens = tokens_per_step(sites[0])
            outcome, losses = _train(options, script, tokens) if options.train else (Rehearsal(script).run(), ())
            yield name, figures(outcome, tokens, options.step_seconds, faults), losses


def _train(options: argparse.Namespace, script: "Script", step_tokens: int) -> tuple["Outcome", Losses]:
    """A rehearsal in which models train, and the losses of what the sites share by tokens."""
    from titan_ext.bench.goodput_loss import LossByTokens, SmallModel, Text
    from titan_ext.experiments.text import text_of_share
    from titan_ext.lab.rehearsal import Rehearsal

    text = Text(sites=options.sites)
    batches = [text_of_share(text, script.seed, site, options.sites) for site in range(options.sites)]
    config = script.sites[0].config
    steps = options.sites * 60 * options.minutes / options.step_seconds
    observed = LossByTokens(config, text, steps * step_tokens)
    rehearsal = Rehearsal(script, trainee=lambda site: SmallModel(config, batches[site]), observe=observed)
    return rehearsal.run(), observed.losses


def _compare(losses: dict[str, list[Losses]]) -> list[dict[str, float]]:
    """By arm the mean loss after as many tokens as all arms of a seed have had, and how far it is from that of the first."""
    from titan_ext.bench.goodput_loss import loss_after

    fewest = [min(curve[-1][0] for curve in of_seed) for of_seed in zip(*losses.values(), strict=True)]
    at = {
        name: [loss_after(curve, tokens) for curve, tokens in zip(curves, fewest, strict=True)]
        for name, curves in losses.items()
    }
    found = []
    for each in at.values():
        above = [own / theirs - 1 for own, theirs in zip(each, at[ALL], strict=True)]
        mean, half = _interval(above)
        found.append(
            {
                "loss": round(statistics.fmean(each), 4),
                "above": round(mean, 5),
                "above_half_width": round(half, 5),
                "tokens": statistics.fmean(fewest),
            }
        )
    return found


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), _T.get(len(values), 2.0) * spread / len(values) ** 0.5


def _quorum(options: argparse.Namespace) -> int:
    return int(options.sites // 2 + 1)


def draw_faults(options: argparse.Namespace, seed: int) -> list["Fault"]:
    """At exponential times, each of a random site; one that is away or slow is left alone."""
    from titan_ext.lab.faults import Fault

    random, now = Random(f"{seed}/goodput"), 0.0
    back = [0.0] * options.sites
    found = []
    while (now := now + random.expovariate(1 / options.fault_seconds)) < 60 * options.minutes:
        there = [site for site in range(options.sites) if back[site] <= now]
        if len(there) > _quorum(options):  # else those that are left could not go on
            site = random.choice(there)
            seconds = options.restart_seconds
            back[site] = now + seconds
            slow = random.random() < options.slow_share
            kind, factor = ("slow", options.slowdown) if slow else ("kill", 1.0)
            found.append(Fault(kind=kind, at=now, sites=(site,), seconds=seconds, factor=factor))
    return found


def figures(outcome: "Outcome", step_tokens: int, step_seconds: float, faults: Sequence["Fault"]) -> dict[str, float]:
    """What the table has, of one rehearsal.

    Args:
        outcome: of it.
        step_tokens: tokens of a site's inner step.
        step_seconds: what it takes.
        faults: what happened; a slow site is not killed meanwhile.
    """
    lost = sum(
        (1 - 1 / fault.factor) * max(0.0, min(fault.seconds, outcome.seconds - fault.at))
        for fault in faults
        if fault.kind == "slow"
    )
    rounds = {record.round: record for site in outcome.sites for _, record in site.rounds if record.committed}
    records = [record for site in outcome.sites for _, record in site.rounds]
    there = sum(site.ended - site.started - site.away_seconds for site in outcome.sites)
    waited: dict[int, float] = {}
    for record in records:
        if record.committed:
            waited[record.round] = min(record.seconds_quorum, waited.get(record.round, record.seconds_quorum))
    witness = [record for _, record in max((site.rounds for site in outcome.sites), key=len)]
    stale = [missed for record in rounds.values() for missed in record.staleness.values()]
    return {
        "goodput": sum(record.tokens for record in rounds.values()) / step_tokens / ((there - lost) / step_seconds),
        "training": sum(site.training_seconds for site in outcome.sites) / there,
        "stalled": max(record.seconds_stalled or 0.0 for record in records),
        "absent": max(waited.values()),
        "failed": sum(not record.committed for record in witness) / len(witness),
        "rounds": float(len(rounds)),
        "stale": float(len(stale)),
        "most_stale": float(max(stale, default=0)),
    }


def _summary(seeds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the seeds; of times and staleness the largest; of goodput the half width of its interval."""
    found = {key: round(statistics.fmean(each[key] for each in seeds), 4) for key in seeds[0]}
    found |= {key: round(max(each[key] for each in seeds), 3) for key in ("stalled", "absent", "most_stale")}
    return {**found, "goodput_half_width": round(_interval([each["goodput"] for each in seeds])[1], 4)}


def _print(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    from titan_ext.launcher.text import columns

    print(
        f"{options.sites} sites of which {_quorum(options)} make a quorum, a fault every {options.fault_seconds:g} s, "
        f"{options.minutes:g} minutes of virtual time, {options.seeds} seed(s)"
    )
    titles = ["rounds", "goodput", "training", "stalled", "absent", "failed", "rounds a run", "stale", "most stale"]
    body = [
        [
            row["arm"],
            f"{row['goodput']:.1%} ± {row['goodput_half_width']:.1%}",
            f"{row['training']:.1%}",
            f"{row['stalled']:.1f} s",
            f"{row['absent']:.1f} s",
            f"{row['failed']:.1%}",
            f"{row['rounds']:.0f}",
            f"{row['stale']:.0f}",
            f"{row['most_stale']:.0f}",
        ]
        for row in rows
    ]
    if options.train:
        titles += ["loss", f"to {ALL}"]
        for line, row in zip(body, rows, strict=True):
            line += [f"{row['loss']:.4f}", f"{row['above']:+.2%} ± {row['above_half_width']:.2%}"]
    print(*columns([titles, *body]), sep="\n")
