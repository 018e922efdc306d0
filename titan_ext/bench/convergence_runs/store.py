"""Results on disk, one file for each finished run, so that a repeated command goes on where it was."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from titan_ext.bench.convergence_runs.methods import METHODS
from titan_ext.bench.convergence_runs.settings import Result, Run, Settings
from titan_ext.errors import UserError


class Store:
    """Finished runs of equal settings in a folder; results of other settings may lie beside them.

    Args:
        folder: made if it is not there; None keeps nothing.
        settings: those of the comparison.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, folder: Path | None, settings: Settings) -> None:
        self._folder = folder
        self._settings = settings
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot make this folder: {error.strerror}") from error

    def find(self, run: Run) -> Result | None:
        """The result of a run that was made before.

        Raises:
            UserError: its file is not one of ours.
        """
        path = self._path(run)
        if path is None or not path.exists():
            return None
        try:
            return Result(**json.loads(path.read_text(encoding="utf-8"))["result"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out {path}: not a result ({error}); remove it to have it made again") from error

    def keep(self, run: Run, result: Result) -> None:
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
        digest = run.digest(self._settings, METHODS[run.method].describe(self._settings))
        return self._folder / f"{run.method}_lr{run.lr:g}_seed{run.seed}_{digest}.json"
