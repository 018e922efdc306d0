"""Sites that are told to leave: what they save, how soon they go, and what the others do."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from tests.end_to_end.test_pairing import with_layouts
from tests.end_to_end.test_runs import own_data, wait_for
from titan_ext.launcher.processes import descendants, send

LEFT = 128 + signal.SIGTERM
# As forked.lighthouse: a site that leaves in a quorum waits so long for the others.
FLAGS = ["--replica.heartbeat_timeout_seconds=2", "--checkpoint.enable", "--checkpoint.interval=1000"]


def tell(site: SiteRun, *ranks: int, number: int = signal.SIGTERM) -> None:
    for rank in ranks or range(len(site.ranks)):
        send(site.ranks[rank].pid, number)


def has_taken(site: SiteRun, step: int):
    return lambda: any(line["step"] >= step for line in site.lines("step"))


def said(site: SiteRun) -> list[str]:
    return [line.partition("asked to leave: ")[2] for line in site.log().splitlines() if "asked to leave: " in line]


def left(site: SiteRun) -> int:
    """The step after which all ranks of the site left, saved and without complaint."""
    assert site.wait() == [LEFT] * len(site.ranks), site.log()[-3000:]
    assert "Traceback" not in site.log()
    step = site.lines("step")[-1]["step"]
    assert [(line["step"], line["saved"]) for line in site.lines("left")] == [(step, True)]
    assert said(site) == [f"saved step {step}, leaving"]
    assert (site.folder / site.name / "checkpoint" / f"step-{step}" / ".metadata").exists()
    return step


STOPS = {
    "between rounds": (2, 5, []),
    "in the quorum": (2, 8, []),
}


@pytest.mark.parametrize(
    "stop",
    [pytest.param(each, marks=[] if each == "in the quorum" else pytest.mark.slow) for each in STOPS],
)
def test_sites_that_leave_where_they_stand_resume_as_if_never_stopped(stop, tmp_path, text_corpus):
    """Bit for bit, though each site stops at a step of its own."""
    first_stop, second_stop, method = STOPS[stop]
    flags = ["--training.steps=12", "--semi_sync.sync_every=8", *FLAGS, *method]

    def start(name, url):
        config = write_config(tmp_path / name, ["a", "b"], own_data(text_corpus), {})
        return [start_site(config, site, 1, url, *flags) for site in ("a", "b")]

    with lighthouse(2) as url:
        straight = start("straight", url)
        for site in straight:
            assert site.wait() == [0], site.log()[-3000:]
    with lighthouse(2) as url:
        stopped = start("stopped", url)
        for site, step in zip(stopped, (first_stop, second_stop), strict=True):
            wait_for(has_taken(site, step), site)
            tell(site)
            assert left(site) >= step
    with lighthouse(2) as url:
        resumed = start("stopped", url)
        for site in resumed:
            assert site.wait() == [0], site.log()[-3000:]
    for whole, halves in zip(straight, resumed, strict=True):
        assert halves.losses() == whole.losses()
        assert halves.summary()["shared_state_sha256"] == whole.summary()["shared_state_sha256"]


def test_a_site_that_waits_for_the_others_leaves_at_once(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), {})
    with lighthouse(2) as url:
        site = start_site(config, "a", 1, url, *FLAGS)
        wait_for(lambda: "waiting for the quorum" in site.log(), site)
        tell(site, number=signal.SIGINT)
        assert site.wait() == [128 + signal.SIGINT], site.log()[-3000:]
    assert said(site) == ["nothing new to save, leaving"]
    assert not list((tmp_path / "a" / "checkpoint").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [("plain", "fsdp2"), ("tp2", "tp2")], ids="-".join)
def test_one_rank_takes_its_site_along_and_the_others_go_on(layouts, tmp_path, text_corpus):
    flags = ["--training.steps=300", "--semi_sync.sync_every=20", "--replica.min_sites=1", *FLAGS]
    config = with_layouts(tmp_path, text_corpus, layouts)
    with lighthouse(1) as url:
        first, second = (
            start_site(config, name, LAYOUTS[each][0], url, *flags) for name, each in zip("ab", layouts, strict=True)
        )
        wait_for(lambda: any(line["participants"] == 2 for line in first.lines("round")), first, second)
        tell(second, len(second.ranks) - 1)
        left(second)
        alone_since = len(first.lines("round"))
        again = start_site(config, "b", LAYOUTS[layouts[1]][0], url, *flags)
        for site in (first, again):
            assert site.wait() == [0] * len(site.ranks), site.log()[-3000:]
    assert first.summary()["shared_state_sha256"] == again.summary()["shared_state_sha256"]
    rounds = first.lines("round")
    # The round that was under way when the site left may have counted on it.
    assert 1 in [line["participants"] for line in rounds[alone_since : alone_since + 2]]
    assert rounds[-1]["participants"] == 2
    steps = [line["step"] for line in first.lines("step")]
    assert steps == list(range(steps[0], 301)), "the others lost no inner step"


@pytest.mark.slow
def test_loader_workers_that_are_told_too_read_on(tmp_path, text_corpus):
    flags = ["--training.steps=100000", "--semi_sync.method=none", "--data.num_workers=2", *FLAGS]
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {"data_parallel_shard_degree": 2})
    site = start_site(config, "a", 2, "http://127.0.0.1:1", *flags)
    wait_for(has_taken(site, 5), site)
    workers = [worker for rank in site.ranks for worker in descendants(rank.pid)]
    assert len(workers) >= 4
    for worker in workers:
        send(worker, signal.SIGTERM)
    tell(site)
    left(site)


@pytest.mark.slow
def test_what_is_not_to_be_saved_is_said_to_be_lost(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    site = start_site(config, "a", 1, "http://127.0.0.1:1", "--training.steps=100000", "--semi_sync.method=none")
    wait_for(has_taken(site, 3), site)
    tell(site)
    assert site.wait() == [LEFT], site.log()[-3000:]
    step = site.lines("step")[-1]["step"]
    assert said(site) == [f"step {step} is not saved (checkpoint.enable is off), leaving"]
    assert [(line["step"], line["saved"]) for line in site.lines("left")] == [(step, False)]


@pytest.mark.slow
def test_asked_again_a_site_leaves_without_its_round(tmp_path, text_corpus):
    flags = ["--training.steps=12", "--semi_sync.sync_every=4", "--replica.heartbeat_timeout_seconds=3600"]
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), {})
    with lighthouse(2) as url:
        first, second = (start_site(config, name, 1, url, *flags) for name in ("a", "b"))
        wait_for(has_taken(first, 1), first, second)
        tell(first, number=signal.SIGKILL)
        wait_for(has_taken(second, 4), second)
        tell(second)
        wait_for(lambda: tell(second) or not second.ranks[0].is_alive())
        assert second.wait() == [LEFT], second.log()[-3000:]
    assert said(second) == ["asked again, leaving"]


@contextmanager
def launched(folder: Path, text_corpus: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, list[SiteRun]]]:
    """A launch of a site of one rank and of one with two, as from a terminal; the sites are known by their files alone."""
    config = with_layouts(folder, text_corpus, ("plain", "fsdp2"))
    command = [sys.executable, "-m", "titan_ext", "launch", str(config), f"--dump_folder={folder}", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        try:
            yield launcher, [SiteRun(name, folder, []) for name in ("a", "b")]
        finally:
            launcher.kill()


def ranks_of(launcher: subprocess.Popen, name: str) -> list[int]:
    found = []
    for pid in descendants(launcher.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        # torchrun and the guard are named by what they run, too.
        if words[2:4] == [b"-m", b"titan_ext.train"] and words[words.index(b"--site") + 1] == name.encode():
            found.append(pid)
    return found


@pytest.mark.slow
def test_ctrl_c_at_the_launcher_saves_every_site(tmp_path, text_corpus):
    with launched(tmp_path, text_corpus, "--training.steps=100000", *FLAGS) as (launcher, sites):
        for site in sites:
            wait_for(has_taken(site, 5))
        launcher.send_signal(signal.SIGINT)
        out, _ = launcher.communicate()
    assert launcher.returncode == 130 and "Traceback" not in out
    for site in sites:
        step = site.lines("step")[-1]["step"]
        assert [(line["step"], line["saved"]) for line in site.lines("left")] == [(step, True)]
        assert f"{site.name}  left after step {step}, which is saved" in out
        assert (tmp_path / site.name / "checkpoint" / f"step-{step}" / ".metadata").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_site_that_loses_a_rank_is_restarted_whole_and_rejoins(number, tmp_path, text_corpus):
    flags = ["--training.steps=400", "--semi_sync.sync_every=20", "--replica.min_sites=1", *FLAGS]
    with launched(tmp_path, text_corpus, *flags) as (launcher, sites):
        wait_for(lambda: any(line["participants"] == 2 for line in sites[0].lines("round")))
        before = ranks_of(launcher, "b")
        assert len(before) == 2
        send(before[1], number)
        wait_for(lambda: len(ranks_of(launcher, "b")) == 2 and not {*before} & {*ranks_of(launcher, "b")})
        out, _ = launcher.communicate()
    assert launcher.returncode == 0, out[-3000:]
    lost = "titan-ext: error: rank 1 was ended by SIGKILL, maybe for want of memory"
    fate = "left, as it was asked to" if number == signal.SIGTERM else lost
    assert f"b: {fate}; restart 1 of 3" in out
    assert "all 2 sites hold the same shared state" in out
    assert sites[0].lines("round")[-1]["participants"] == 2
    steps = [line["step"] for line in sites[0].lines("step")]
    assert steps == list(range(steps[0], 401))
