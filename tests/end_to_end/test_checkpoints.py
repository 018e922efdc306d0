"""What a site finds when it comes back: checkpoints cut short, damaged, or of another layout and number of sites."""

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from tests.end_to_end.forked import SiteRun, lighthouse, start_ranks, start_site
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from tests.end_to_end.test_runs import one_line, own_data

ALONE = ["--semi_sync.method=none", "--lr_scheduler.total_steps=8", "--checkpoint.enable", "--checkpoint.interval=2"]
NO_LIGHTHOUSE = "http://127.0.0.1:1"


def run_alone(config: Path, *flags: str) -> SiteRun:
    site = start_site(config, "a", 1, NO_LIGHTHOUSE, *ALONE, *flags)
    site.wait()
    return site


def checkpoint(site: SiteRun, step: int) -> Path:
    return site.folder / site.name / "checkpoint" / f"step-{step}"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def data_of(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def resumed_after(site: SiteRun, earlier: int) -> int:
    """The step whose checkpoint the last run of a site went on from; ``earlier``: steps of the runs before."""
    return site.lines("step")[earlier]["step"] - 1


def test_the_latest_checkpoint_that_is_whole_is_taken(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    whole = run_alone(config, "--training.steps=8")
    losses = whole.losses()
    assert len(losses) == 8, whole.log()[-3000:]
    (checkpoint(whole, 8) / ".metadata").unlink()
    cut(data_of(checkpoint(whole, 6)))
    cut(checkpoint(whole, 4) / ".metadata")
    again = run_alone(config, "--training.steps=8")
    assert resumed_after(again, 8) == 2
    assert again.losses()[8:] == losses[2:]
    for step, reason in ((8, "cut short"), (6, "shorter than"), (4, ".metadata cannot be read")):
        assert any(f"step-{step} is passed over" in line and reason in line for line in again.log().splitlines())
    assert (checkpoint(again, 8) / ".metadata").exists()


def test_where_none_is_whole_one_line_says_what_to_do(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    site = run_alone(config, "--training.steps=2")
    folder = checkpoint(site, 2)
    data_of(folder).unlink()
    again = run_alone(config, "--training.steps=4")
    assert [rank.exitcode for rank in again.ranks] == [2]
    assert str(folder) in one_line(again) and "remove it" in one_line(again)


def limited(arguments: list[str], bytes_per_file: int) -> None:
    """A disk on which no file can grow beyond a size."""
    from titan_ext.train import main

    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, bytes_per_file))
    main(arguments)


@pytest.mark.slow
def test_a_checkpoint_without_room_ends_the_run_in_one_line(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    run_alone(config, "--training.steps=2")
    arguments = ["--config", str(config), "--site", "a", f"--dump_folder={tmp_path}", "--training.steps=8", *ALONE]
    site = start_ranks(config, "a", 1, NO_LIGHTHOUSE, limited, arguments, 2**20)
    assert site.wait() == [1], site.log()[-3000:]
    assert f"{checkpoint(site, 4)}: cannot be written (" in one_line(site) and "MiB free" in one_line(site)
    assert not checkpoint(site, 4).exists(), "what is of no use takes no room"
    taken = len(site.losses())
    again = run_alone(config, "--training.steps=4")
    assert resumed_after(again, taken) == 2


def test_logs_without_room_cost_no_training(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").symlink_to("/dev/full")
    site = run_alone(config, "--training.steps=2")
    assert [rank.exitcode for rank in site.ranks] == [0], site.log()[-3000:]
    assert f"{tmp_path}/a/metrics.jsonl: cannot be written: No space left on device; training goes on" in site.log()
    assert site.summary()["steps"] == 2 and checkpoint(site, 2).is_dir()


def holds(folder: Path, name: str) -> bool:
    """Whether the folder is there, and a file in it whose name contains ``name``."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return False
    return not name or any(name in each for each in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    "written, over_an_older_one",
    [("", False), (".distcp", False), (".metadata", False), (".distcp", True)],
    ids=["folder", "data", "metadata", "data over an older one"],
)
def test_a_checkpoint_cut_short_by_a_crash_is_never_taken(written, over_an_older_one, tmp_path, text_corpus):
    for name in ("straight", "crashed"):
        write_config(tmp_path / name, ["a"], own_data(text_corpus, 1), {})
    straight = run_alone(tmp_path / "straight" / "run.toml", "--training.steps=8").losses()
    config = tmp_path / "crashed" / "run.toml"
    site = run_alone(config, f"--training.steps={4 if over_an_older_one else 2}")
    folder = checkpoint(site, 4)
    site = start_site(config, "a", 1, NO_LIGHTHOUSE, *ALONE, "--training.steps=8", "--checkpoint.load_step=2")
    while over_an_older_one and (folder / ".metadata").exists():
        assert site.ranks[0].is_alive(), site.log()[-3000:]
    while not holds(folder, written):
        assert site.ranks[0].is_alive(), site.log()[-3000:]
    os.kill(site.ranks[0].pid, signal.SIGKILL)
    site.wait()
    whole, taken = (folder / ".metadata").exists(), len(site.losses())
    site = run_alone(config, "--training.steps=8")
    assert resumed_after(site, taken) == (4 if whole else 2)
    assert site.losses()[taken:] == straight[4 if whole else 2 :]


LAYOUT_CHANGES = [("plain", "pp2"), ("pp2", "tp2"), ("tp2", "plain"), ("fsdp2", "tp2"), ("plain", "fsdp2")]


@pytest.mark.parametrize(
    "before, now",
    [pytest.param(*each, marks=[] if each == ("pp2", "tp2") else pytest.mark.slow) for each in LAYOUT_CHANGES],
)
def test_a_site_resumes_in_another_layout(before, now, tmp_path, text_corpus):
    """Where all ranks read the same data the run is the one that went on in the old layout."""
    flags = [
        "--lr_scheduler.total_steps=8",
        "--semi_sync.sync_every=3",
        "--checkpoint.enable",
        "--checkpoint.interval=4",
    ]

    def run(folder: Path, layout: str, *more: str) -> SiteRun:
        ranks, parallelism = LAYOUTS[layout]
        config = write_config(folder, ["a"], own_data(text_corpus, 1), parallelism)
        with lighthouse(1) as url:
            site = start_site(config, "a", ranks, url, *flags, *more)
            assert site.wait() == [0] * ranks, site.log()[-3000:]
        return site

    stayed = run(tmp_path / "stayed", before, "--training.steps=8")
    (tmp_path / "moved" / "a" / "checkpoint").mkdir(parents=True)
    shutil.copytree(checkpoint(stayed, 4), tmp_path / "moved" / "a" / "checkpoint" / "step-4")
    moved = run(tmp_path / "moved", now, "--training.steps=8")
    assert [line["step"] for line in moved.lines("step")] == [5, 6, 7, 8]
    assert [line["round"] for line in moved.lines("round")] == [2]
    if "fsdp2" in (before, now):
        # Two ranks read two documents at a time where one reads one.
        assert "dp_world_size was" in moved.log()
        assert moved.losses() == pytest.approx(stayed.losses()[4:], rel=0.1)
    else:
        assert moved.losses() == pytest.approx(stayed.losses()[4:], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("share", [True, False], ids=["one corpus", "own corpora"])
def test_a_run_resumes_with_more_and_with_fewer_sites(share, tmp_path, text_corpus):
    flags = ["--lr_scheduler.total_steps=12", "--semi_sync.sync_every=3", "--checkpoint.enable"]

    def run(names: str, steps: int) -> list[SiteRun]:
        data = [f'"{text_corpus}"'] * len(names) if share else own_data(text_corpus, len(names))
        config = write_config(tmp_path, list(names), data, {})
        with lighthouse(len(names)) as url:
            sites = [start_site(config, name, 1, url, *flags, f"--training.steps={steps}") for name in names]
            for site in sites:
                assert site.wait() == [0], site.log()[-3000:]
        assert len({site.summary()["shared_state_sha256"] for site in sites}) == 1
        return sites

    run("ab", 4)
    first, _, third = run("abc", 8)
    assert first.lines("round")[-1]["participants"] == 3
    assert third.lines("step")[0]["step"] == 5, "the new site begins where the others stand"
    alone = run("a", 12)[0]
    assert [line["step"] for line in alone.lines("step")] == list(range(1, 13))
    assert [line["round"] for line in alone.lines("round")] == [1, 2, 3, 4]
