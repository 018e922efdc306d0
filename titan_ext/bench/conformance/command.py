"""Other people's tests and implementations beside ours: what they compute, titan_ext computes.

  torchft            torchft's unit tests of LocalSGD and DiLoCo, with titan_ext's drop-in in their place
  torchft_traces     torchft's regression suite of streaming DiLoCo: parameters after each step, with a real lighthouse
  torch              QHAdamW and Muon beside torch's AdamW and Muon
  pytorch_optimizer  QHAdamW, ADOPT and Muon beside pytorch_optimizer's
  flower             outer optimizers and robust means beside Flower's strategies
  transformers       logits of an exported model
  lm_eval            likelihoods that lm-evaluation-harness finds for an exported folder, beside those of titan-ext eval
  plain_checkpoint   a checkpoint with the outer loop's state, read by torch.distributed.checkpoint without titan_ext

Nothing is fetched. A part whose package is missing is skipped and says which. The exit code is 1 if anything differs.
"""

import argparse
from dataclasses import asdict
from typing import Any

from titan_ext.errors import RunError
from titan_ext.experiments.command import chosen

HELP = "torchft's suites, and optimizers, aggregations and files beside those of other packages"

PARTS = (
    "torchft",
    "torchft_traces",
    "torch",
    "pytorch_optimizer",
    "flower",
    "transformers",
    "lm_eval",
    "plain_checkpoint",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which parts."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated (default: {','.join(PARTS)})")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the checks, print them, and return them.

    Raises:
        UserError: a part is not known.
        RunError: something differs.
    """
    parts = chosen(options.parts, "parts", PARTS)
    from titan_ext.bench.conformance import files, flower, optimizers, torchft_suites
    from titan_ext.bench.conformance.checks import checks_of
    from titan_ext.launcher.text import columns

    known = {
        "torchft": torchft_suites.TORCHFT,
        "torchft_traces": torchft_suites.TORCHFT_TRACES,
        "torch": optimizers.WITH_TORCH,
        "pytorch_optimizer": optimizers.WITH_PYTORCH_OPTIMIZER,
        "flower": flower.FLOWER,
        "transformers": files.TRANSFORMERS,
        "lm_eval": files.LM_EVAL,
        "plain_checkpoint": files.PLAIN_CHECKPOINT,
    }
    rows = [asdict(check) for name in parts for check in checks_of(name, known[name])]
    print(*columns([["part", "check", "", "detail"], *([*row.values()] for row in rows)]), sep="\n")
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("holds", "differs", "skipped")}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if counts["differs"]:
        raise RunError(f"conformance: {counts['differs']} of {len(rows)} checks differ")
    return {**counts, "rows": rows}
