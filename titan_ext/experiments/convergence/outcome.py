"""What each method came to, and whether that is what the papers lead one to expect."""

from collections.abc import Callable, Iterable, Mapping
from math import exp, isfinite
from statistics import mean
from typing import Any

from titan_ext.experiments.claims import claim
from titan_ext.experiments.convergence.methods import METHODS, Result
from titan_ext.experiments.report import TunedOutcome, steps_to

# LoRDO's abstract: perplexity within 1% of low-rank data parallelism at about ten times fewer bytes.
_LORDO_PERPLEXITY, _LORDO_BYTES = 1.01, 10.0


class Outcome(TunedOutcome[Result]):
    """One method's runs at its best learning rate; losses are validation losses after the last step."""

    @property
    def label(self) -> str:
        """The method's name for people."""
        return METHODS[self.method].label

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, of a token."""
        return exp(self.loss)

    @property
    def bytes_sent(self) -> int:
        """Bytes that a site sent in the run."""
        return self.runs[0].bytes_sent[-1]

    def curve(self) -> list[tuple[int, float, int]]:
        """Step, mean loss and bytes of each measurement up to the first that diverged."""
        steps, sent = self.runs[0].steps, self.runs[0].bytes_sent
        together = zip(steps, zip(*(run.losses for run in self.runs)), sent)
        return [(step, mean(losses), size) for step, losses, size in together if None not in losses]

    def steps_to(self, target: float) -> float | None:
        """Step at which the mean loss first is down at ``target``, between measurements in a straight line."""
        return steps_to(((step, loss) for step, loss, _ in self.curve()), target)


def common_target(found: Iterable[Outcome]) -> float | None:
    """The loss that every method reaches: the highest of their last ones; None if all diverged."""
    return max((outcome.loss for outcome in found if isfinite(outcome.loss)), default=None)


def claims(found: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """Each claim whose methods were run: ``claim``, ``holds`` and, in words, the ``figures``.

    Losses count as equal where they differ by no more than the noise: the larger of the two methods' standard
    deviations over seeds, 0 for a single seed.
    """
    judges: dict[Callable[..., Any], tuple[str, ...]] = {
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
    return claim(
        "DES-LOC is within noise of Local Adam, at half its bytes or less",
        abs(difference) <= noise and share <= 0.5,
        f"loss {difference:+.4f}, noise {noise:.4f}; {share:.3f} of the bytes",
    )


def _mt_dao(ours: Outcome, ddp: Outcome, local_adam: Outcome) -> dict[str, Any]:
    difference, noise = _compared(ours, ddp)
    theirs, their_noise = _compared(local_adam, ddp)
    return claim(
        "MT-DAO is at or below DDP's loss, where Local Adam is above",
        difference <= noise and theirs > their_noise,
        f"loss {difference:+.4f} against DDP, noise {noise:.4f}; Local Adam {theirs:+.4f}, noise {their_noise:.4f}",
    )


def _lordo(ours: Outcome, low_rank_ddp: Outcome) -> dict[str, Any]:
    ratio = ours.perplexity / low_rank_ddp.perplexity
    less = low_rank_ddp.bytes_sent / ours.bytes_sent
    return claim(
        "LoRDO is within 1% of low-rank DDP's perplexity, at 10 times fewer bytes",
        ratio <= _LORDO_PERPLEXITY and less >= _LORDO_BYTES,
        f"perplexity {ratio - 1:+.2%}; {less:.1f} times fewer bytes",
    )


def _compared(ours: Outcome, theirs: Outcome) -> tuple[float, float]:
    return ours.loss - theirs.loss, max(ours.deviation or 0.0, theirs.deviation or 0.0)
