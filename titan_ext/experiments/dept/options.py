"""The options of ``titan-ext bench dept``, and their checks."""

import argparse
import math
from dataclasses import fields
from pathlib import Path

from titan_ext.data.tokenizers.bpe import SMALLEST_VOCABULARY
from titan_ext.experiments.convergence.plot import check_plot
from titan_ext.experiments.dept.arms import ARMS
from titan_ext.experiments.dept.settings import Settings
from titan_ext.experiments.flags import check_device, learning_rates, require
from titan_ext.experiments.tuning import rounded_rate

_EXAMPLES = """\
examples:
  titan-ext bench dept --corpus FOLDER --out runs/dept --plot runs/dept/curves         four arms, three seeds
  titan-ext bench dept --corpus FOLDER --arms std,spec-opt --seeds 1 --learning-rates 4e-3    a first look
  titan-ext bench dept --corpus FOLDER --device cuda --dim 512 --layers 12 --vocab-size 16000 \\
      --joint-vocab-size 48000 --length 512 --batch 32 --steps 5000 --sync-every 500 --continued-steps 1200 \\
      --adapt-steps 1200 --learning-rates 6e-4 --adapt-lr 6e-4                         nearer to the paper's size
"""
# Steps, rounds and continued pre-training are a fifth of those of the paper's 12 blocks.
_SIZES: dict[str, tuple[int, int, str]] = {
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
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--corpus",
        required=True,
        metavar="FOLDER",
        help="with a folder for each language, and in that files train* and valid* (JSONL, text or Parquet)",
    )
    parser.add_argument("--languages", default="en,ru,ja,zh", help="one for each site (default: en,ru,ja,zh)")
    parser.add_argument("--unseen", default="de", help="language to adapt to in the end (default: de)")
    for key, (default, _, text) in _SIZES.items():
        flag = f"--{key.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument(
        "--keep-inner-state", action="store_true", help="AdamW goes on with its moments after a round"
    )
    parser.add_argument("--arms", default=_ARMS, help=f"comma-separated, of {', '.join(ARMS)} (default: {_ARMS})")
    parser.add_argument(
        "--learning-rates",
        default="2e-3,4e-3,8e-3",
        help="of pre-training, tuned for each arm (default: 2e-3,4e-3,8e-3)",
    )
    parser.add_argument("--adapt-lr", type=float, default=4e-3, help="of what follows, for all arms (default: 4e-3)")
    parser.add_argument(
        "--target", type=float, help="normalised loss of the adaptation to count steps to (default: one that all reach)"
    )
    parser.add_argument("--device", default="cpu", help='"cpu", or the accelerator, such as "cuda" (default: cpu)')
    parser.add_argument("--workers", type=int, help="runs side by side (default: one for each core; 1 off the CPU)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep finished runs there, and use those that are")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw curves: PATH.png, PATH.svg (needs matplotlib)")


def checked(options: argparse.Namespace) -> tuple[Settings, dict[str, list[float]]]:
    """The settings, and each arm's learning rates, before anything is trained.

    Raises:
        UserError: an option is out of range, a language is not there, or what a plot needs is missing.
    """
    for key, (_, least, _) in _SIZES.items():
        require(getattr(options, key) >= least, key, getattr(options, key), f"at least {least}")
    every = options.sync_every
    require(options.dim % 32 == 0, "dim", options.dim, "a multiple of 32")
    require(options.steps % every == 0, "steps", options.steps, f"a multiple of --sync-every ({every})")
    require(0 < options.adapt_lr < math.inf, "adapt_lr", options.adapt_lr, "a number above 0")
    require(options.workers is None or options.workers >= 1, "workers", options.workers, "at least 1")
    require(options.target is None or math.isfinite(options.target), "target", options.target, "a number")
    grid = [rounded_rate(lr) for lr in learning_rates(options.learning_rates)]
    arms = list(dict.fromkeys(options.arms.split(",")))
    for arm in arms:
        require(arm in ARMS, "arms", arm, f"of {', '.join(ARMS)}")
    _check_languages(options)
    if options.plot is not None:
        check_plot(options.plot)
    check_device(options.device)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    return settings, dict.fromkeys(arms, grid)


def _check_languages(options: argparse.Namespace) -> None:
    """They become a tuple; each has its folder."""
    corpus = Path(options.corpus)
    there = sorted(path.name for path in corpus.iterdir() if path.is_dir()) if corpus.is_dir() else []
    require(bool(there), "corpus", options.corpus, "a folder with a folder for each language")
    languages = tuple(dict.fromkeys(options.languages.split(",")))
    require(len(languages) >= 2, "languages", options.languages, "at least two, comma-separated")
    for key, language in [("languages", each) for each in languages] + [("unseen", options.unseen)]:
        require(language in there, key, language, f"of --corpus: {', '.join(there)}")
    require(options.unseen not in languages, "unseen", options.unseen, f"none of --languages ({','.join(languages)})")
    options.languages = languages
