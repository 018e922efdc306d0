"""``titan-ext dept``: what comes after pre-training with decoupled embeddings."""

import argparse
from pathlib import Path
from typing import Any

from titan_ext.commands.export import add_source_arguments

_DESCRIPTION = """\
After sites have trained one body with vocabularies of their own (DEPT, arXiv 2410.05021).
Settings can be overridden as in training.
"""

_EMBED = """\
Write the whole model with one embedding for a global tokenizer: a Hugging Face folder, from which continued
pre-training starts (train_configs/dept_continued.toml). The embedding is random, as the paper's; or the mean of the
rows of the sites that hold the same token, random for tokens that no site holds.
"""

_EVALUATE = """\
Measure each site's model on text that its training left out: loss, perplexity, the loss of a unigram model of the
same tokens (UNIGRAM-CE) and the difference of the two, which different vocabularies can be compared by.
--plasticity then gives the body a random embedding for another tokenizer, trains all of it on another corpus, and
measures it over the steps on documents that are held out. The last line is one JSON object.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``dept`` with its two actions; flags of settings are what the parser leaves over."""
    parser = subparsers.add_parser(
        "dept",
        help="after sites trained a body with embeddings of their own",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_embed(actions)
    _add_evaluate(actions)


def run(options: argparse.Namespace) -> int:
    """Do what the action says; returns the exit code.

    Raises:
        UserError: an argument, a checkpoint or the text cannot be used.
        RunError: a checkpoint cannot be read, or a folder not written.
    """
    if options.action == "embed":
        from titan_ext.dept.embed import embed

        return embed(options)
    from titan_ext.dept.report import evaluate

    return evaluate(options)


def _add_embed(actions: Any) -> None:
    parser = _action(actions, "embed", "one embedding for a global tokenizer", _EMBED)
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help='the global one; or "byte"')
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--embedding", choices=["random", "sites"], default="random", help="where its rows come from (default random)"
    )
    parser.add_argument("--body-site", metavar="NAME", help="whose checkpoint has the body (default: the first's)")
    parser.add_argument("--seed", type=int, default=0, help="of random rows (default %(default)s)")


def _add_evaluate(actions: Any) -> None:
    parser = _action(actions, "eval", "losses per site and in total; plasticity", _EVALUATE)
    parser.add_argument("--site", metavar="NAME", help="only this one (default: all)")
    parser.add_argument("--corpus", help='text to evaluate on, as in data = "…" (default: what training leaves out)')
    parser.add_argument(
        "--tokens", type=int, default=2**18, help="of each site to predict (default %(default)s); 0: only plasticity"
    )
    parser.add_argument("--plasticity", metavar="CORPUS", help="text to adapt the body to")
    parser.add_argument("--tokenizer", metavar="FOLDER", help='of the adapted model; or "byte"')
    parser.add_argument("--steps", type=int, default=1200, help="of the adaptation (default %(default)s)")
    parser.add_argument("--lr", type=float, default=6e-4, help="its peak learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of embedding and order of text (default %(default)s)")
    parser.add_argument(
        "--plasticity-tokens", type=int, default=2**16, metavar="N", help="to measure it on (default %(default)s)"
    )


def _action(actions: Any, name: str, help: str, description: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=help,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE.toml")
    add_source_arguments(parser, weights="global")
    return parser
