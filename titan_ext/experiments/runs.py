"""Training runs: what identifies one, where its result is kept, and the processes that train the missing ones."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import inf, isfinite
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar, cast

from titan_ext import __version__
from titan_ext.bench.workers import WorkerGroup
from titan_ext.errors import RunError, UserError
from titan_ext.experiments.tuning import Run, missing_runs
from titan_ext.files import write_whole


class RunResult(Protocol):
    """What every reproduction's ``Result`` has: a dataclass of JSON values with these attributes."""

    @property
    def tokens_sha256(self) -> str:
        """Hash of all that was trained on, in order."""

    @property
    def seconds(self) -> float:
        """What the run took."""

    @property
    def loss(self) -> float:
        """What learning rates are tuned by; infinite for a run that diverged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BySite:
    """What a result has whose loss is that of several sites."""

    losses: list[float | None]
    """Of each site on held-out text of its language, nats a byte token; None where the run diverged."""

    @property
    def loss(self) -> float:
        """Mean over the sites; infinite for a run that diverged."""
        known = [loss for loss in self.losses if loss is not None]
        return sum(known) / len(known) if len(known) == len(self.losses) else inf


R = TypeVar("R", bound=RunResult)
W = TypeVar("W", bound=Hashable)


class ResultStore(Generic[R]):
    """Results of finished runs in a folder, a file each, so that a repeated command goes on where it was.

    Results of other settings may lie in the same folder: a file's name has a hash of all that the run depends on.

    Args:
        folder: made if it is not there; None keeps nothing.
        settings: of all runs, a dataclass.
        result_type: a dataclass of JSON values.
        describe: what else a run of a method depends on, as JSON values.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(
        self, folder: Path | None, settings: Any, result_type: type[R], describe: Callable[[str], object]
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._result_type = result_type
        self._describe = describe
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot make this folder: {error.strerror}") from error

    def find(self, run: Run) -> R | None:
        """The kept result of a run.

        Raises:
            UserError: its file is not one of ours.
        """
        path = self._path(run)
        if path is None or not path.exists():
            return None
        try:
            return self._result_type(**json.loads(path.read_text(encoding="utf-8"))["result"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out {path}: not a result ({error}); remove it to have it made again") from error

    def keep(self, run: Run, result: R) -> None:
        """Write a result, whole or not at all."""
        path = self._path(run)
        if path is None:
            return
        content = {"run": asdict(run), "settings": asdict(self._settings), "result": asdict(cast(Any, result))}
        write_whole(path, json.dumps(content, indent=1))

    def _path(self, run: Run) -> Path | None:
        if self._folder is None:
            return None
        depends_on = [__version__, asdict(run), asdict(self._settings), self._describe(run.method)]
        digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:12]
        return self._folder / f"{run.method}_lr{run.lr:g}_seed{run.seed}_{digest}.json"


def check_tokens(done: Mapping[Run, RunResult]) -> None:
    """Make sure that all runs of a seed were trained on the same tokens.

    Raises:
        RunError: two were not. Only results that an earlier command kept can differ.
    """
    by_seed: dict[int, str] = {}
    for run, result in done.items():
        whole = isfinite(result.loss)  # a run that diverged may have seen the first of them only
        if whole and by_seed.setdefault(run.seed, result.tokens_sha256) != result.tokens_sha256:
            raise RunError(
                f"{run.method}, seed {run.seed}: trained on other tokens than the runs before it; the corpus has "
                "changed since results were kept in --out: use another folder"
            )


class RunPool:
    """Processes that each train one run at a time.

    Use it as a context manager: the processes start with the first run and end with the ``with`` block.

    Args:
        train: called in a process as ``train(*arguments, run)``; returns a result. Importable by name.
        arguments: the same for all runs.
        workers: how many processes.
        threads: threads that torch may compute with in each.
    """

    def __init__(self, train: Callable[..., Any], arguments: tuple, workers: int, threads: int) -> None:
        self.workers = workers
        self._arguments = (train, arguments, threads)
        self._idle: SimpleQueue[WorkerGroup] = SimpleQueue()
        self._stack = ExitStack()
        self._started = False

    def __enter__(self) -> "RunPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def train(self, runs: Iterable[W]) -> Iterator[tuple[W, Any]]:
        """Train runs; yields each with its result as it ends.

        Raises:
            RunError: a process failed.
        """
        self._start()
        pool = ThreadPoolExecutor(self.workers)
        futures = [pool.submit(self._train, run) for run in runs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            # Not waited for: after Ctrl-C the threads end when their processes do.
            pool.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        if not self._started:
            for _ in range(self.workers):
                self._idle.put(self._stack.enter_context(WorkerGroup(_Trainer, [self._arguments])))
            self._started = True

    def _train(self, run: W) -> tuple[W, Any]:
        worker = self._idle.get()
        try:
            return run, worker.call("train", run)[0]
        finally:
            self._idle.put(worker)


class _Trainer:
    """What a process of the pool holds."""

    def __init__(self, train: Callable[..., Any], arguments: tuple, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.train = partial(train, *arguments)


def run_all(grids: Mapping[str, Sequence[float]], seeds: int, store: ResultStore[R], pool: RunPool) -> dict[Run, R]:
    """Tune each method over its learning rates, then run it at its best one with all seeds.

    Args:
        grids: ascending learning rates by method.
        seeds: runs at the best rate.
        store: results that are there are not made again.
        pool: trains the others.

    Raises:
        UserError: a kept result cannot be read.
        RunError: a process failed.
    """
    progress = _Progress(sum(len(grid) + seeds - 1 for grid in grids.values()), pool.workers)
    done: dict[Run, R] = {}
    while wanted := missing_runs(grids, seeds, done):
        for count, (run, result, reused) in enumerate(_results(wanted, store, pool), start=1):
            done[run] = result
            progress.report(run, result, len(wanted) - count, reused=reused)
    return done


def _results(wanted: Sequence[Run], store: ResultStore[R], pool: RunPool) -> Iterator[tuple[Run, R, bool]]:
    """Each run's result, and whether it was there before."""
    lacking = []
    for run in wanted:
        result = store.find(run)
        if result is None:
            lacking.append(run)
        else:
            yield run, result, True
    for run, result in pool.train(lacking) if lacking else ():
        store.keep(run, result)
        yield run, result, False


@dataclass(slots=True)
class _Progress:
    """Prints a line to stderr for each run that ends, with the time that the rest will take."""

    planned: int
    """Runs at least; widening a grid adds to them."""
    workers: int
    started: float = 0.0
    done: int = 0
    trained: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.perf_counter()

    def report(self, run: Run, result: RunResult, waiting: int, *, reused: bool) -> None:
        """A run has ended, and at least ``waiting`` are to come."""
        self.done += 1
        if not reused:
            self.trained, self.seconds = self.trained + 1, self.seconds + result.seconds
        self.planned = max(self.planned, self.done + waiting)
        how = "found in --out" if reused else f"{result.seconds:.0f} s, {self._times()}"
        name = f"{run.method}, lr {run.lr:g}, seed {run.seed}"
        print(f"[{self.done}/{self.planned}] {name}: loss {result.loss:.4f} ({how})", file=sys.stderr, flush=True)

    def _times(self) -> str:
        left = (self.planned - self.done) * self.seconds / self.trained / self.workers
        return f"elapsed {_clock(time.perf_counter() - self.started)}, left about {_clock(left)}"


def _clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"
