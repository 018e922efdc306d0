"""The rehearsals of ``titan-ext bench goodput``: an arm under the faults of a seed."""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from titan_ext.errors import RunError

if TYPE_CHECKING:
    from titan_ext.lab.faults import Fault
    from titan_ext.lab.rehearsal import Script
    from titan_ext.lab.trace import Outcome

ALL, FREE = "all at once", "nobody waits"
_MODEL = 'flavor = "debugmodel"'
_SMALL_MODEL = """\
flavor = "tiny"
dim = 32
n_layers = 2
n_heads = 1
n_kv_heads = 1
ffn_dim = 85

[optimizer]
lr = 5e-3
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


def arms(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """``[semi_sync]`` of each arm."""
    whole = {"method": "diloco", "sync_every": options.sync_every}
    fragments = {**whole, "num_fragments": options.fragments, "fragment_sync_delay": options.delay}
    free = {**fragments, "method": "decoupled_diloco", "late_work": "keep", "overdue_result": "train_on"}
    return {ALL: whole, "fragments": fragments, FREE: free}


def rehearse(options: argparse.Namespace, run: tuple[int, str]) -> tuple[dict[str, float], float | None]:
    """Figures of a seed's rehearsal of an arm, and with ``--train`` the loss of what the sites share in the end.

    Raises:
        RunError: time was over before the training.
    """
    from titan_ext.bench.goodput_loss import BATCH, LENGTH
    from titan_ext.config.load import load_run
    from titan_ext.lab.build import Request, make_script
    from titan_ext.lab.rehearsal import Rehearsal
    from titan_ext.planner.step_time import tokens_per_step
    from titan_ext.planner.workload import with_settings

    seed, arm = run
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
        file.write_text(_FILE.format(model=_SMALL_MODEL if options.train else _MODEL, **sizes), encoding="utf-8")
        sites = with_settings(load_run(file, [], needs=()).sites, **arms(options)[arm])
        own = {"join_timeout_seconds": options.grace} if arm == FREE else {}
        sites[0].config.replica = replace(sites[0].config.replica, min_sites=quorum(options), **own)
        script = replace(make_script(sites, request), faults=faults)
        tokens = tokens_per_step(sites[0])
        outcome, loss = _train(options, script, tokens) if options.train else (Rehearsal(script).run(), None)
    return figures(outcome, tokens, options.step_seconds, faults), loss


def _train(options: argparse.Namespace, script: "Script", step_tokens: int) -> tuple["Outcome", float]:
    """A rehearsal in which models train, and the loss of what the sites share in the end.

    Raises:
        RunError: time was over before.
    """
    from titan_ext.bench.goodput_loss import FinalLoss, SmallModel, Text
    from titan_ext.experiments.text import text_of_share
    from titan_ext.lab.rehearsal import Rehearsal

    text = Text(sites=options.sites)
    batches = [text_of_share(text, script.seed, site, options.sites) for site in range(options.sites)]
    possible = options.sites * 60 * options.minutes / options.step_seconds * step_tokens
    end = FinalLoss(script.sites[0].config, text, options.trained_share * possible, script.seed)
    outcome = Rehearsal(script, trainee=lambda site: SmallModel(end, batches[site]), observe=end).run()
    if end.loss is None:
        raise RunError(
            f"{end.tokens / possible:.0%} of the tokens that the sites could train on are in committed rounds when the time is "
            f"over: give a lower --trained-share ({options.trained_share:g})"
        )
    return outcome, end.loss


def quorum(options: argparse.Namespace) -> int:
    """Sites that a round needs: most of them."""
    return int(options.sites // 2 + 1)


def draw_faults(options: argparse.Namespace, seed: int) -> list["Fault"]:
    """At exponential times, each of a random site; one that is away or slow is left alone."""
    from titan_ext.lab.faults import Fault

    random, now = Random(f"{seed}/goodput"), 0.0
    back = [0.0] * options.sites
    found = []
    while (now := now + random.expovariate(1 / options.fault_seconds)) < 60 * options.minutes:
        there = [site for site in range(options.sites) if back[site] <= now]
        if len(there) > quorum(options):  # else those that are left could not go on
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
