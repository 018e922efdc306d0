"""Whether a site gains by taking part: the federated model against one that the site trained alone.

The relative accuracy of arXiv 2305.02728, in losses: both models have taken the same inner steps (where these were not of equal
tokens, a note says so), and are measured on the documents that the site's training leaves out.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from titan_ext.errors import UserError
from titan_ext.instruments.lines import read_table

if TYPE_CHECKING:
    from titan_ext.config.load import Site
    from titan_ext.inference.checkpoint import Checkpoint
    from titan_ext.inference.text import Text


@dataclass(frozen=True, slots=True)
class Gap:
    """One site's two models."""

    site: str
    step: int | None
    """Inner steps that both have taken."""
    federated: float
    """Mean loss of the federated model, in nats a token."""
    alone: float
    """That of the site's own."""

    @property
    def gap(self) -> float:
        """By how much the federated model is better, in nats a token; below 0 the site loses by taking part."""
        return self.alone - self.federated


def summarize(gaps: Sequence[Gap]) -> dict[str, Any]:
    """Over the sites: how many lose by taking part, who is worst, mean and spread of the gaps (standard deviation)."""
    values = [each.gap for each in gaps]
    worst = min(gaps, key=lambda each: each.gap)
    return {
        "sites": [{**asdict(each), "gap": each.gap} for each in gaps],
        "underperformers": sum(value < 0 for value in values),
        "worst_site": worst.site,
        "worst_gap": worst.gap,
        "mean_gap": fmean(values) if values else nan,
        "spread": pstdev(values),
        "loss_spread": pstdev([each.federated for each in gaps]),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure both models of every site, or of ``--site``, print a table, and return ``summarize``'s figures.

    Raises:
        UserError: a checkpoint or text is missing, or a site's two models have not taken the same steps.
        RunError: a checkpoint cannot be read.
    """
    _check(options)
    from titan_ext.config.load import load_run, load_site

    chosen = options.site is not None
    sites = [load_site(options.file, options.site, options.overrides)] if chosen else None
    sites = sites or load_run(options.file, options.overrides).sites
    pairs = [(site, *_checkpoints(site, Path(options.relative))) for site in sites]
    print(f"{'site':<16}{'steps':>8}{'federated':>12}{'alone':>10}{'gap':>10}")
    gaps, notes = [], []
    for site, federated, alone in pairs:
        found = _measure(site, federated, alone, options)
        gaps.append(found)
        tokens = [_tokens(Path(folder) / site.name, found.step) for folder in (site.dump_root, options.relative)]
        if None not in tokens and tokens[0] != tokens[1]:
            notes.append(f"{site.name}: not of equal tokens: {tokens[0]:,} with the others, {tokens[1]:,} alone")
        print(
            f"{found.site:<16}{found.step or 0:>8}{found.federated:>12.4f}{found.alone:>10.4f}{found.gap:>+10.4f}",
            flush=True,
        )
    figures = summarize(gaps)
    print(
        f"{figures['underperformers']} of {len(gaps)} sites lose by taking part; worst {figures['worst_site']} "
        f"({figures['worst_gap']:+.4f}), mean {figures['mean_gap']:+.4f}, spread {figures['spread']:.4f}"
    )
    print("losses in nats a token, on text that training left out, at equal inner steps; gap: alone - federated")
    print(*(f"note: {each}\n" for each in notes), sep="", end="")
    return figures


def _check(options: argparse.Namespace) -> None:
    if not Path(options.relative).is_dir():
        raise UserError(f"--relative {options.relative}: no such folder")
    for flag in ("tasks", "iterations"):
        if getattr(options, flag) is not None:
            raise UserError(f"--{flag} {getattr(options, flag)}: left out with --relative")
    if options.checkpoint != "latest":
        raise UserError(f"--checkpoint {options.checkpoint}: left out with --relative, which compares the latest")
    if options.tokens < 1:
        raise UserError(f"--tokens {options.tokens}: must be at least 1 with --relative")


def _checkpoints(site: "Site", relative: Path) -> "tuple[Checkpoint, Checkpoint]":
    """The federated and the own model of a site, of the same step."""
    from titan_ext.checkpoint_place import CHECKPOINTS, checkpoint_folder
    from titan_ext.config.recorded import read_record
    from titan_ext.inference.checkpoint import LATEST, find_checkpoint
    from titan_ext.object_store import is_url

    name = site.config.checkpoint.folder
    federated = find_checkpoint(LATEST, checkpoint_folder(site.config.dump_folder, name))
    name = CHECKPOINTS if is_url(name) else name  # the other run's are in a folder
    folder = relative / site.name / name
    if not folder.is_dir():
        raise UserError(
            f"--relative {relative}: holds no {site.name}/{name}; train the site alone with --semi_sync.method none "
            f"--dump_folder {relative}"
        )
    alone = find_checkpoint(str(folder), folder)
    method = (read_record(folder / f"step-{alone.step}") or {}).get("semi_sync", {}).get("method", "none")
    if method != "none":
        raise UserError(
            f'--relative {relative}: site "{site.name}" trained there with the others too (semi_sync.method = "{method}"); train '
            "it alone with --semi_sync.method none and a --dump_folder of its own"
        )
    if alone.step != federated.step:
        raise UserError(
            f'--relative {relative}: site "{site.name}" trained alone to step {alone.step}, with the others to step '
            f"{federated.step}; only models of equal tokens are compared"
        )
    for checkpoint in (federated, alone):
        checkpoint.check_tokenizer(site.config)
    return federated, alone


def _tokens(folder: Path, step: int | None) -> int | None:
    """Tokens of the site's own up to a step, as its ``metrics.jsonl`` has them; None where it does not."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    tables = (read_table(line) for line in reversed(lines))
    return next(
        (each.get("tokens") for each in tables if each and (each.get("kind"), each.get("step")) == ("step", step)), None
    )


def _measure(site: "Site", federated: "Checkpoint", alone: "Checkpoint", options: argparse.Namespace) -> Gap:
    from titan_ext.inference.text import evaluation_text

    batch = options.batch_size or site.config.training.local_batch_size
    text = evaluation_text(site, options.corpus, options.tokens, batch, federated.trained_with())
    losses = [_loss(site, federated, options.weights, text), _loss(site, alone, "site", text)]
    return Gap(site.name, federated.step, *losses)


def _loss(site: "Site", checkpoint: "Checkpoint", weights: Any, text: "Text") -> float:
    from titan_ext.inference.model import default_iterations, load_model
    from titan_ext.inference.perplexity import measure

    return measure(load_model(site, checkpoint, weights=weights), text.batches, default_iterations(site)).loss
