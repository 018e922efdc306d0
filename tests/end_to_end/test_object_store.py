"""Checkpoints on an object store: runs resume from it bit for bit, outlive its absence, and never take half a checkpoint."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from tests.end_to_end.test_runs import one_line, own_data
from tests.object_store import S3
from titan_ext.cli import main
from titan_ext.object_store import file_system

STORE = "s3://bucket/run"
NO_LIGHTHOUSE = "http://127.0.0.1:1"
ALONE = ["--semi_sync.method=none", "--lr_scheduler.total_steps=8", "--checkpoint.enable", "--checkpoint.interval=2"]


def objects() -> list[str]:
    """All there are, by their path below the run's URL."""
    return [name.removeprefix("bucket/run/") for name in file_system(STORE).find(STORE)]


def start_alone(config: Path, *flags: str, folder: str = STORE) -> SiteRun:
    return start_site(config, "a", 1, NO_LIGHTHOUSE, *ALONE, f"--checkpoint.folder={folder}", *flags)


def run_alone(config: Path, *flags: str, folder: str = STORE) -> SiteRun:
    site = start_alone(config, *flags, folder=folder)
    site.wait()
    return site


def run_sites(folder: Path, text_corpus, layout: str, *flags: str) -> list[SiteRun]:
    ranks, parallelism = LAYOUTS[layout]
    config = write_config(folder, ["a", "b"], own_data(text_corpus), parallelism)
    flags = ("--lr_scheduler.total_steps=9", "--semi_sync.sync_every=3", "--checkpoint.interval=4", *flags)
    with lighthouse(2) as url:
        sites = [start_site(config, name, ranks, url, *flags) for name in ("a", "b")]
        for site in sites:
            assert site.wait() == [0] * ranks, site.log()[-3000:]
    return sites


def rounds_of(site: SiteRun) -> list[int]:
    lines = (site.folder / site.name / "commits.jsonl").read_text().splitlines()
    return [json.loads(line)["round"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "fsdp2"])
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_sites_resume_from_a_bucket_on_empty_disks_as_from_their_own(layout, mode, tmp_path, text_corpus, s3: S3):
    enabled = ["--checkpoint.enable", f"--checkpoint.async_mode={mode}"]
    run_sites(tmp_path / "disk", text_corpus, layout, "--training.steps=5", *enabled)
    local = run_sites(tmp_path / "disk", text_corpus, layout, "--training.steps=9", *enabled)
    enabled.append(f"--checkpoint.folder={STORE}")
    run_sites(tmp_path / "first", text_corpus, layout, "--training.steps=5", *enabled)
    stored = run_sites(tmp_path / "second", text_corpus, layout, "--training.steps=9", *enabled)
    for own, other in zip(local, stored, strict=True):
        assert other.losses() == own.losses(), "metrics.jsonl of the first disk included"
        assert other.summary()["shared_state_sha256"] == own.summary()["shared_state_sha256"]
        assert rounds_of(other) == rounds_of(own) == [1, 2, 3]
        assert not (other.folder / other.name / "checkpoint").exists()
        for name in ("metrics.jsonl", "commits.jsonl", "summary.json", "config.json"):
            copy = file_system(STORE).cat_file(f"{STORE}/{other.name}/{name}")
            assert copy == (other.folder / other.name / name).read_bytes()
    assert {name.rpartition("/")[0] for name in objects() if name.endswith(".metadata")} == {
        f"{site}/checkpoint/step-{step}" for site in "ab" for step in (4, 5, 8, 9)
    }


def test_old_checkpoints_go_and_with_them_what_failed_saves_have_left(tmp_path, text_corpus, s3: S3):
    file_system(STORE).pipe_file(f"{STORE}/a/checkpoint/step-3/__0_0.distcp", b"cut short")
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    site = run_alone(config, "--training.steps=8", "--checkpoint.keep_latest_k=2")
    assert [rank.exitcode for rank in site.ranks] == [0], site.log()[-3000:]
    assert "step-3 is passed over: its saving was cut short" in site.log()
    # The last one is saved without a look at the others, as torchtitan does.
    assert {name.split("/")[2] for name in objects() if "checkpoint" in name} == {"step-4", "step-6", "step-8"}


def until(site: SiteRun, is_so: Callable[[], bool]) -> None:
    while not is_so():
        assert site.ranks[0].is_alive(), site.log()[-3000:]
        time.sleep(0.01)


def resumed_at(site: SiteRun, earlier: int) -> int:
    return site.lines("step")[earlier]["step"] - 1


@pytest.mark.slow
def test_only_what_is_whole_is_taken(tmp_path, text_corpus, s3: S3):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    whole = run_alone(config, "--training.steps=8")
    losses, files = whole.losses(), file_system(STORE)
    assert len(losses) == 8, whole.log()[-3000:]
    files.rm_file(f"{STORE}/a/checkpoint/step-8/.metadata")
    files.pipe_file(f"{STORE}/a/checkpoint/step-6/__0_0.distcp", b"shorter")
    files.pipe_file(f"{STORE}/a/checkpoint/step-4/.metadata", b"")
    again = run_alone(config, "--training.steps=8")
    assert resumed_at(again, 8) == 2
    assert again.losses()[8:] == losses[2:]
    for step, why in ((8, "cut short"), (6, "shorter than"), (4, ".metadata cannot be read")):
        assert any(f"step-{step} is passed over" in line and why in line for line in again.log().splitlines())


@pytest.mark.slow
def test_a_site_killed_while_it_saves_goes_on_from_the_last_whole_checkpoint(tmp_path, text_corpus, s3: S3):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    straight = run_alone(config, "--training.steps=8", folder="checkpoint").losses()
    site = start_alone(write_config(tmp_path / "killed", ["a"], own_data(text_corpus, 1), {}), "--training.steps=8")
    until(site, lambda: any(name.startswith("a/checkpoint/step-4/") for name in objects()))
    os.kill(site.ranks[0].pid, signal.SIGKILL)
    site.wait()
    taken, whole = len(site.losses()), "a/checkpoint/step-4/.metadata" in objects()
    again = run_alone(tmp_path / "killed" / "run.toml", "--training.steps=8")
    assert resumed_at(again, taken) == (4 if whole else 2), again.log()[-3000:]
    assert again.losses()[taken:] == straight[4 if whole else 2 :]


def cut_after(site: SiteRun, name: str, s3: S3) -> None:
    until(site, lambda: name in objects())
    s3.cut()


@pytest.mark.slow
@pytest.mark.parametrize("seen", ["step-2/.metadata", "step-4/__0_0.distcp"], ids=["between", "within"])
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_store_that_is_away_costs_checkpoints_and_no_training(mode, seen, tmp_path, text_corpus, s3: S3):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    straight = run_alone(config, "--training.steps=8", folder="checkpoint").losses()
    config = write_config(tmp_path / "away", ["a"], own_data(text_corpus, 1), {})
    site = start_alone(config, "--training.steps=8", "--checkpoint.retry_seconds=1", f"--checkpoint.async_mode={mode}")
    cut_after(site, f"a/checkpoint/{seen}", s3)
    until(site, lambda: "is lost" in site.log())
    s3.mend()
    assert site.wait() == [0], site.log()[-3000:]
    assert site.losses() == straight
    lost = [line["text"] for line in site.lines("note") if "is lost, training goes on" in line["text"]]
    assert lost and all("s3://bucket/run/a/checkpoint/step-" in each for each in lost)
    assert "a/checkpoint/step-8/.metadata" in objects()


@pytest.mark.slow
def test_a_store_that_comes_back_in_time_costs_nothing(tmp_path, text_corpus, s3: S3):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    site = start_alone(config, "--training.steps=6")
    cut_after(site, "a/checkpoint/step-2/.metadata", s3)
    until(site, lambda: "s3://bucket is away" in site.log())
    s3.mend()
    assert site.wait() == [0], site.log()[-3000:]
    told = [line for line in site.log().splitlines() if "s3://bucket is " in line]
    assert len(told) == 2 and "is back after" in told[1], told
    assert not site.lines("note")
    assert {f"a/checkpoint/step-{step}/.metadata" for step in (2, 4, 6)} <= {*objects()}


@pytest.mark.slow
@pytest.mark.parametrize("asked_to_leave", [False, True])
def test_a_run_whose_last_checkpoint_cannot_be_saved_fails(asked_to_leave, tmp_path, text_corpus, s3: S3):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    steps = 4000 if asked_to_leave else 3
    flags = [f"--training.steps={steps}", f"--lr_scheduler.total_steps={steps}", "--checkpoint.retry_seconds=1"]
    site = start_alone(config, *flags)
    cut_after(site, "a/checkpoint/step-2/.metadata", s3)
    if asked_to_leave:
        until(site, lambda: "is lost" in site.log())
        os.kill(site.ranks[0].pid, signal.SIGTERM)
    assert site.wait() == [1], site.log()[-3000:]
    assert "s3://bucket/run/a/checkpoint/step-" in one_line(site) and "tried again for 1 s" in one_line(site)
    assert asked_to_leave or "step-3" in one_line(site)


@pytest.mark.slow
def test_a_step_a_seed_and_a_start_may_be_behind_a_url(tmp_path, text_corpus, s3: S3):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    assert run_alone(config, "--checkpoint.create_seed_checkpoint").ranks[0].exitcode == 0
    site = run_alone(config, "--training.steps=4")
    losses = site.losses()
    assert f"Loading the checkpoint from {STORE}/a/checkpoint/step-0" in site.log()
    site = run_alone(config, "--training.steps=4", "--checkpoint.load_step=2")
    assert site.losses()[4:] == losses[2:], site.log()[-3000:]
    start = f"--checkpoint.initial_load_path={STORE}/a/checkpoint/step-2"
    other = write_config(tmp_path / "other", ["a"], own_data(text_corpus, 1), {})
    flags = ["--training.steps=4", "--checkpoint.initial_load_model_only=false"]
    assert run_alone(other, start, *flags, folder="checkpoint").losses() == losses[2:]
    nothing = write_config(tmp_path / "nothing", ["a"], own_data(text_corpus, 1), {})
    site = run_alone(nothing, start.replace("step-2", "step-7"), folder="checkpoint")
    assert site.ranks[0].exitcode == 2
    assert "checkpoint.initial_load_path" in one_line(site) and "no checkpoint there" in one_line(site)


@pytest.mark.slow
def test_a_site_resumes_from_the_store_in_another_layout(tmp_path, text_corpus, s3: S3):
    def run(folder: Path, layout: str, steps: int) -> SiteRun:
        ranks, parallelism = LAYOUTS[layout]
        config = write_config(folder, ["a"], own_data(text_corpus, 1), parallelism)
        flags = [*ALONE, f"--checkpoint.folder={STORE}", f"--training.steps={steps}"]
        site = start_site(config, "a", ranks, NO_LIGHTHOUSE, *flags)
        assert site.wait() == [0] * ranks, site.log()[-3000:]
        return site

    stayed = run(tmp_path / "stayed", "tp2", 8).losses()
    files = file_system(STORE)
    for step in (6, 8):
        files.rm(f"{STORE}/a/checkpoint/step-{step}", recursive=True)
    moved = run(tmp_path / "moved", "plain", 8).losses()
    assert moved[8:] == pytest.approx(stayed[4:], rel=1e-4), "after the lines of before, which the store has"


@pytest.fixture
def refused(s3: S3) -> Iterator[None]:
    """The store asks for keys that it knows."""

    def ask(requests: str) -> None:
        address = s3.environment["AWS_ENDPOINT_URL"] + "/moto-api/reset-auth"
        urllib.request.urlopen(
            urllib.request.Request(address, requests.encode(), {"Content-Type": "text/plain"})
        ).close()

    ask("0")
    yield
    ask("inf")


def test_a_store_without_access_is_refused_before_training(tmp_path, text_corpus, refused):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    site = run_alone(config)
    assert [rank.exitcode for rank in site.ranks] == [2]
    assert "--checkpoint.folder" in one_line(site) and "no access" in one_line(site)
    assert not site.lines("step")


@pytest.mark.slow
def test_a_store_that_is_away_at_the_start_is_waited_for(tmp_path, text_corpus, s3: S3):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    s3.cut()
    site = run_alone(config, "--training.steps=2", "--checkpoint.retry_seconds=1")
    assert [rank.exitcode for rank in site.ranks] == [1], "which the launcher starts again"
    assert "tried again for 1 s" in one_line(site)
    site = start_alone(config, "--training.steps=2")
    until(site, lambda: "s3://bucket is away" in site.log())
    s3.mend()
    assert site.wait() == [0], site.log()[-3000:]


def test_check_says_what_is_wrong_with_the_place(tmp_path, text_corpus, s3: S3, capsys):
    config = str(write_config(tmp_path, ["a", "b"], own_data(text_corpus), {}))
    flags = ["check", config, f"--dump_folder={tmp_path}", "--checkpoint.enable"]
    assert main([*flags, f"--checkpoint.folder={STORE}"]) == 0
    assert "no mistakes found" in capsys.readouterr().out
    assert objects() == [], "a check writes nothing"
    assert main([*flags, "--checkpoint.folder=s3://no-such-bucket/run"]) == 2
    assert "The specified bucket does not exist" in capsys.readouterr().err
    s3.cut()
    assert main([*flags, f"--checkpoint.folder={STORE}"]) == 0
    found = capsys.readouterr().out
    assert "missing on this machine" in found and "the server cannot be reached" in found


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("s3://no-such-bucket/run", "The specified bucket does not exist"),
        ("s4://bucket/run", "no file system is known for s4://"),
        ("gs://bucket/run", "pip install gcsfs"),
    ],
)
def test_a_store_that_cannot_be_is_refused_before_training(folder, words, tmp_path, text_corpus, s3: S3):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    site = run_alone(config, folder=folder)
    assert [rank.exitcode for rank in site.ranks] == [2]
    assert "--checkpoint.folder" in one_line(site) and words in one_line(site)
    assert not site.lines("step")


def test_the_checkpoints_of_another_model_are_refused_by_their_record_on_an_empty_disk(tmp_path, text_corpus, s3: S3):
    config = write_config(tmp_path / "first", ["a"], own_data(text_corpus, 1), {})
    run_alone(config, "--training.steps=2")
    config = write_config(tmp_path / "second", ["a"], own_data(text_corpus, 1), {})
    site = run_alone(config, "--training.steps=4", "--model.norm_eps=0.01")
    assert [rank.exitcode for rank in site.ranks] == [2]
    assert "model.norm_eps" in one_line(site) and f"{STORE}/a/config.json" in one_line(site)


@pytest.mark.slow
def test_a_run_that_has_lost_its_place_to_another_ends(tmp_path, text_corpus, s3: S3):
    """The later one goes on from there, and is not written over."""
    first = write_config(tmp_path / "first", ["a"], own_data(text_corpus, 1), {})
    site = start_alone(first, "--training.steps=4000", "--lr_scheduler.total_steps=4000")
    until(site, lambda: "a/checkpoint/step-2/.metadata" in objects())
    later = run_alone(write_config(tmp_path / "second", ["a"], own_data(text_corpus, 1), {}), "--training.steps=1")
    assert site.wait() == [2], site.log()[-3000:]
    assert "has begun here and saves here now" in one_line(site) and str(tmp_path / "second") in one_line(site)
    assert [rank.exitcode for rank in later.ranks] == [0]
    assert any(str(tmp_path / "first") in line["text"] for line in later.lines("note"))
