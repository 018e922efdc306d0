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
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from titan_ext.bench.flags import Numbers, add_numbers, require_flag
from titan_ext.data.tokenizers.bpe import SMALLEST_VOCABULARY
from titan_ext.experiments import command
from titan_ext.experiments.dept.arms import ARMS, Result, Settings, describe
from titan_ext.experiments.tuning import rounded_rate

if TYPE_CHECKING:
    from titan_ext.experiments.tuning import Run

HELP = "DEPT's variants against training on the mixture: loss, adaptation, memory and bytes"

_EXAMPLES = """\
examples:
  titan-ext bench dept --corpus FOLDER --out runs/dept --plot runs/dept/curves         four arms, three seeds
  titan-ext bench dept --corpus FOLDER --arms std,spec-opt --seeds 1 --learning-rates 4e-3    a first look
  titan-ext bench dept --corpus FOLDER --device cuda --dim 512 --layers 12 --vocab-size 16000 \\
      --joint-vocab-size 48000 --length 512 --batch 32 --steps 5000 --sync-every 500 --continued-steps 1200 \\
      --adapt-steps 1200 --learning-rates 6e-4 --adapt-lr 6e-4                         nearer to the paper's size
"""
# Steps, rounds and continued pre-training are a fifth of those of the paper's 12 blocks.
_SIZES: Numbers = {
    # default, least, help
    "dim": (96, 32, "width of the model, a multiple of 32"),
    "layers": (3, 1, "transformer blocks"),
    "vocab_size": (1024, SMALLEST_VOCABULARY, "tokens of a language's own tokenizer"),
    "joint_vocab_size": (2048, SMALLEST_VOCABULARY, "tokens of the joint tokenizer"),
    "steps": (1000, 1, "inner steps of pre-training, a multiple of --sync-every"),
    "sync_every": (100, 1, "inner steps of a round"),
    "batch": (2, 1, "sequences a site and step"),
    "length": (64, 1, "tokens a sequence"),
    "continued_steps": (240, 1, "steps of continued pre-training"),
    "adapt_steps": (240, 1, "steps of adaptation to the unseen language"),
    "seeds": (3, 1, "runs of each arm at its best learning rate"),
}
_ARMS = "std,glob,trim,spec-opt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Corpus, sizes, arms, tuning, and where results go."""
    command.begin(parser, _EXAMPLES)
    parser.add_argument(
        "--corpus",
        required=True,
        metavar="FOLDER",
        help="with a folder for each language, and in that files train* and valid* (JSONL, text or Parquet)",
    )
    parser.add_argument("--languages", default="en,ru,ja,zh", help="one for each site (default: en,ru,ja,zh)")
    parser.add_argument("--unseen", default="de", help="language to adapt to in the end (default: de)")
    add_numbers(parser, _SIZES)
    parser.add_argument("--keep-inner-state", action="store_true", help="AdamW goes on with its moments after a round")
    parser.add_argument("--arms", default=_ARMS, help=f"comma-separated, of {', '.join(ARMS)} (default: {_ARMS})")
    command.add_learning_rates(parser, "of pre-training, tuned for each arm")
    parser.add_argument("--adapt-lr", type=float, default=4e-3, help="of what follows, for all arms (default: 4e-3)")
    parser.add_argument(
        "--target", type=float, help="normalised loss of the adaptation to count steps to (default: one that all reach)"
    )
    command.add_run_arguments(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing, print the tables, and return their figures.

    Raises:
        UserError: an option is out of range, or the corpus cannot be read.
        RunError: a worker failed.
    """
    settings, grids = _checked(options)
    from titan_ext.experiments.dept.outcome import Outcome, claims, common_target, costs
    from titan_ext.experiments.dept.report import draw, row
    from titan_ext.experiments.report import tuned_outcomes

    done = _train_missing(options, settings, grids)
    found = tuned_outcomes(Outcome, grids, options.seeds, done)
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
    from titan_ext.experiments.claims import print_claims
    from titan_ext.experiments.dept.report import adaptation, by_language, costs_table
    from titan_ext.experiments.report import rates_tried

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
    title = "expected from the paper, and what came out (noise: standard deviation over seeds)"
    print_claims(title, figures["claims"])
    print(f"\n{figures['cpu_seconds']:,.0f} s of CPU time in all")


def _print_table(title: str, lines: Sequence[str]) -> None:
    print(*([title] if title else []), *lines, "", sep="\n")


def _train_missing(
    options: argparse.Namespace, settings: Settings, grids: Mapping[str, Sequence[float]]
) -> "dict[Run, Result]":
    """Every run that the comparison needs; the tokenizers are made anew, always the same."""
    from titan_ext.experiments.dept.text import Texts, make_tokenizers
    from titan_ext.experiments.dept.train import train

    with TemporaryDirectory(prefix="titan-ext-dept-") as folder:
        make_tokenizers(settings, Path(folder))
        return command.train_missing(
            options,
            settings,
            grids,
            train=train,
            arguments=(settings, Texts(settings, Path(folder))),
            result_type=Result,
            describe=describe,
        )


def _checked(options: argparse.Namespace) -> tuple[Settings, dict[str, list[float]]]:
    """The settings, and each arm's learning rates, before anything is trained.

    Raises:
        UserError: an option is out of range, a language is not there, or what a plot needs is missing.
    """
    command.check_sizes(options, _SIZES)
    require_flag(0 < options.adapt_lr < math.inf, "adapt_lr", options.adapt_lr, "a number above 0")
    grid = [rounded_rate(lr) for lr in command.learning_rates(options.learning_rates)]
    arms = command.chosen(options.arms, "arms", list(ARMS))
    _check_languages(options)
    command.check_run_arguments(options)
    settings = command.settings_of(options, Settings)
    return settings, dict.fromkeys(arms, grid)


def _check_languages(options: argparse.Namespace) -> None:
    """They become a tuple; each has its folder."""
    corpus = Path(options.corpus)
    there = sorted(path.name for path in corpus.iterdir() if path.is_dir()) if corpus.is_dir() else []
    require_flag(bool(there), "corpus", options.corpus, "a folder with a folder for each language")
    languages = tuple(dict.fromkeys(options.languages.split(",")))
    require_flag(len(languages) >= 2, "languages", options.languages, "at least two, comma-separated")
    for key, language in [("languages", each) for each in languages] + [("unseen", options.unseen)]:
        require_flag(language in there, key, language, f"of --corpus: {', '.join(there)}")
    require_flag(
        options.unseen not in languages, "unseen", options.unseen, f"none of --languages ({','.join(languages)})"
    )
    options.languages = languages
