"""A site on an empty disk, with no checkpoint of its own, takes the shared state from another site's checkpoint."""

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from tests.end_to_end.test_object_store import until
from tests.end_to_end.test_runs import one_line, own_data
from tests.object_store import S3
from titan_ext.object_store import file_system

STORE = "s3://bucket/run"
FLAGS = ["--lr_scheduler.total_steps=8", "--checkpoint.enable", "--checkpoint.interval=2", "--replica.min_sites=1"]
HEALS = "--replica.heal_from_checkpoints"


def run(folder: Path, text_corpus, names: str, steps: int, *flags: str, layout: str = "plain") -> list[SiteRun]:
    ranks, parallelism = LAYOUTS[layout]
    config = write_config(folder, list("ab"), own_data(text_corpus), parallelism)
    with lighthouse(len(names)) as url:
        sites = [start_site(config, name, ranks, url, *FLAGS, f"--training.steps={steps}", *flags) for name in names]
        for site in sites:
            site.wait()
    return sites


def trained(*arguments, **keywords) -> list[SiteRun]:
    sites = run(*arguments, **keywords)
    for site in sites:
        assert not any(rank.exitcode for rank in site.ranks), site.log()[-3000:]
    return sites


def notes(site: SiteRun) -> str:
    return " ".join(line["text"] for line in site.lines("note"))


@pytest.mark.slow
def test_a_site_alone_takes_it_from_the_store_and_the_other_comes_back_to_it(tmp_path, text_corpus, s3: S3):
    store = f"--checkpoint.folder={STORE}"
    first = trained(tmp_path / "first", text_corpus, "ab", 4, store)
    file_system(STORE).rm(f"{STORE}/b", recursive=True)
    (alone,) = trained(tmp_path / "alone", text_corpus, "b", 4, store, HEALS)
    assert f"the shared state of {STORE}/a/checkpoint/step-4" in notes(alone)
    assert alone.summary()["shared_state_sha256"] == first[0].summary()["shared_state_sha256"]
    assert alone.lines("step") == [] and alone.summary()["steps"] == 4
    (alone,) = trained(tmp_path / "on", text_corpus, "b", 6, store, HEALS)
    assert [line["step"] for line in alone.lines("step")] == [5, 6]
    a, b = trained(tmp_path / "both", text_corpus, "ab", 8, store, HEALS)
    assert notes(b).count("the shared state of") == notes(alone).count("the shared state of"), "its own is there now"
    assert [line["step"] for line in b.lines("step")] == [5, 6, 7, 8]
    assert [line["step"] for line in a.lines("step")] == [1, 2, 3, 4, 7, 8]
    assert b.lines("round")[-1]["participants"] == 2
    assert a.summary()["shared_state_sha256"] == b.summary()["shared_state_sha256"]


OTHER_METHODS = [
    pytest.param("plain", ["--semi_sync.method=diloco"]),
    pytest.param("fsdp2", ["--semi_sync.method=diloco", "--semi_sync.num_fragments=2"], marks=pytest.mark.slow),
    pytest.param("plain", ["--semi_sync.method=local_adam"], marks=pytest.mark.slow),
    pytest.param("fsdp2", ["--semi_sync.pairing=leader"], marks=pytest.mark.slow),
    pytest.param("pp2", ["--semi_sync.method=local_sgd"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "flags"), OTHER_METHODS)
def test_sites_that_share_a_disk_begin_together_where_one_has_a_checkpoint(layout, flags, tmp_path, text_corpus):
    first = trained(tmp_path, text_corpus, "ab", 4, *flags, layout=layout)
    agreed = first[0].summary()["shared_state_sha256"]
    shutil.rmtree(tmp_path / "b")
    (alone,) = trained(tmp_path, text_corpus, "b", 4, *flags, HEALS, layout=layout)
    assert alone.summary()["shared_state_sha256"] == agreed
    shutil.rmtree(tmp_path / "b")
    a, b = trained(tmp_path, text_corpus, "ab", 8, *flags, HEALS, layout=layout)
    assert f"the shared state of {tmp_path}/a/checkpoint/step-4" in notes(b)
    assert [line["step"] for line in b.lines("step")] == [5, 6, 7, 8]
    assert b.lines("round")[-1]["participants"] == 2
    assert not any(line["healed"] for line in b.lines("round"))
    assert a.summary()["shared_state_sha256"] == b.summary()["shared_state_sha256"]


@pytest.mark.slow
def test_a_round_that_is_in_flight_in_the_checkpoint_is_the_others_to_apply(tmp_path, text_corpus):
    flags = ["--semi_sync.sync_every=4", "--semi_sync.num_fragments=2", "--semi_sync.fragment_sync_delay=1"]
    trained(tmp_path, text_corpus, "ab", 4, *flags)
    shutil.rmtree(tmp_path / "b")
    a, b = trained(tmp_path, text_corpus, "ab", 8, *flags, HEALS)
    assert b.lines("step")[0]["step"] == 5
    assert b.lines("round")[-1]["participants"] == 2
    assert a.summary()["shared_state_sha256"] == b.summary()["shared_state_sha256"]


@pytest.mark.slow
def test_who_is_alive_and_further_on_counts_more(tmp_path, text_corpus):
    """The newcomer begins with the other's older checkpoint, and takes what the live site has."""
    config = write_config(tmp_path, list("ab"), own_data(text_corpus), {})
    flags = [*FLAGS, "--training.steps=40", "--lr_scheduler.total_steps=40", "--checkpoint.interval=3"]
    pause, saved = tmp_path / "pause", tmp_path / "a" / "checkpoint"
    with lighthouse(1) as url:
        a = start_site(config, "a", 1, url, *flags, pause=pause)
        until(a, lambda: (saved / "step-6" / ".metadata").exists())
        pause.touch()
        b = start_site(config, "b", 1, url, *flags, HEALS, "--checkpoint.load_only")
        for later in {*saved.iterdir()} - {saved / "step-3"}:
            shutil.rmtree(later)
        until(b, lambda: "waiting for the quorum" in b.log())
        pause.unlink()
        assert (a.wait(), b.wait()) == ([0], [0]), b.log()[-3000:]
    assert f"the shared state of {saved}/step-3" in notes(b)
    assert b.lines("step")[0]["step"] > 6
    assert a.summary()["shared_state_sha256"] == b.summary()["shared_state_sha256"]


@pytest.mark.slow
def test_without_the_setting_a_site_begins_anew_and_says_what_there_would_be(tmp_path, text_corpus, s3: S3):
    store = f"--checkpoint.folder={STORE}"
    trained(tmp_path / "first", text_corpus, "a", 2, store)
    (site,) = trained(tmp_path / "second", text_corpus, "b", 2, store)
    assert f"such as {STORE}/a/checkpoint/step-2" in notes(site)
    assert [line["step"] for line in site.lines("step")] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.dim=32"], "of this site's shape"),
        (["--semi_sync.method=lordo", "--optimizer.name=LowRankAdamW", "--optimizer.rank=4"], "shares what the inner"),
        (["--semi_sync.method=demo", "--semi_sync.sync_every=1", "--optimizer.name=DeMo"], "under this name"),
        (["--checkpoint.enable=false"], "is not read without checkpoint.enable"),
    ],
)
def test_what_cannot_be_taken_is_refused(flags, words, tmp_path, text_corpus):
    trained(tmp_path, text_corpus, "a", 2)
    (site,) = run(tmp_path, text_corpus, "b", 4, HEALS, *flags)
    assert [rank.exitcode for rank in site.ranks] == [2], site.log()[-3000:]
    assert words in one_line(site) and "heal_from_checkpoints" in one_line(site)
