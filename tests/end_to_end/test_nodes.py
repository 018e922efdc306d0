"""Sites of several nodes, each node with an agent of its own, as `titan-ext launch` starts them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from tests.end_to_end.test_layouts import write_config
from tests.end_to_end.test_runs import own_data, wait_for
from titan_ext.launcher.placement import free_port
from titan_ext.launcher.processes import descendants

# Several starts of several launchers each: minutes where others use the machine too.
pytestmark = pytest.mark.timeout(1200)

FSDP = {"data_parallel_shard_degree": 2}
TENSOR_AND_PIPELINE = {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2}


def command(config: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "titan_ext", "launch", str(config), *flags]


def rehearse(config: Path, folder: Path, *flags: str, names: str = "ab") -> list[SiteRun]:
    """The sites of a file with two nodes each, to their end."""
    ended = subprocess.run(
        command(config, "--local-nodes=2", f"--dump_folder={folder}", *flags), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    same = "all 2 sites hold the same shared state" if len(names) > 1 else "shared state sha256"
    assert same in ended.stdout
    return [SiteRun(name, folder, []) for name in names]


@pytest.mark.parametrize(
    ("parallelism", "ranks", "names"),
    [
        pytest.param(FSDP, 2, "a", id="fsdp2, one site", marks=pytest.mark.slow),
        pytest.param(FSDP, 2, "ab", id="fsdp2", marks=pytest.mark.slow),
        pytest.param(TENSOR_AND_PIPELINE, 4, "ab", id="tp2-pp2", marks=pytest.mark.slow),
    ],
)
def test_sites_of_two_nodes_train_as_sites_of_one(parallelism, ranks, names, tmp_path, text_corpus):
    flags = ["--semi_sync.method=diloco"]  # for a single site, too
    config = write_config(tmp_path, list(names), own_data(text_corpus, len(names)), parallelism)
    with lighthouse(len(names)) as url:
        on_one_node = [start_site(config, name, ranks, url, *flags) for name in names]
        for site in on_one_node:
            assert site.wait() == [0] * ranks, site.log()[-3000:]
    on_two = rehearse(config, tmp_path / "nodes", *flags, names=names)
    for one, two in zip(on_one_node, on_two, strict=True):
        assert two.losses() == one.losses()
        assert two.summary()["shared_state_sha256"] == one.summary()["shared_state_sha256"]
        for name in ("log.txt", "log_node1.txt"):
            assert "Training completed" in (two.folder / two.name / name).read_text()


@pytest.mark.slow
def test_sites_of_nodes_resume_as_if_never_stopped(tmp_path, text_corpus):
    flags = ["--lr_scheduler.total_steps=9", "--semi_sync.sync_every=3", "--checkpoint.interval=5"]
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), FSDP)
    straight = rehearse(config, tmp_path / "straight", *flags, "--training.steps=9")
    for steps in (5, 9):
        resumed = rehearse(config, tmp_path / "halves", *flags, f"--training.steps={steps}", "--checkpoint.enable")
    for whole, halves in zip(straight, resumed, strict=True):
        assert halves.losses() == whole.losses()
        assert halves.summary()["shared_state_sha256"] == whole.summary()["shared_state_sha256"]


@contextmanager
def started(*commands: list[str]) -> Iterator[list[subprocess.Popen]]:
    launchers = [
        subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for each in commands
    ]
    try:
        yield launchers
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.stdout.close()


def agent(launcher: subprocess.Popen, site: str, node: int) -> int:
    """The process of torchrun at one node of a site."""
    for pid in descendants(launcher.pid):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if words[1:3] != ["-m", "titan_ext.launcher.torchrun"]:
            continue
        if (words[words.index("--site") + 1], words[words.index("--node-rank") + 1]) == (site, str(node)):
            return pid
    raise AssertionError(f"no agent of site {site}, node {node}")


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_a_site_that_loses_a_node_comes_back_and_the_other_trains_on(node, tmp_path, text_corpus):
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), FSDP)
    flags = ["--training.steps=400", "--semi_sync.sync_every=20", "--replica.min_sites=1", "--checkpoint.enable"]
    a, b = (SiteRun(name, tmp_path, []) for name in "ab")
    with started(command(config, "--local-nodes=2", f"--dump_folder={tmp_path}", *flags)) as (launcher,):
        wait_for(lambda: any(line["participants"] == 2 for line in a.lines("round")))
        os.kill(agent(launcher, "b", node), signal.SIGKILL)
        out, _ = launcher.communicate()
    assert launcher.returncode == 0, out[-3000:]
    assert out.count("restart 1 of 3") == 2 and "restart 2" not in out
    assert "all 2 sites hold the same shared state" in out
    assert [line["step"] for line in a.lines("step")] == list(range(1, 401)), "the other site lost no inner step"
    assert a.lines("round")[-1]["participants"] == 2 and b.lines("step")[-1]["step"] == 400


def node_commands(config: Path, url: str, *flags: str) -> list[list[str]]:
    """One command for each of two nodes that share no disk."""
    where = f"127.0.0.1:{free_port()}"
    return [
        command(config, "--only=a", "--nodes=2", f"--lighthouse={url}", f"--node-rank={node}", f"--rendezvous={where}")
        + [f"--dump_folder={config.parent / f'disk{node}'}", *flags]
        for node in range(2)
    ]


@pytest.mark.slow
def test_one_command_a_node_on_disks_of_their_own(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), FSDP)
    for steps in (3, 6):
        flags = [f"--training.steps={steps}", "--lr_scheduler.total_steps=6", "--checkpoint.enable"]
        flags += ["--checkpoint.last_save_model_only=false"]
        with lighthouse(1) as url, started(*node_commands(config, url, *flags)) as launchers:
            ends = [launcher.communicate()[0] for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], ends
    assert [line["step"] for line in SiteRun("a", tmp_path / "disk0", []).lines("step")] == [1, 2, 3, 4, 5, 6]
    halves = [{path.name for path in (tmp_path / f"disk{node}" / "a").iterdir()} for node in range(2)]
    assert {"metrics.jsonl", "summary.json", "config.json", "log.txt"} <= halves[0]
    assert not {"metrics.jsonl", "summary.json", "config.json", "log.txt"} & halves[1] and "log_node1.txt" in halves[1]
    assert "shared state sha256" in ends[0] and "this node has ended well" in ends[1]


@pytest.mark.slow
def test_bad_input_that_the_ranks_find_ends_every_node_in_its_line(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), FSDP)
    with lighthouse(1) as url:
        first, second = node_commands(config, url)
        second += ["--checkpoint.enable", "--checkpoint.last_save_in_hf"]
        first += ["--checkpoint.enable", "--checkpoint.last_save_in_hf"]
        with started(first, second) as launchers:
            ends = [launcher.communicate()[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [2, 2], ends
    for out in ends:
        assert "checkpoint.last_save_in_hf = true: the nodes of the site have disks of their own" in out
        assert "Traceback" not in out and "restart" not in out
    assert json.loads((tmp_path / "disk0" / "a" / "config.json").read_text())["site"][0]["nodes"] == 2
