"""``titan-ext dept``: what comes after pre-training with decoupled embeddings."""

import argparse

from titan_ext.commands.command import Command, local_path
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


def _embed(options: argparse.Namespace) -> int:
    from titan_ext.dept.embed import embed

    return embed(options)


def _evaluate(options: argparse.Namespace) -> int:
    from titan_ext.dept.report import evaluate

    return evaluate(options)


def _add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help='the global one; or "byte"')
    parser.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--embedding", choices=["random", "sites"], default="random", help="where its rows come from (default random)"
    )
    parser.add_argument("--body-site", metavar="NAME", help="whose checkpoint has the body (default: the first's)")
    parser.add_argument("--seed", type=int, default=0, help="of random rows (default %(default)s)")


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
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


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.toml")
    add_source_arguments(parser, weights="global")


COMMAND = Command(
    name="dept",
    help="after sites trained a body with embeddings of their own",
    description=_DESCRIPTION,
    actions=(
        Command(
            name="embed",
            help="one embedding for a global tokenizer",
            description=_EMBED,
            add_arguments=_add_embed_arguments,
            run=_embed,
            takes_overrides=True,
        ),
        Command(
            name="eval",
            help="losses per site and in total; plasticity",
            description=_EVALUATE,
            add_arguments=_add_evaluate_arguments,
            run=_evaluate,
            takes_overrides=True,
        ),
    ),
)
