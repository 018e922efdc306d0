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

With ``--train`` a small model trains at the sites, on parts of a text of their own: in all arms as many tokens in committed
rounds, ``--trained-share`` of those for which there is time, over which the learning rate falls to 0. Arms of one seed
begin with the same parameters and have the same text and the same faults. Then the table has

  loss           of what the sites share in the end, on held-out text; and its mean difference to that of "all at once" with
                 the same seed, as a share, with its 95% interval.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from typing import Any

from titan_ext.bench.flags import Numbers, add_numbers, check_numbers, require_flag
from titan_ext.bench.goodput_runs import ALL, arms, quorum, rehearse

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
    "seeds": (3, 1, "seeds of the faults, and with --train of text and parameters"),
    "trained_share": (0.7, 0.01, "with --train, tokens of the training, as a share of those of sites that never wait"),
}
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # quantiles of Student's t by the number of seeds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sites, the faults and the links."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_numbers(parser, _NUMBERS)
    parser.add_argument("--train", action="store_true", help="train a small model, to compare losses (minutes)")
    parser.add_argument("--workers", type=int, help="rehearsals side by side (default: one for each core)")
    parser.add_argument("--link", default="1gbit,80ms", help="between each two sites (default: 1gbit,80ms)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rehearse every arm with every seed, print the table, and return its figures.

    Raises:
        UserError: an option is out of range.
        RunError: with ``--train``, time was over before the training.
    """
    check_numbers(options, _NUMBERS)
    _check(options)
    results: dict[str, list[dict[str, float]]] = {}
    losses: dict[str, list[Any]] = {}
    for (_, name), (found, loss) in sorted(_rehearsed(options).items()):
        results.setdefault(name, []).append(found)
        losses.setdefault(name, []).append(loss)
    rows: list[dict[str, Any]] = [{"arm": name, **_summary(results[name])} for name in arms(options)]
    if options.train:
        rows = [row | _compare(losses[row["arm"]], losses[ALL]) for row in rows]
    _print(options, rows)
    return {**{key: getattr(options, key) for key in _NUMBERS}, "link": options.link, "rows": rows}


def _check(options: argparse.Namespace) -> None:
    require_flag(options.workers is None or options.workers >= 1, "workers", options.workers, "at least 1")
    require_flag(options.slow_share <= 1, "slow_share", options.slow_share, "at most 1")
    require_flag(options.trained_share < 1, "trained_share", options.trained_share, "below 1")
    count = options.fragments
    require_flag(
        options.sync_every % count == 0, "fragments", count, f"a divisor of --sync-every ({options.sync_every})"
    )
    spacing = options.sync_every // count
    require_flag(options.delay < spacing, "delay", options.delay, f"below --sync-every / --fragments ({spacing})")
    least = spacing * options.step_seconds
    allowed = f"above the inner steps between two rounds ({least:g} s), in the midst of which a late site asks"
    require_flag(options.grace > least, "grace", options.grace, allowed)


def _rehearsed(options: argparse.Namespace) -> dict[tuple[int, str], tuple[dict[str, float], float | None]]:
    """By seed and arm what came of it."""
    from titan_ext.experiments.runs import RunPool

    wanted = argparse.Namespace(**{key: getattr(options, key) for key in (*_NUMBERS, "train", "link")})
    runs = [(seed, name) for seed in range(options.seeds) for name in arms(options)]
    done = {}
    with RunPool(rehearse, (wanted,), min(options.workers or os.cpu_count() or 1, len(runs)), threads=1) as pool:
        for run, (found, loss) in pool.train(runs):
            done[run] = found, loss
            told = "" if loss is None else f", loss {loss:.4f}"
            print(f"seed {run[0]}, {run[1]}: goodput {found['goodput']:.1%}{told}", flush=True)
    return done


def _compare(own: Sequence[float], first: Sequence[float]) -> dict[str, float]:
    """The mean loss, and how far, by seed, it is from that of the first arm."""
    mean, half = _interval([each / other - 1 for each, other in zip(own, first, strict=True)])
    return {"loss": round(statistics.fmean(own), 4), "above": round(mean, 5), "above_half_width": round(half, 5)}


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), _T.get(len(values), 2.0) * spread / len(values) ** 0.5


def _summary(seeds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the seeds; of times and staleness the largest; of goodput the half width of its interval."""
    found = {key: round(statistics.fmean(each[key] for each in seeds), 4) for key in seeds[0]}
    found |= {key: round(max(each[key] for each in seeds), 3) for key in ("stalled", "absent", "most_stale")}
    return {**found, "goodput_half_width": round(_interval([each["goodput"] for each in seeds])[1], 4)}


def _print(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    from titan_ext.launcher.text import columns

    print(
        f"{options.sites} sites of which {quorum(options)} make a quorum, a fault every {options.fault_seconds:g} s, "
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
