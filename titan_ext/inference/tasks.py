"""Tasks of lm-evaluation-harness, from data that is on this machine."""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_ext.errors import UserError, nearest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from titan_ext.inference.harness import HarnessModel


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of a task."""

    task: str
    metric: str
    """The harness's name, such as "acc" or "acc_norm"."""
    value: float
    examples: int


def prepare_harness() -> None:
    """Call before anything imports Hugging Face's libraries: data is to come from this machine, not from their hub.

    Raises:
        UserError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: needs lm-evaluation-harness; install it with pip install lm-eval")
    # These libraries read them when they are imported, and the harness has no other switch.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ[name] = "1"


class Tasks:
    """Tasks whose data has been found.

    Args:
        names: the harness's names of tasks or of groups of them.
        folder: holds tasks of the user's own, a YAML file each; None: only those that the harness brings.
        limit: examples of each task at most; None: all.

    Raises:
        UserError: an unknown task, or one whose data is not on this machine.
    """

    def __init__(self, names: Sequence[str], folder: Path | None, limit: int | None) -> None:
        if folder is not None and not folder.is_dir():
            raise UserError(f"--task-folder {folder}: no such folder")
        self._names, self._limit = list(names), limit
        with _quiet():
            self._manager = _manager(names, folder)
            for name in names:
                _check(self._manager, name)

    def score(self, model: "HarnessModel") -> list[Score]:
        """Run all tasks without examples in the prompt, unless a task asks for some."""
        from lm_eval.evaluator import simple_evaluate

        with _quiet():
            found = simple_evaluate(
                model=model,
                tasks=self._names,
                task_manager=self._manager,
                limit=self._limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        counts = found["n-samples"]
        return [
            Score(task, metric, value, counts[task]["effective"])
            for task, figures in found["results"].items()
            if task in counts
            for metric, value in _metrics(figures)
        ]


def _metrics(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The harness's "name,filter" keys without those of standard errors."""
    for key, value in figures.items():
        name = key.partition(",")[0]
        if isinstance(value, float) and not name.endswith("_stderr"):
            yield name, value


def _manager(names: Sequence[str], folder: Path | None) -> "TaskManager":
    """One that knows the harness's own tasks, of which there are thousands, only where they are asked for."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(own.match_tasks([name]) for name in names):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _check(manager: "TaskManager", name: str) -> None:
    if not manager.match_tasks([name]):
        close = nearest(name, manager.all_tasks)
        raise UserError(f"--tasks {name}: unknown task" + (f"; did you mean {close!r}?" if close else ""))
    try:
        manager.load([name])
    except Exception as error:  # each task's loader has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--tasks {name}: its data is not on this machine ({reason}); bring it into the cache of Hugging Face's "
            "datasets library, or describe data of yours by a YAML file in --task-folder"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mute the harness's progress; warnings stay."""
    names = ("lm_eval", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
