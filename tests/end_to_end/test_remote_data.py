"""Two sites that train from an object store: its connections are cut for a while, and a run is resumed without copies."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import fsspec
import pytest

from tests.end_to_end.forked import SiteRun, _train, lighthouse, start_ranks
from tests.end_to_end.test_layouts import write_config
from tests.end_to_end.test_losses import trajectory
from tests.object_store import S3

STEPS, SITES = 30, ("east", "west")


def _slowly(environment: dict[str, str], arguments: list[str]) -> None:
    """A rank that finds the object store, and takes steps slowly enough for something to happen between them."""
    from titan_ext.trainer.trainer import Trainer

    os.environ.update(environment)
    train_step = Trainer.train_step

    def slow(self, data):
        time.sleep(0.1)
        return train_step(self, data)

    Trainer.train_step = slow
    _train(arguments, None)


def _config(folder: Path, corpora: str) -> Path:
    # Windows of one file.
    data = [
        f'{{dataset = "{corpora}/{site}", shuffle_buffer = 1, cache_folder = "{folder}/cache/{site}"}}'
        for site in SITES
    ]
    checkpoints = "[checkpoint]\nenable = true\ninterval = 20\nkeep_latest_k = 0\n"
    return write_config(folder, list(SITES), data, {}, checkpoints)


def _start(config: Path, environment: dict[str, str], url: str) -> list[SiteRun]:
    flags = ["--config", str(config), f"--dump_folder={config.parent}", f"--training.steps={STEPS}"]
    return [start_ranks(config, site, 1, url, _slowly, environment, ["--site", site, *flags]) for site in SITES]


def _wait(sites: list[SiteRun]) -> list[list[tuple]]:
    for site in sites:
        assert site.wait() == [0], site.log()[-3000:]
    return [trajectory(site) for site in sites]


@pytest.mark.slow
def test_a_server_that_is_cut_and_a_resume_without_copies_change_no_loss(tmp_path: Path, s3: S3) -> None:
    rng = random.Random(3)
    for site in SITES:
        (tmp_path / "corpora" / site).mkdir(parents=True)
        for shard in range(12):
            texts = [" ".join(rng.choices("alpha beta gamma delta".split(), k=20)) for _ in range(6)]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (tmp_path / "corpora" / site / f"{shard}.jsonl").write_text(lines)
    fsspec.filesystem("s3").put(f"{tmp_path}/corpora", "s3://bucket/corpora", recursive=True)

    with lighthouse(2) as url:
        expected = _wait(_start(_config(tmp_path / "local", f"file://{tmp_path}/corpora"), {}, url))
    config = _config(tmp_path / "s3", "s3://bucket/corpora")
    with lighthouse(2) as url:
        sites = _start(config, s3.environment, url)
        while not all(len(site.lines("step")) >= 4 for site in sites):
            assert all(rank.is_alive() for site in sites for rank in site.ranks), sites[0].log()[-3000:]
            time.sleep(0.05)
        s3.cut()
        before = [len(site.lines("step")) for site in sites]
        time.sleep(4)
        s3.mend()
        assert _wait(sites) == expected
    assert max(before) < STEPS - 10
    for site in sites:
        assert site.log().count("s3://bucket is away") == site.log().count("s3://bucket is back after") == 1

    shutil.rmtree(tmp_path / "s3" / "cache")
    for site in SITES:
        shutil.rmtree(tmp_path / "s3" / site / "checkpoint" / f"step-{STEPS}")
        (tmp_path / "s3" / site / "metrics.jsonl").unlink()
    with lighthouse(2) as url:
        assert _wait(_start(config, s3.environment, url)) == [site[20:] for site in expected]
