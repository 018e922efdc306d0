"""``titan-ext personalize``: adapt a trained model to one site's text, by one or several ways, and compare."""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from titan_ext.commands.command import Command, local_path
from titan_ext.error_text import unwritable
from titan_ext.errors import UserError, one_of
from titan_ext.inference.arguments import add_run_arguments, open_run

if TYPE_CHECKING:
    from titan_ext.config.load import Site
    from titan_ext.inference.checkpoint import Checkpoint
    from titan_ext.inference.text import Text

_DESCRIPTION = """\
Adapt the model of a checkpoint to a site's own text after training, in this process: all of it trains (fine-tune), its
head alone (freeze), or all of it kept near the checkpoint (proximal, ewc, distillation). Each way starts from the
checkpoint and is measured on text that training leaves out. A larger model is adapted by a run of its own, with
[[regularizer.phases]] and checkpoint.initial_load_path. Settings can be overridden as in training.
"""
_EXAMPLES = """\
examples:
  titan-ext personalize FILE.toml --site east --out runs/adapted                    all ways, 100 steps each
  titan-ext personalize FILE.toml --site east --out runs/adapted --by ewc,distillation --steps 500 --lr 3e-5
"""
_ALL = "fine-tune,freeze,proximal,ewc,distillation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, how it is adapted, and what it is measured on."""
    add_run_arguments(parser)
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="FOLDER", help="a folder for each way goes there"
    )
    parser.add_argument("--by", default=_ALL, metavar="WAY,…", help="default %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="inner steps of each way (default %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate, constant (default %(default)s)")
    parser.add_argument("--strength", type=float, help="of proximal, ewc or distillation (default: as in training)")
    parser.add_argument("--corpus", help='text to measure on, as in data = "…" (default: what training leaves out)')
    parser.add_argument("--tokens", type=int, default=2**16, help="tokens to predict (default %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Measure the checkpoint, adapt and measure by each way, print a table, and one JSON object as the last line.

    Raises:
        UserError: an argument, the checkpoint or the text cannot be used.
        RunError: the checkpoint cannot be read, or training failed.
    """
    ways = _checked(options)
    from titan_ext.inference.checkpoint import find_checkpoint
    from titan_ext.inference.text import evaluation_text
    from titan_ext.trainer.personalization import WAYS, adapted_config, train_alone

    site, checkpoint = open_run(options)
    if checkpoint.huggingface:
        raise UserError(f"--checkpoint {checkpoint.path}: must be a checkpoint of a run, not Hugging Face's format")
    # All of them first: a way that cannot be had shows before any other has trained.
    configs = {
        name: adapted_config(
            site.config,
            checkpoint.path,
            options.out / name,
            WAYS[name],
            steps=options.steps,
            lr=options.lr,
            strength=options.strength if WAYS[name].regularizer is not None else None,
        )
        for name in ways
    }
    batch_size = site.config.training.local_batch_size
    text = evaluation_text(site, options.corpus, options.tokens, batch_size, checkpoint.trained_with())
    rows = [_row("none", _loss(site, checkpoint, text), None)]
    for name, config in configs.items():
        train_alone(config)
        adapted = find_checkpoint("latest", options.out / name / config.checkpoint.folder)
        rows.append(_row(name, _loss(site, adapted, text), rows[0]["loss"]))
    _print(site, checkpoint, text, rows)
    print(json.dumps({"site": site.name, "checkpoint": str(checkpoint.path), "ways": rows}), flush=True)
    return 0


def _checked(options: argparse.Namespace) -> list[str]:
    known = _ALL.split(",")
    ways = list(dict.fromkeys(options.by.split(",")))
    for name in ways:
        if name not in known:
            raise UserError(f"--by {name}: {one_of(name, known)}")
        if (folder := options.out / name).exists():
            raise UserError(f"--out {folder}: is there already; name another folder")
    for key in ("steps", "tokens"):
        if getattr(options, key) < 1:
            raise UserError(f"--{key} {getattr(options, key)}: must be at least 1")
    if not 0 < options.lr < math.inf:
        raise UserError(f"--lr {options.lr}: must be above 0")
    if options.weights != "site":
        raise UserError(
            f"--weights {options.weights}: must be site: adapted is the site's own model, which after a round without delay "
            "is the global one"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(f"--out {options.out}", error) from error
    return ways


def _loss(site: "Site", checkpoint: "Checkpoint", text: "Text") -> float:
    from titan_ext.inference.model import default_iterations, load_model
    from titan_ext.inference.perplexity import measure

    return measure(load_model(site, checkpoint, weights="site"), text.batches, default_iterations(site)).loss


def _row(name: str, loss: float, before: float | None) -> dict[str, Any]:
    return {"way": name, "loss": loss, "gain": None if before is None else before - loss}


def _print(site: "Site", checkpoint: "Checkpoint", text: "Text", rows: list[dict[str, Any]]) -> None:
    print(f"\nmodel       {site.model.label} of site {site.name}\nweights     {checkpoint.path}")
    print(f"text        {text.description}, {text.tokens:,} tokens\n\n{'adapted by':<16}{'loss':>10}{'gain':>10}")
    for row in rows:
        gain = "" if row["gain"] is None else f"{row['gain']:>+10.4f}"
        print(f"{row['way']:<16}{row['loss']:>10.4f}{gain}")


COMMAND = Command(
    name="personalize",
    help="adapt a trained model to a site's text, and compare ways",
    description=_DESCRIPTION,
    epilog=_EXAMPLES,
    add_arguments=add_arguments,
    run=run,
    takes_overrides=True,
)
