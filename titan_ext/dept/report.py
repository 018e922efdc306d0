"""``titan-ext dept eval``: tables for people and one JSON object as the last line."""

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from titan_ext.config.load import Site
from titan_ext.dept.adaptation import Adaptation, Curve, plasticity
from titan_ext.dept.embed import open_sites
from titan_ext.dept.measures import Figures, measure_site, total
from titan_ext.errors import UserError


def evaluate(options: argparse.Namespace) -> int:
    """Measure the sites' models, and the plasticity of their body where that is asked for.

    Raises:
        UserError: an argument, a checkpoint or the text cannot be used.
        RunError: a checkpoint cannot be read.
    """
    adaptation = _adaptation(options)
    sites = open_sites(options, options.site)
    chosen = {"step": options.step, "weights": options.weights}
    figures = _measured(sites, options.corpus, options.tokens, chosen) if options.tokens else []
    curve = None
    if adaptation is not None:
        curve = plasticity(sites[0], adaptation, **chosen)
        _print_curve(sites[0].name, adaptation, curve)
    report = {
        "sites": [_row(each) for each in figures[:-1]],
        "total": _row(figures[-1]) if figures else None,
        "plasticity": _curve(sites[0].name, curve) if curve is not None else None,
    }
    print(json.dumps(report, ensure_ascii=False), flush=True)
    return 0


def _adaptation(options: argparse.Namespace) -> Adaptation | None:
    if options.tokens < 0 or (options.tokens == 0 and options.plasticity is None):
        raise UserError(f"--tokens {options.tokens}: must be at least 1, or 0 with --plasticity")
    if options.plasticity is None:
        if options.tokenizer is not None:
            raise UserError(f"--tokenizer {options.tokenizer}: needs --plasticity")
        return None
    if options.tokenizer is None:
        raise UserError(f"--plasticity {options.plasticity}: needs --tokenizer, whose embedding is to be learned")
    for flag in ("steps", "plasticity_tokens"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(options, flag)}: must be at least 1")
    if not 0 < options.lr < math.inf:
        raise UserError(f"--lr {options.lr:g}: must be a number above 0")
    return Adaptation(
        corpus=options.plasticity,
        tokenizer=options.tokenizer,
        steps=options.steps,
        lr=options.lr,
        seed=options.seed,
        tokens=options.plasticity_tokens,
    )


def _measured(sites: Sequence[Site], corpus: str | None, tokens: int, chosen: dict[str, Any]) -> list[Figures]:
    """Print and return the figures of each site, and of all at the end."""
    print(f"{'':<14}{'tokens':>10}{'loss':>10}{'perplexity':>13}{'unigram':>10}{'normalised':>12}{'unknown':>10}")
    found = []
    for site in sites:
        found.append(measure_site(site, corpus=corpus, tokens=tokens, **chosen))
        print(_line(found[-1]), flush=True)
    found.append(total(found))
    print(_line(found[-1]), flush=True)
    return found


def _line(figures: Figures) -> str:
    return (
        f"{figures.name:<14}{figures.tokens:>10,}{figures.loss:>10.4f}{figures.perplexity:>13.3f}"
        f"{figures.unigram:>10.4f}{figures.normalised:>12.4f}{figures.unknown:>10.3%}"
    )


def _print_curve(site: str, adaptation: Adaptation, curve: Curve) -> None:
    print(f"\nplasticity of {site}'s body on {adaptation.corpus}, from a random embedding for {adaptation.tokenizer}")
    print(f"{'step':>8}{'loss':>10}{'normalised':>12}")
    for step, loss in curve.points:
        print(f"{step:>8}{loss:>10.4f}{loss - curve.unigram:>12.4f}", flush=True)


def _row(figures: Figures) -> dict[str, Any]:
    return {
        "site": figures.name,
        "tokens": figures.tokens,
        "loss": _finite(figures.loss),
        "perplexity": _finite(figures.perplexity),
        "unigram_ce": figures.unigram,
        "normalised_loss": _finite(figures.normalised),
        "unknown_rate": figures.unknown,
    }


def _curve(site: str, curve: Curve) -> dict[str, Any]:
    return {
        "site": site,
        "unigram_ce": curve.unigram,
        "points": [
            {"step": step, "loss": _finite(loss), "normalised_loss": _finite(loss - curve.unigram)}
            for step, loss in curve.points
        ],
    }


def _finite(value: float) -> float | None:
    """The value, or None for the infinity and NaN that JSON does not have."""
    return value if math.isfinite(value) else None
