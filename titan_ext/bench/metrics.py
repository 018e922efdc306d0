"""Share of a site's time that its metrics take: lines of steps and rounds, norms of the outer loop and of inner steps.

One site trains with an outer loop of its own, and what the metrics' functions take is added up in the same run. With --adapt
it trains with ADAPT's weights: their share is measured too, and beside it that of the passes over its anchors.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from titan_ext.bench.flags import add_numbers, check_numbers
from titan_ext.bench.overhead import SITE_CONFIG, single_rank_environment

HELP = "share of a step's time that metrics take: lines of steps and rounds, norms of rounds and of steps"

_NUMBERS = {
    "seq_len": (256, 1, "tokens a sequence"),
    "batch": (4, 1, "sequences a step"),
    "sync_every": (10, 1, "inner steps a round"),
    "steps": (60, 1, "steps that are measured"),
    "norms_every": (20, 1, "inner steps between two measurements of parameters, updates and activations"),
}

_ADAPT = ["--loss.name=adapt", "--loss.adapt.anchors=builtin:code", "--loss.adapt.max_anchors=32"]
_BESIDE = ("adapt", "anchors")
"""Parts that are no metrics."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Size and length of the measurement."""
    parser.add_argument("--flavor", default="debugmodel", help="flavor of the llama3 model (default: debugmodel)")
    add_numbers(parser, _NUMBERS)
    parser.add_argument("--adapt", action="store_true", help='train with loss.name = "adapt", and measure it too')


def run(options: argparse.Namespace) -> dict[str, float]:
    """Measure, print a line for each part, and return the shares."""
    check_numbers(options, _NUMBERS)
    single_rank_environment()
    import torch
    from torchft.coordination import LighthouseServer

    from titan_ext.config import load_site

    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=1, join_timeout_ms=1000)
    url = f"http://127.0.0.1:{lighthouse.address().rsplit(':', 1)[1]}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.toml"
        file.write_text(SITE_CONFIG.format(**vars(options)), encoding="utf-8")
        flags = [f"--dump_folder={folder}/run", f"--replica.lighthouse={url}"]
        flags += [f"--metrics.{each}_norms_every={options.norms_every}" for each in ("parameter", "activation")]
        flags += _ADAPT if options.adapt else []
        trainer = load_site(file, "bench", flags).config.build()
        spent = _measure(trainer, options.steps)
        trainer.close()
    lighthouse.shutdown()
    torch.distributed.destroy_process_group()
    return _report(spent)


def _measure(trainer: Any, steps: int) -> dict[str, float]:
    """Seconds of all steps together (``total``), and of each part of the metrics in them."""
    batches = trainer.batch_generator(trainer.dataloader)
    trainer.should_continue_training()

    def take(count: int) -> None:
        for _ in range(count):
            trainer.step += 1
            trainer.train_step(batches)

    take(3)
    with _timed() as spent:
        started = time.perf_counter()
        take(steps)
        return {**spent, "total": time.perf_counter() - started}


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Seconds spent in each part of the metrics while entered; one called by another counts for that one."""
    from titan_ext.losses.adapt import Adapt
    from titan_ext.semi_sync.round.outer_norms import OuterNorms
    from titan_ext.trainer.journal import RunJournal
    from titan_ext.trainer.metrics import MetricsProcessor
    from titan_ext.trainer.norms import ActivationNorms, ParameterNorms

    spent = dict.fromkeys(("rounds", "steps", "norms", "inner_norms", *_BESIDE), 0.0)
    busy: list[str] = []
    parts = [
        (MetricsProcessor, "log_round", "rounds"),
        (RunJournal, "add", "steps"),
        (OuterNorms, "before_apply", "norms"),
        (OuterNorms, "after_apply", "norms"),
        *((ParameterNorms, name, "inner_norms") for name in ("before_step", "after_step")),
        *((Adapt, name, "adapt") for name in ("weights", "rescale", "after_step")),
        (Adapt, "before_step", "anchors"),
        *((ActivationNorms, name, "inner_norms") for name in ("listen", "stop_listening", "take", "_add", "_look")),
    ]
    with ExitStack() as stack:
        for owner, name, part in parts:
            stack.enter_context(patch.object(owner, name, _adding(getattr(owner, name), part, spent, busy)))
        yield spent


def _adding(function: Callable[..., Any], part: str, spent: dict[str, float], busy: list[str]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        if busy:
            return function(*arguments, **options)
        busy.append(part)
        started = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[part] += time.perf_counter() - started
            busy.pop()

    return timed


def _report(spent: dict[str, float]) -> dict[str, float]:
    total = spent.pop("total")
    figures = {f"{part}_share": round(seconds / total, 6) for part, seconds in spent.items()}
    figures["share"] = round(sum(each for part, each in spent.items() if part not in _BESIDE) / total, 6)
    for name, share in figures.items():
        print(f"{name.replace('_', ' '):<14} {share:>8.3%}")
    return figures
