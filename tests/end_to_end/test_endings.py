"""How a run ends: by itself, for the right reason, and with what it has learned saved."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.end_to_end.forked import lighthouse, start_site
from tests.end_to_end.test_layouts import write_config
from tests.end_to_end.test_runs import one_line, own_data, wait_for

NO_LIGHTHOUSE = "http://127.0.0.1:1"


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_whose_loader_has_workers_ends(workers, tmp_path, text_corpus):
    validation = f"""
[validator]
enable = true
steps = 1
freq = 1
dataloader = {{ dataset = "{text_corpus}", num_workers = {workers} }}
"""
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {}, validation)
    flags = ["--training.steps=2", "--semi_sync.method=none", f"--data.num_workers={workers}"]
    site = start_site(config, "a", 1, NO_LIGHTHOUSE, *flags)
    assert site.wait(60) == [0], site.log()[-3000:]
    assert len(site.losses()) == 2


def test_torchruns_own_restart_of_a_site_that_waits_for_another(tmp_path, text_corpus):
    """The store outlives the first attempt, of which one rank dies and torchrun tells the other to leave."""
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), {"data_parallel_shard_degree": 2})
    flags = ["--training.steps=2", "--checkpoint.enable"]
    with lighthouse(2) as url:
        first = start_site(config, "a", 2, url, *flags)
        wait_for(lambda: first.log().count("waiting for the quorum") == 2, first)
        os.kill(first.ranks[1].pid, signal.SIGKILL)
        os.kill(first.ranks[0].pid, signal.SIGTERM)
        left, killed = first.wait()
        # Rank 0 leaves as it is told, or has seen the connection to rank 1 break before.
        assert left in (128 + signal.SIGTERM, 1) and killed == -signal.SIGKILL, first.log()[-3000:]
        sites = [start_site(config, "a", 2, url, *flags, store=first.store), start_site(config, "b", 2, url, *flags)]
        for site in sites:
            assert site.wait() == [0, 0], site.log()[-3000:]
    assert [len(site.losses()) for site in sites] == [2, 2]


def test_a_site_whose_loss_is_not_finite_does_not_end_the_others_run(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a", "b"], own_data(text_corpus), {})
    flags = ["--training.steps=6", "--semi_sync.sync_every=3"]
    with lighthouse(2) as url:
        sites = [
            start_site(config, "a", 1, url, *flags),
            start_site(config, "b", 1, url, *flags, "--optimizer.lr=1e30"),
        ]
        for site in sites:
            assert site.wait() == [0], site.log()[-3000:]
    healthy, broken = sites
    assert None not in healthy.losses() and None in broken.losses()
    assert [line["contributors"] for line in healthy.lines("round")] == [["a"], ["a"]]
    assert healthy.summary()["shared_state_sha256"] == broken.summary()["shared_state_sha256"]


def test_without_an_outer_loop_a_loss_that_is_not_finite_is_one_line(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    site = start_site(config, "a", 1, NO_LIGHTHOUSE, "--semi_sync.method=none", "--optimizer.lr=1e30")
    assert site.wait() == [1], site.log()[-3000:]
    assert "is not finite: lower the learning rate" in one_line(site)


def finite_data(folder: Path, *documents: int) -> list[str]:
    """For each site a corpus of so many documents, to be read once."""
    found = []
    for number, count in enumerate(documents):
        path = folder / f"corpus{number}.jsonl"
        path.write_text(
            "".join(json.dumps({"text": f"{number} {place} words and more " * 20}) + "\n" for place in range(count))
        )
        found.append(f'{{dataset = "{path}", infinite = false}}')
    return found


def test_a_run_ends_with_its_data_saved_and_does_not_begin_the_data_again(tmp_path):
    config = write_config(tmp_path, ["a"], finite_data(tmp_path, 6), {})
    flags = ["--training.steps=1000", "--semi_sync.method=none", "--checkpoint.enable"]
    for _ in range(2):
        site = start_site(config, "a", 1, NO_LIGHTHOUSE, *flags)
        assert site.wait() == [0], site.log()[-3000:]
        taken = len(site.losses())
        assert site.summary()["steps"] == taken == site.lines("data_ended")[-1]["step"]
        assert (tmp_path / "a" / "checkpoint" / f"step-{taken}" / ".metadata").exists()
    assert len(site.lines("data_ended")) == 2 and 5 < taken < 20


def test_sites_whose_data_ends_at_different_steps_end_together(tmp_path):
    config = write_config(tmp_path, ["a", "b"], finite_data(tmp_path, 3, 6), {"data_parallel_shard_degree": 2})
    flags = ["--training.steps=1000", "--semi_sync.sync_every=3", "--checkpoint.enable"]
    with lighthouse(2) as url:
        sites = [start_site(config, name, 2, url, *flags) for name in "ab"]
        for site in sites:
            assert site.wait() == [0, 0], site.log()[-3000:]
    first, second = (site.lines("data_ended")[0]["step"] for site in sites)
    assert 0 < first < second < 20
    assert len({site.summary()["shared_state_sha256"] for site in sites}) == 1
    (end,) = {site.summary()["steps"] for site in sites}
    assert second <= end < second + 6
    for site in sites:
        assert (tmp_path / site.name / "checkpoint" / f"step-{end}" / ".metadata").exists()
