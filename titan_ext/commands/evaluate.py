"""``titan-ext eval``: perplexity and tasks of a checkpoint, at one or several numbers of iterations."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_ext.commands.command import Command
from titan_ext.errors import UserError
from titan_ext.inference import relative
from titan_ext.inference.arguments import add_run_arguments, open_run
from titan_ext.inference.tasks import Score, Tasks, prepare_harness

if TYPE_CHECKING:
    from torchtitan.models.common.decoder import Decoder

    from titan_ext.config.load import Site
    from titan_ext.inference.checkpoint import Checkpoint
    from titan_ext.inference.perplexity import Measurement
    from titan_ext.inference.text import Text

_DESCRIPTION = """\
Measure a checkpoint: perplexity on text that training left out, and tasks of lm-evaluation-harness whose data is on
this machine. A model that iterates is measured at each count of --iterations, from the same weights.
Settings can be overridden as in training: --model.skip input, --training.seq_len 4096 …
"""

_EXAMPLES = """\
examples:
  titan-ext eval FILE.toml --site east --iterations 1,2,4,8            on the documents that data.split leaves out
  titan-ext eval FILE.toml --site east --corpus data/valid.jsonl       on other text
  titan-ext eval FILE.toml --relative runs/alone                       each site's model against one trained alone
  titan-ext eval FILE.toml --site east --tokens 0 --tasks hellaswag,lambada_openai,arc_easy,commonsense_qa
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and what to measure."""
    add_run_arguments(parser)
    parser.add_argument("--iterations", metavar="N,N,…", help="of the body (default: model.eval_iterations)")
    parser.add_argument("--corpus", help='text to evaluate on, as in data = "…" (default: what training leaves out)')
    parser.add_argument(
        "--tokens", type=int, default=2**18, help="tokens to predict (default %(default)s); 0: no perplexity"
    )
    parser.add_argument("--batch-size", type=int, help="sequences at a time (default: training.local_batch_size)")
    parser.add_argument(
        "--relative",
        metavar="FOLDER",
        help="compare every site's federated model with the one that it trained alone (FOLDER: dump_folder of runs with "
        "semi_sync.method none), at equal steps: who loses by taking part",
    )
    parser.add_argument("--tasks", metavar="NAME,…", help="tasks of lm-evaluation-harness")
    parser.add_argument("--task-folder", type=Path, metavar="PATH", help="YAML files of tasks of your own")
    parser.add_argument("--limit", type=int, help="examples of each task at most (default: all)")


def run(options: argparse.Namespace) -> int:
    """Measure, print tables, and one JSON object as the last line.

    Raises:
        UserError: an argument, the checkpoint or the text cannot be used.
        RunError: the checkpoint cannot be read.
    """
    _check(options)
    if options.relative is not None:
        print(json.dumps(relative.run(options), ensure_ascii=False), flush=True)
        return 0
    if options.tasks:
        prepare_harness()
    from titan_ext.inference.model import load_model
    from titan_ext.inference.text import evaluation_text

    site, checkpoint = open_run(options)
    counts = _counts(site, options.iterations)
    batch_size = options.batch_size or site.config.training.local_batch_size
    tasks = Tasks(options.tasks.split(","), options.task_folder, options.limit) if options.tasks else None
    text = None
    if options.tokens:
        text = evaluation_text(site, options.corpus, options.tokens, batch_size, checkpoint.trained_with())
    model = load_model(site, checkpoint, weights=options.weights)
    _print_header(site, checkpoint, options.weights, model, text)
    measured = _measure(model, text, counts) if text is not None else []
    scored = _score(model, site, tasks, counts, batch_size) if tasks is not None else []
    report = {
        "site": site.name,
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "weights": options.weights,
        "text": text.description if text is not None else None,
        "perplexity": measured,
        "tasks": scored,
    }
    print(json.dumps(report, ensure_ascii=False), flush=True)
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.tokens < 0 or (options.tokens == 0 and not options.tasks):
        raise UserError(f"--tokens {options.tokens}: must be at least 1, or 0 with --tasks")
    for flag in ("batch_size", "limit"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least 1")
    for flag in ("task_folder", "limit"):
        if getattr(options, flag) is not None and not options.tasks:
            raise UserError(f"--{flag.replace('_', '-')}: needs --tasks")


def _counts(site: "Site", asked: str | None) -> list[int] | list[None]:
    """Numbers of iterations to measure at; [None] for a model that does not iterate."""
    from titan_ext.inference.model import check_iterations, default_iterations

    if asked is None:
        return [default_iterations(site)]
    try:
        counts = [int(each) for each in asked.split(",")]
    except ValueError:
        raise UserError(f"--iterations {asked}: must be whole numbers, such as 1,2,4,8") from None
    check_iterations(site, "--iterations", asked, counts)
    return counts


def _print_header(site: "Site", checkpoint: "Checkpoint", weights: str, model: "Decoder", text: "Text | None") -> None:
    parameter = next(model.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    print(f"model       {site.model.label} of site {site.name}, {dtype} on {parameter.device.type}")
    kind = {"global": ", global parameters", "average": ", running average of the global parameters"}
    print(f"weights     {checkpoint.path}" + kind.get(weights, ""))
    if text is not None:
        print(f"text        {text.description}")
        print(f"            {text.tokens:,} tokens in sequences of {site.config.training.seq_len:,}")
    for note in site.notes:
        print(f"note        {note}")


def _measure(model: "Decoder", text: "Text", counts: Sequence[int | None]) -> list[dict[str, Any]]:
    from titan_ext.inference.perplexity import measure

    print(f"\n{'iterations':>10}{'loss':>12}{'perplexity':>14}{'tokens':>12}{'seconds':>10}{'tokens/s':>12}")
    rows = []
    for count in counts:
        found = measure(model, text.batches, count)
        print(
            f"{count or 1:>10}{found.loss:>12.4f}{found.perplexity:>14.3f}{found.tokens:>12,}{found.seconds:>10.1f}"
            f"{found.tokens / found.seconds:>12,.0f}",
            flush=True,
        )
        rows.append(_row(found))
    return rows


def _row(found: "Measurement") -> dict[str, Any]:
    return {
        "iterations": found.iterations or 1,
        "loss": _finite(found.loss),
        "perplexity": _finite(found.perplexity),
        "tokens": found.tokens,
        "seconds": round(found.seconds, 3),
    }


def _finite(value: float) -> float | None:
    """The value, or None for the infinity and NaN that JSON does not have."""
    return value if math.isfinite(value) else None


def _score(
    model: "Decoder", site: "Site", tasks: Tasks, counts: Sequence[int | None], batch_size: int
) -> list[dict[str, Any]]:
    from titan_ext.data.tokenizers.tokenizer import build_tokenizer, vocabulary_size
    from titan_ext.inference.harness import HarnessModel

    tokenizer = build_tokenizer(site.tokenizer, site.vocabulary)
    vocabulary = vocabulary_size(site.tokenizer, site.vocabulary)
    length = site.config.training.seq_len
    print(f"\n{'iterations':>10}  {'task':<28}{'metric':<16}{'value':>10}{'examples':>10}")
    rows = []
    for count in counts:
        adapter = HarnessModel(model, tokenizer, vocabulary, iterations=count, length=length, batch_size=batch_size)
        for score in tasks.score(adapter):
            print(_task_line(count, score), flush=True)
            rows.append({"iterations": count or 1, **asdict(score), "value": _finite(score.value)})
    return rows


def _task_line(count: int | None, score: Score) -> str:
    return f"{count or 1:>10}  {score.task:<28}{score.metric:<16}{score.value:>10.4f}{score.examples:>10,}"


COMMAND = Command(
    name="eval",
    help="perplexity and tasks of a checkpoint",
    description=_DESCRIPTION,
    epilog=_EXAMPLES,
    add_arguments=add_arguments,
    run=run,
    takes_overrides=True,
)
