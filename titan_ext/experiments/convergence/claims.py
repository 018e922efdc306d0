"""What the papers lead one to expect of the comparison, and whether it came out so."""

from collections.abc import Mapping
from typing import Any

from titan_ext.experiments.convergence.outcome import Outcome

# LoRDO's abstract: perplexity within 1% of low-rank data parallelism at about ten times fewer bytes.
_LORDO_PERPLEXITY, _LORDO_BYTES = 1.01, 10.0


def claims(found: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """Each claim whose methods were run: ``claim``, ``holds`` and, in words, the ``figures``.

    Losses count as equal where they differ by no more than the noise: the larger of the two methods' standard
    deviations over seeds, 0 for a single seed.
    """
    judges = {
        _des_loc: ("des_loc", "local_adam"),
        _mt_dao: ("mt_dao", "ddp", "local_adam"),
        _lordo: ("lordo", "low_rank_ddp"),
    }
    return [
        judge(*(found[method] for method in methods))
        for judge, methods in judges.items()
        if all(method in found for method in methods)
    ]


def _des_loc(ours: Outcome, local_adam: Outcome) -> dict[str, Any]:
    difference, noise = _compared(ours, local_adam)
    share = ours.bytes_sent / local_adam.bytes_sent
    return _claim(
        "DES-LOC is within noise of Local Adam, at half its bytes or less",
        abs(difference) <= noise and share <= 0.5,
        f"loss {difference:+.4f}, noise {noise:.4f}; {share:.3f} of the bytes",
    )


def _mt_dao(ours: Outcome, ddp: Outcome, local_adam: Outcome) -> dict[str, Any]:
    difference, noise = _compared(ours, ddp)
    theirs, their_noise = _compared(local_adam, ddp)
    return _claim(
        "MT-DAO is at or below DDP's loss, where Local Adam is above",
        difference <= noise and theirs > their_noise,
        f"loss {difference:+.4f} against DDP, noise {noise:.4f}; Local Adam {theirs:+.4f}, noise {their_noise:.4f}",
    )


def _lordo(ours: Outcome, low_rank_ddp: Outcome) -> dict[str, Any]:
    ratio = ours.perplexity / low_rank_ddp.perplexity
    less = low_rank_ddp.bytes_sent / ours.bytes_sent
    return _claim(
        "LoRDO is within 1% of low-rank DDP's perplexity, at 10 times fewer bytes",
        ratio <= _LORDO_PERPLEXITY and less >= _LORDO_BYTES,
        f"perplexity {ratio - 1:+.2%}; {less:.1f} times fewer bytes",
    )


def _compared(ours: Outcome, theirs: Outcome) -> tuple[float, float]:
    return ours.loss - theirs.loss, max(ours.deviation or 0.0, theirs.deviation or 0.0)


def _claim(claim: str, holds: bool, figures: str) -> dict[str, Any]:
    return {"claim": claim, "holds": holds, "figures": figures}
