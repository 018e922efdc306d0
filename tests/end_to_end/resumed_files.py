"""One site's run taken up in many ways, one after the other in one process: each costs its training and no start."""

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.end_to_end.forked import agent_store
from titan_ext.errors import RunError, UserError


def _leave(folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """A way to go on."""

    flags: tuple[str, ...] = ()
    """``{folder}`` in them is that of all ways."""
    prepare: Callable[[Path], None] = _leave
    """What happens to the site's folder before."""


def resume_in_ways(config: Path, first: list[str], cases: Mapping[str, Case], folder: Path) -> None:
    """Train the file's only site with the flags ``first``, then go on from there in every way.

    Leaves ``<folder>/found.json``: by case the error, or the notes and the inner steps with their losses.
    """
    import torchtitan.trainer
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from titan_ext.train import _train

    torchtitan.trainer.time = SimpleNamespace(sleep=lambda seconds: None, perf_counter=time.perf_counter)

    def train(dump: Path, flags: list[str]) -> str:
        _clear_sharding_prop_cache()
        store = agent_store()
        os.environ["MASTER_PORT"] = str(store.port)
        try:
            _train(str(config), None, [*flags, f"--dump_folder={dump}"])
        except Exception as error:  # noqa: BLE001 - told to the test
            if not isinstance(error, (UserError, RunError)):
                traceback.print_exc()
            return f"{type(error).__name__}: {error}"
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return ""

    name = "a"
    assert train(folder / "first", first) == ""
    found: dict[str, Any] = {}
    for case, way in cases.items():
        dump = folder / case
        shutil.copytree(folder / "first", dump, symlinks=True)
        before = len((dump / name / "metrics.jsonl").read_text().splitlines())
        way.prepare(dump / name)
        error = train(dump, [*first, *(flag.format(folder=folder) for flag in way.flags)])
        metrics = dump / name / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()[before:]]
        found[case] = {
            "error": error,
            "notes": [line["text"] for line in lines if line["kind"] == "note"],
            "losses": {line["step"]: line["loss"] for line in lines if line["kind"] == "step"},
        }
        (folder / "found.json").write_text(json.dumps(found))
    os._exit(0)
