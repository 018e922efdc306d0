"""A run of two ranks that has ended, and how to call the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from titan_ext.cli import main

STEPS, SYNC_EVERY = 4, 2

RUN = f"""
[model]
name = "abbie"
flavor = "tiny"
iterations = 2
[training]
seq_len = 64
local_batch_size = 2
steps = {STEPS}
[optimizer]
lr = 3e-3
[lr_scheduler]
warmup_steps = 1
[metrics]
enable_tensorboard = false
[parallelism]
tensor_parallel_degree = 2
data_parallel_shard_degree = 1
[checkpoint]
enable = true
interval = 1
last_save_model_only = true
last_save_in_hf = true
[semi_sync]
method = "diloco"
sync_every = {SYNC_EVERY}
[[site]]
name = "a"
data = {{ dataset = "CORPUS", split = "train", holdout_fraction = 0.1 }}
"""


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory, text_corpus) -> SiteRun:
    """A site with checkpoints of the whole state after steps 1 to 3, and Hugging Face's files after step 4."""
    folder = tmp_path_factory.mktemp("saved")
    config = folder / "run.toml"
    config.write_text(RUN.replace("CORPUS", str(text_corpus)))
    with lighthouse(1) as url:
        site = start_site(config, "a", 2, url)
        assert site.wait() == [0, 0], site.log()[-3000:]
    return site


@pytest.fixture(scope="session")
def config_file(saved_run: SiteRun) -> Path:
    return saved_run.folder / "run.toml"


@pytest.fixture
def evaluate(config_file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Calls ``titan-ext eval`` on the run; returns its last line."""

    def call(*arguments: str) -> dict[str, Any]:
        assert main(["eval", str(config_file), f"--dump_folder={config_file.parent}", *arguments]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.fixture
def refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls a command on the run that must fail; returns the one line it says."""

    def call(command: str, *arguments: str, code: int = 2) -> str:
        assert main([command, str(config_file), f"--dump_folder={config_file.parent}", *arguments]) == code
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return call
