"""What Weights & Biases is told of a site, and of a site that comes back."""

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from titan_ext.trainer.metrics import MetricsProcessor

VARIABLES = ("WANDB_RUN_NAME", "WANDB_RUN_GROUP", "WANDB_RUN_ID", "WANDB_RESUME")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The runs that were begun at W&B: the arguments, and the variable that W&B itself reads."""
    runs: list[dict] = []
    wandb = ModuleType("wandb")
    wandb.run = None
    wandb.init = lambda **options: runs.append(options | {"resume": os.environ.get("WANDB_RESUME")})
    wandb.log = lambda metrics, step: None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    return runs


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """A site's process, with the variables that its user has set."""
    dims = SimpleNamespace(pp_enabled=False, world_size=1, pp=1, non_data_parallel_size=1)
    with monkeypatch.context() as environment:
        for name in VARIABLES:
            environment.setenv(name, variables.get(name, ""))
            if name not in variables:
                environment.delenv(name)
        MetricsProcessor.Config(enable_wandb=True).build(parallel_dims=dims, dump_folder=str(folder)).close()


def test_sites_of_a_run_are_told_apart_and_grouped(tmp_path, monkeypatch, started):
    for site in ("east", "west"):
        start(tmp_path / "demo" / site, monkeypatch)
    assert [run["name"] for run in started] == ["demo/east", "demo/west"]
    assert {run["group"] for run in started} == {"demo"}
    assert started[0]["id"] != started[1]["id"]


def test_a_site_that_comes_back_goes_on_with_its_curve(tmp_path, monkeypatch, started):
    for _ in range(2):
        start(tmp_path / "demo" / "east", monkeypatch)
    assert started[0]["id"] == started[1]["id"] and started[1]["resume"] == "allow"


def test_what_the_user_set_stays(tmp_path, monkeypatch, started):
    start(tmp_path / "demo" / "east", monkeypatch, WANDB_RUN_NAME="mine", WANDB_RUN_ID="abc")
    assert (started[0]["name"], started[0]["id"], started[0]["resume"]) == ("mine", "abc", None)
