"""Sites whose nodes have disks of their own: each holds a part of every checkpoint."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.end_to_end.forked import lighthouse, start_ranks
from tests.end_to_end.test_layouts import write_config
from tests.end_to_end.test_runs import one_line, own_data

FLAGS = ["--lr_scheduler.total_steps=8", "--checkpoint.enable", "--semi_sync.sync_every=2"]


def on_disks_of_their_own(arguments: list[str], folder: Path) -> None:
    """Ranks on two nodes that share no disk."""
    from titan_ext.train import main

    os.environ["LOCAL_WORLD_SIZE"] = "1"
    main([*arguments, f"--dump_folder={folder / os.environ['RANK']}"])


def run_on_two_disks(folder: Path, config: Path, *flags: str):
    """Train site a of two nodes; its lines are at the first one's disk."""
    arguments = ["--config", str(config), "--site", "a", *FLAGS, *flags]
    with lighthouse(1) as url:
        site = start_ranks(config, "a", 2, url, on_disks_of_their_own, arguments, folder)
        codes = site.wait()
    return codes, replace(site, folder=folder / "0"), site.log()


@pytest.mark.parametrize(
    "resumed_as", [{}, pytest.param({"tensor": 2}, marks=pytest.mark.slow), pytest.param({"pipeline": 2}, marks=pytest.mark.slow)],
    ids=str,
)  # fmt: skip
def test_nodes_with_disks_of_their_own_save_halves_and_resume_from_them(resumed_as, tmp_path, text_corpus):
    """With the same layout bit for bit; with another one from the other node's half too."""
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {"data_parallel_shard_degree": 2})
    flags = ["--training.steps=5", "--checkpoint.interval=3"]
    codes, straight, log = run_on_two_disks(tmp_path / "straight", config, *flags)
    assert codes == [0, 0], log[-3000:]
    halves = [tmp_path / "straight" / rank / "a" / "checkpoint" / "step-3" for rank in "01"]
    assert [{path.name for path in half.iterdir()} for half in halves] == [
        {".metadata", "__0_0.distcp"},
        {"__1_0.distcp"},
    ]
    for rank, half in enumerate(halves):
        (tmp_path / "resumed" / str(rank) / "a" / "checkpoint").mkdir(parents=True)
        shutil.copytree(half, tmp_path / "resumed" / str(rank) / "a" / "checkpoint" / "step-3")
    if resumed_as:
        flags.append("--parallelism.data_parallel_shard_degree=1")
    degrees = [f"--parallelism.{axis}_parallel_degree={degree}" for axis, degree in resumed_as.items()]
    codes, resumed, log = run_on_two_disks(tmp_path / "resumed", config, *flags, *degrees)
    assert codes == [0, 0], log[-3000:]
    losses = [
        line["loss"] for rank in "01" for line in replace(resumed, folder=tmp_path / "resumed" / rank).lines("step")
    ]
    if not resumed_as:
        assert losses == straight.losses()[3:]
        assert "nodes of this site have disks of their own" in resumed.lines("note")[0]["text"]
    else:
        assert len(losses) == 2


@pytest.mark.slow
def test_half_of_a_checkpoint_is_damaged_in_one_line(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {"data_parallel_shard_degree": 2})
    codes, _, log = run_on_two_disks(tmp_path, config, "--training.steps=2", "--checkpoint.last_save_model_only=false")
    assert codes == [0, 0], log[-3000:]
    shutil.rmtree(tmp_path / "1")
    for path in tmp_path.glob("rank_*"):
        path.unlink()
    codes, site, _ = run_on_two_disks(tmp_path, config, "--training.steps=4")
    assert codes == [2, 2]
    assert "step-2 is damaged" in one_line(replace(site, folder=tmp_path))
