"""Results on disk, one file for each finished run, so that a repeated command goes on where it was."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, Generic, TypeVar

from titan_ext.errors import RunError, UserError
from titan_ext.experiments.convergence.settings import Run

R = TypeVar("R")


class Store(Generic[R]):
    """Finished runs of equal settings in a folder; results of other settings may lie beside them.

    Args:
        folder: made if it is not there; None keeps nothing.
        settings: those of all runs, a dataclass.
        result_type: a dataclass of JSON values.
        describe: what else a run of a method depends on, as JSON values.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(
        self, folder: Path | None, settings: object, result_type: type[R], describe: Callable[[str], object]
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
        """The result of a run that was made before.

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
        content = {"run": asdict(run), "settings": asdict(self._settings), "result": asdict(result)}
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(draft, path)

    def _path(self, run: Run) -> Path | None:
        if self._folder is None:
            return None
        digest = run.digest(self._settings, self._describe(run.method))
        return self._folder / f"{run.method}_lr{run.lr:g}_seed{run.seed}_{digest}.json"


def check_tokens(done: Mapping[Run, Any]) -> None:
    """Make sure that all runs of a seed saw the same tokens, by ``tokens_sha256`` of their results.

    Raises:
        RunError: two did not, which only results of another time can have.
    """
    by_seed: dict[int, str] = {}
    for run, result in done.items():
        whole = isfinite(result.loss)  # a run that diverged may have seen the first of them only
        if whole and by_seed.setdefault(run.seed, result.tokens_sha256) != result.tokens_sha256:
            raise RunError(
                f"{run.method}, seed {run.seed}: trained on other tokens than the runs before it; the corpus has "
                "changed since results were kept in --out: use another folder"
            )
