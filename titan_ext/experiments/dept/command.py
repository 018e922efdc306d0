"""What decoupled embeddings are worth (DEPT): sites of one language each, against training on their mixture.

Sites with a language each pre-train one model by averaging parameters every --sync-every steps: GLOB shares all of it
over a joint tokenizer, TRIM the rows of the embedding that a language's text holds, SPEC and SPEC-OPT the body alone
(SPEC-OPT has a tokenizer for each language). STD trains one model on the mixture, on as many tokens and with the
batches of all sites in each step. Then every arm's body gets the same continued pre-training from a random embedding
for the joint tokenizer, and, anew from the same body, the same adaptation to a language that no site has.

  normalised    validation loss less that of the unigram model of the training text, in nats a token: of different
                vocabularies these can be compared; below 0 is better than token frequencies
  perplexity    of a token of the joint tokenizer, after the continued pre-training
  steps to      steps of the adaptation to --target; by default to the highest last loss, which all runs reach
  sent          bytes that a site sends in the steps of a round; STD's are those of a ring all-reduce of its gradients

Embedding and head are one table. The learning rate of pre-training is tuned for each arm on one seed, by the loss
after the continued pre-training; where the best lies at the edge, the grid is widened. The best is then run on all
seeds. Runs go side by side, one for each core (on a GPU one after another). With --out each run is kept when it ends,
and the same command goes on where it was.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from titan_ext.experiments.dept import options as command_line
from titan_ext.experiments.flags import workers_and_threads

if TYPE_CHECKING:
    from titan_ext.experiments.convergence.settings import Run
    from titan_ext.experiments.dept.settings import Result, Settings

HELP = "DEPT's variants against training on the mixture: loss, adaptation, memory and bytes"

add_arguments = command_line.add_arguments


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the tables, and return their figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    settings, grids = command_line.checked(options)
    from titan_ext.experiments.dept.claims import claims
    from titan_ext.experiments.dept.costs import costs
    from titan_ext.experiments.dept.outcome import common_target, outcomes
    from titan_ext.experiments.dept.plot import draw
    from titan_ext.experiments.dept.report import row

    done = _trained(options, settings, grids)
    found = outcomes(grids, options.seeds, done)
    target = options.target if options.target is not None else common_target(found.values())
    spent = {arm: costs(outcome, settings) for arm, outcome in found.items()}
    figures = {
        **asdict(settings),
        "body": next(iter(done.values())).body,
        "seeds": options.seeds,
        "target": target,
        "rows": [row(found[arm], spent[arm], settings.languages, target) for arm in found],
        "claims": claims(found, spent, target),
        "cpu_seconds": round(sum(result.cpu_seconds for result in done.values()), 1),
    }
    _print(figures)
    if options.plot is not None:
        print("drawn:", *draw(figures["rows"], settings.unseen, options.plot))
    return figures


def _print(figures: Mapping[str, Any]) -> None:
    from titan_ext.experiments.convergence.report import rates_tried
    from titan_ext.experiments.dept.report import adaptation, by_language, costs_table

    rows, sites = figures["rows"], len(figures["languages"])
    print(
        f"{figures['body']:,} parameters of body, {sites} sites ({', '.join(figures['languages'])}), "
        f"{sites * figures['batch'] * figures['length']:,} tokens a step, {figures['steps']} steps, synced every "
        f"{figures['sync_every']}, then {figures['continued_steps']} of continued pre-training or "
        f"{figures['adapt_steps']} of adaptation, {figures['seeds']} seed(s)\n"
    )
    _print_table("at the end of pre-training, each site with its own embedding", by_language(rows, "pretrained", ".4f"))
    _print_table("after the same continued pre-training", by_language(rows, "normalised", ".4f"))
    _print_table("", by_language(rows, "perplexity", ".2f"))
    _print_table("the same adaptation to an unseen language", adaptation(rows, figures["unseen"], figures["target"]))
    _print_table("memory and bytes", costs_table(rows))
    _print_table("normalised loss by learning rate, on the first seed", rates_tried(rows))
    print("expected from the paper, and what came out (noise: standard deviation over seeds)")
    for each in figures["claims"]:
        print(f"{'holds' if each['holds'] else 'does NOT hold'}: {each['claim']}\n    {each['figures']}")
    print(f"\n{figures['cpu_seconds']:,.0f} s of CPU time in all")


def _print_table(title: str, lines: Sequence[str]) -> None:
    print(*([title] if title else []), *lines, "", sep="\n")


def _trained(
    options: argparse.Namespace, settings: "Settings", grids: Mapping[str, Sequence[float]]
) -> "Mapping[Run, Result]":
    """Every run that the comparison needs, from the store or trained now."""
    from titan_ext.experiments.comparison import compare
    from titan_ext.experiments.dept.arms import describe
    from titan_ext.experiments.dept.settings import Result
    from titan_ext.experiments.dept.tokenizers import make_tokenizers
    from titan_ext.experiments.dept.train import Trainee
    from titan_ext.experiments.store import Store
    from titan_ext.experiments.team import Team

    store = Store(options.out, settings, Result, describe)
    workers, threads = workers_and_threads(options.workers, settings.device)
    with TemporaryDirectory(prefix="titan-ext-dept-") as folder:
        make_tokenizers(settings, Path(folder))
        with Team(Trainee, (settings, Path(folder), threads), workers) as team:
            return compare(grids, options.seeds, store, team)
