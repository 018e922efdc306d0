"""A run's life: stopping, resuming, coming late, dying, and what goes wrong at the start."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.file_runs import FileRun, train_in_turn
from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from tests.end_to_end.test_layouts import write_config
from titan_ext.data.tokenizers.bpe import train_tokenizer
from titan_ext.launcher.placement import free_port

_OVERLAP = "fragment_sync_delay = 1\nfragment_update_alpha = 0.5"


def own_data(text_corpus, count: int = 2) -> list[str]:
    return [f'{{dataset = "{text_corpus}", seed = {seed}}}' for seed in range(1, count + 1)]


@pytest.mark.parametrize(
    "settings, parallelism, ranks, fresh",
    [
        ("", {}, 1, True),
        pytest.param("", {"pipeline_parallel_degree": 2}, 2, True, marks=pytest.mark.slow),
        pytest.param(_OVERLAP, {}, 1, True, marks=pytest.mark.slow),
        (_OVERLAP, {"pipeline_parallel_degree": 2}, 2, False),
    ],
    ids=["plain", "pp2", "overlap", "overlap-pp2"],
)
def test_stop_and_resume_equals_never_stopped(tmp_path, text_corpus, parallelism, ranks, settings, fresh):
    """Bit for bit: every loss after the resume, and the hash at the end; ``fresh``: each run in new processes."""
    flags = ["--lr_scheduler.total_steps=9", "--semi_sync.sync_every=3", "--checkpoint.interval=5"]

    def run(name, *more):
        config = write_config(tmp_path / "files", ["a", "b"], own_data(text_corpus), parallelism).rename(
            tmp_path / f"{name}.toml"
        )
        config.write_text(config.read_text().replace("[replica]", f"{settings}\n[replica]"))
        return FileRun(path=config, sites=("a", "b"), flags=[*flags, *more])

    straight, stopped, resumed = (
        run("straight", "--training.steps=9"),
        run("stopped", "--training.steps=5", "--checkpoint.enable"),
        run("stopped", "--training.steps=9", "--checkpoint.enable"),
    )
    if fresh:
        (straight,) = train_in_turn([straight], tmp_path, ranks)
        train_in_turn([stopped], tmp_path, ranks)
        (resumed,) = train_in_turn([resumed], tmp_path, ranks)
    else:
        straight, _, resumed = train_in_turn([straight, stopped, resumed], tmp_path, ranks)
    for whole, halves in zip(straight, resumed):
        assert not whole.failure() and not halves.failure()
        assert [line["step"] for line in halves.lines("step")] == list(range(1, 10))
        assert halves.losses() == whole.losses()
        assert halves.summary()["shared_state_sha256"] == whole.summary()["shared_state_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ["--semi_sync.method=eager_diloco", "--semi_sync.codec=int4"],
        ["--semi_sync.method=noloco"],
        ["--semi_sync.method=sparta", "--semi_sync.sparta.sparta_fraction=0.1"],
        [
            "--semi_sync.method=lordo",
            "--optimizer.name=LowRankAdamW",
            "--optimizer.rank=8",
            "--optimizer.basis_from=outer",
        ],
        ["--semi_sync.method=mt_dao", "--optimizer.name=QHAdamW", "--semi_sync.mt_dao.second_moment_sync_every=4"],
        ["--semi_sync.method=demo", "--optimizer.name=DeMo", "--semi_sync.sync_every=1"],
        ["--semi_sync.method=muloco", "--optimizer.name=Muon", "--semi_sync.codec=topk"],
    ],
    ids=lambda flags: flags[0].rpartition("=")[2],
)
def test_methods_with_state_of_their_own_resume_bit_for_bit(tmp_path, text_corpus, method):
    flags = ["--lr_scheduler.total_steps=9", "--semi_sync.sync_every=3", "--checkpoint.interval=5", *method]

    def run(name, *more):
        config = write_config(tmp_path / name, ["a", "b"], own_data(text_corpus), {})
        with lighthouse(2) as url:
            sites = [start_site(config, site, 1, url, *flags, *more) for site in ("a", "b")]
            for site in sites:
                assert site.wait() == [0], site.log()[-3000:]
        return sites

    straight = run("straight", "--training.steps=9")
    run("stopped", "--training.steps=5", "--checkpoint.enable")
    resumed = run("stopped", "--training.steps=9", "--checkpoint.enable")
    for whole, halves in zip(straight, resumed):
        assert halves.losses() == whole.losses()
        assert halves.summary()["shared_state_sha256"] == whole.summary()["shared_state_sha256"]


def test_killed_site_returns_and_ends_with_the_others(tmp_path, text_corpus):
    """SIGKILL between two rounds: the other goes on alone, the newcomer heals and both end equal."""
    flags = ["--training.steps=60", "--semi_sync.sync_every=6", "--replica.min_sites=1"]
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), {})
    with lighthouse(1) as url:
        first = start_site(config, "a", 1, url, *flags, pause=tmp_path / "pause")
        second = start_site(config, "b", 1, url, *flags)
        wait_for(lambda: any(line["participants"] == 2 for line in first.lines("round")), first, second)
        os.kill(second.ranks[0].pid, signal.SIGKILL)
        assert second.wait() == [-signal.SIGKILL]
        alone_since = len(first.lines("round"))
        pause_alone(config, first)
        again = start_again(config, "b", 1, url, *flags)
        for site in (first, again):
            assert site.wait() == [0], site.log()[-3000:]
    assert first.summary()["shared_state_sha256"] == again.summary()["shared_state_sha256"]
    rounds = first.lines("round")
    # The round that was under way when the site was killed may have counted on it.
    assert 1 in [line["participants"] for line in rounds[alone_since : alone_since + 2]]
    assert rounds[-1]["participants"] == 2
    # It may have been late at the very beginning too.
    notes = [line["text"] for line in again.lines("note") if line["text"].startswith("joins at step")]
    assert notes[-1].endswith("the place in the data and most states of the inner optimizer, is fresh")
    # Either site may have been the first to begin, with the other joining it a round later.
    numbers = [line["round"] for line in rounds if line["committed"]]
    assert numbers == list(range(numbers[0], 11))
    steps = [line["step"] for line in first.lines("step")]
    assert steps == list(range(steps[0], 61)), "the survivor lost no inner step"


def pause_alone(config: Path, other: SiteRun) -> None:
    """Let a site wait between two steps, once it has had a round without the one that was killed."""
    wait_for(lambda: other.lines("round")[-1]["participants"] == 1, other)
    (config.parent / "pause").touch()


def start_again(config: Path, name: str, ranks: int, url: str, *flags: str) -> SiteRun:
    """Start a site that was killed; as soon as it asks for a quorum the paused one goes on, and has not trained for nothing."""
    words = "waiting for the quorum"
    before = SiteRun(name, config.parent, []).log().count(words)
    again = start_site(config, name, ranks, url, *flags)
    wait_for(lambda: again.log().count(words) > before, again)
    (config.parent / "pause").unlink()
    return again


def wait_for(condition, *sites, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(rank.is_alive() for site in sites for rank in site.ranks), "".join(
            site.log()[-2000:] for site in sites
        )
        time.sleep(0.05)


def one_line(site) -> str:
    """The line a person would see; there must be exactly one, and no traceback."""
    log = site.log()
    assert "Traceback" not in log, log[-3000:]
    lines = [line for line in log.splitlines() if line.startswith("titan-ext: error:")]
    assert len(lines) == 1, log[-3000:]
    return lines[0]


def test_no_lighthouse_is_said_with_its_address(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), {})
    address = f"http://127.0.0.1:{free_port()}"
    site = start_site(config, "a", 1, address, "--replica.lighthouse_retries=1", "--replica.connect_timeout_seconds=1")
    assert site.wait() == [1]
    line = one_line(site)
    assert address in line and "2 attempts" in line
    assert "attempt 1 of 2" in site.log()


def test_quorum_that_never_comes_ends_with_a_reason(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), {})
    with lighthouse(2) as url:
        site = start_site(config, "a", 1, url, "--replica.quorum_timeout_seconds=3")
        assert site.wait() == [1]
    assert "quorum_timeout_seconds = 3" in one_line(site) and "waiting for 2 site(s)" in one_line(site)


@pytest.mark.parametrize("key", ["semi_sync.sync_every", "training.steps"])
def test_sites_with_other_settings_are_told_which(key, tmp_path, text_corpus):
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), {})
    with lighthouse(2) as url:
        sites = [start_site(config, name, 1, url, f"--{key}={value}") for name, value in (("a", 2), ("b", 3))]
        codes = [site.wait() for site in sites]
    assert codes == [[2], [2]]
    for site in sites:
        assert f"{key} is 2 at a, 3 at b" in one_line(site) or f"{key} is 3 at b, 2 at a" in one_line(site)


def test_sites_whose_tokenizers_have_other_rows_do_not_share_embeddings(tmp_path, text_corpus):
    """Each on a machine of its own, where the same path is another tokenizer of the same size."""
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), {})
    with lighthouse(2) as url:
        sites = []
        for name in ("a", "b"):
            (tmp_path / name / "tokenizer").mkdir(parents=True)
            train_tokenizer([f"words of site {name}, {name * 3} and more"] * 20, 265, tmp_path / name / "tokenizer")
            sites.append(start_site(config, name, 1, url, f"--tokenizer={tmp_path / name / 'tokenizer'}"))
        assert [site.wait() for site in sites] == [[2], [2]]
    for site in sites:
        assert "differ in [semi_sync], model, layout or last step" in one_line(site) and "tokenizer is" in one_line(
            site
        )


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--data.dataset=no/such/folder", ["no/such/folder"]),
        ("--tensor_parallel_degree=2", ["tensor_parallel_degree", "parallelism.tensor_parallel_degree"]),
        ("--dump_folder=/proc/nothing", ["/proc/nothing", "dump_folder"]),
        ("--parallelism.tensor_parallel_degree=2", ["1 rank"]),
    ],
)
def test_bad_input_is_one_line_before_training(tmp_path, text_corpus, flag, words):
    config = write_config(tmp_path, ["a"], ['"builtin:code"'], {})
    site = start_site(config, "a", 1, "http://127.0.0.1:1", flag)
    assert site.wait() == [2], site.log()[-3000:]
    assert all(word in one_line(site) for word in words)
