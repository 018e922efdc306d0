"""All runs of a comparison, taken from the store or trained now."""

from collections.abc import Iterator, Mapping, Sequence

from titan_ext.experiments.convergence.settings import Result, Run
from titan_ext.experiments.progress import Progress
from titan_ext.experiments.store import Store
from titan_ext.experiments.team import Team
from titan_ext.experiments.tuning import missing_runs


def compare(grids: Mapping[str, Sequence[float]], seeds: int, store: Store, team: Team) -> dict[Run, Result]:
    """Tune each method over its learning rates, then run its best one on all seeds.

    Raises:
        UserError: a kept result cannot be read.
        RunError: a process failed.
    """
    progress = Progress(sum(len(grid) + seeds - 1 for grid in grids.values()), team.workers)
    done: dict[Run, Result] = {}
    while wanted := missing_runs(grids, seeds, done):
        for count, (run, result, reused) in enumerate(_results(wanted, store, team), start=1):
            done[run] = result
            progress.tell(run, result, len(wanted) - count, reused=reused)
    return done


def _results(wanted: Sequence[Run], store: Store, team: Team) -> Iterator[tuple[Run, Result, bool]]:
    """Each run's result, and whether it was there before."""
    lacking = []
    for run in wanted:
        result = store.find(run)
        if result is None:
            lacking.append(run)
        else:
            yield run, result, True
    for run, result in team.train(lacking) if lacking else ():
        store.keep(run, result)
        yield run, result, False
