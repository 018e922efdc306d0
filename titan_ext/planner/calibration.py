"""A plan that learns from a run, and what it would have said of it."""

from dataclasses import dataclass, replace

from titan_ext.planner.ledger import Measured
from titan_ext.planner.prediction import Prediction, Surroundings, Workload, predict
from titan_ext.planner.range import Range

_FAR = 2.0
"""Times the formula's seconds beyond which it is not the links that are slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One number of a plan beside that of a run."""

    what: str
    unit: str
    predicted: Range
    measured: float

    @property
    def within(self) -> bool:
        """Whether the interval covers it."""
        return self.measured in self.predicted

    @property
    def ratio(self) -> float:
        """Measured to likely."""
        return self.measured / self.predicted.likely if self.predicted.likely else float("inf")


def calibrated(around: Surroundings, measured: Measured, work: Workload) -> Surroundings:
    """The surroundings as a run found them.

    Where rounds took far longer than the wire explains, the rest is taken for work at the sites, which does not grow with
    the bytes; else the links are taken for slower, or faster, than was said.

    Args:
        around: as given by the user.
        measured: in the run, over the same links.
        work: what the run did.
    """
    steps = dict(around.step_seconds)
    steps |= {site: each for site, each in measured.step_seconds.items() if site in steps}
    around = replace(around, step_seconds=steps)
    formula = predict(work, replace(around, wiring=replace(around.wiring, step_jitter=0.0)))
    pairs = [
        (each.sync_seconds, planned.sync_seconds.likely)
        for each in measured.rounds
        for planned in formula.rounds
        if planned.rules == each.rules and planned.sync_seconds.likely > 0
    ]
    wiring = replace(around.wiring, step_jitter=measured.step_jitter)
    if pairs:
        taken, by_formula = sorted(pairs, key=lambda pair: pair[0].likely / pair[1])[len(pairs) // 2]
        beside = taken.likely - by_formula if taken.likely > _FAR * by_formula else 0.0
        factor = taken.map(lambda seconds: seconds / (by_formula + beside))
        wiring = replace(wiring, measured=factor, overhead_seconds=wiring.overhead_seconds + beside)
    return replace(around, wiring=wiring)


def compare(prediction: Prediction, measured: Measured) -> list[Comparison]:
    """A plan beside the ledger of a run."""
    slowest = max(each.likely for each in measured.step_seconds.values())
    found = [Comparison(what="an inner step", unit="s", predicted=prediction.step_seconds, measured=slowest)]
    for planned in prediction.rounds:
        for each in measured.rounds:
            if each.rules == planned.rules:
                name = ", ".join(planned.rules)
                found += [
                    Comparison(
                        what=f"bytes of a round ({name})",
                        unit="B",
                        predicted=Range.exactly(float(planned.site_bytes)),
                        measured=each.site_bytes,
                    ),
                    Comparison(
                        what=f"a sync ({name})",
                        unit="s",
                        predicted=planned.sync_seconds,
                        measured=each.sync_seconds.likely,
                    ),
                ]
    share = Comparison(
        what="utilisation", unit="", predicted=prediction.utilisation, measured=round(measured.utilisation, 4)
    )
    return [*found, share]
