"""Every small file of train_configs trains at its two sites: some steps, a round, one shared state."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.file_runs import FileRun, train_in_turn
from tests.end_to_end.forked import SiteRun, lighthouse, start_site

pytestmark = pytest.mark.timeout(900)
FOLDER = Path(__file__).parents[2] / "train_configs"
FILES = {each.stem: each for each in sorted([*FOLDER.glob("tiny_*.toml"), FOLDER / "demo.toml"])}
TWO_RANKS = "tiny_two_layouts"
STEPS = 8
SHORT = [
    f"--training.steps={STEPS}",
    "--training.seq_len=64",
    "--training.local_batch_size=2",
    "--lr_scheduler.warmup_steps=2",
    "--metrics.enable_tensorboard=false",
    "--replica.quorum_timeout_seconds=90",
]
SYNC_EVERY = 6  # two fragments, three steps apart, have two to arrive


def flags_of(file: Path) -> list[str]:
    every = tomllib.loads(file.read_text())["semi_sync"].get("sync_every")
    return SHORT if every is None else [*SHORT, f"--semi_sync.sync_every={SYNC_EVERY}"]


def sites_of(file: Path) -> tuple[str, ...]:
    return tuple(site["name"] for site in tomllib.loads(file.read_text())["site"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """What tiny_dept_spec_opt.toml says to train first, of less text."""
    from titan_ext import cli

    folder = tmp_path_factory.mktemp("tokenizer") / "docs"
    command = ["data", "tokenizer", "--corpus", "builtin:docs", "--vocab-size", "400", "--limit-mib", "0.25"]
    assert cli.main([*command, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer) -> Iterator[Path]:
    """All files but the one with two ranks, trained in two processes."""
    folder = tmp_path_factory.mktemp("files")
    with lighthouse(1) as eu, lighthouse(1) as us:
        own = {
            "tiny_dept_spec_opt": {"docs": [f"--tokenizer={tokenizer}"]},
            "tiny_regions": {
                site: [f"--replica.region_lighthouse={us if site in ('austin', 'boston') else eu}"]
                for site in sites_of(FILES["tiny_regions"])
            },
        }
        runs = [
            FileRun(path=file, sites=sites_of(file), flags=flags_of(file), own_flags=own.get(name, {}))
            for name, file in FILES.items()
            if name != TWO_RANKS
        ]
        # First those of most sites: sites that other files lack would wait for these to come to theirs.
        runs.sort(key=lambda run: -len(run.sites))
        train_in_turn(runs, folder, 1, timeout=800)
        yield folder


def check_trained(file: Path, folder: Path) -> None:
    sites = [SiteRun(name, folder, []) for name in sites_of(file)]
    for site in sites:
        assert not site.failure(), site.failure()
        losses = site.losses()
        assert len(losses) == STEPS and max(losses) < 8, losses
        rounds = [line for line in site.lines("round") if line["committed"]]
        assert {line["level"] for line in rounds} == (
            {"all", "region"} if "region_sync" in file.read_text() else {"all"}
        )
        for line in rounds:
            assert line["participants"] == (2 if line["level"] == "region" else len(sites))
        assert site.summary()["bytes_sent"] > 0
    # One site alone may meet harder text as it goes.
    assert sum(min(site.losses()[1:]) for site in sites) < sum(site.losses()[0] for site in sites)
    assert len({site.summary()["shared_state_sha256"] for site in sites}) == 1


@pytest.mark.parametrize("name", [name for name in FILES if name != TWO_RANKS])
def test_a_file_trains_at_its_two_sites(name, trained):
    check_trained(FILES[name], trained / name)


def test_the_file_of_two_layouts_trains(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(FILES[TWO_RANKS].read_text())
    with lighthouse(2) as url:
        sites = [start_site(file, name, ranks, url, *flags_of(file)) for name, ranks in zip(sites_of(file), (1, 2))]
        for site in sites:
            assert site.wait() == [0] * len(site.ranks), site.log()[-3000:]
    check_trained(file, tmp_path)


def test_all_small_files_are_here():
    assert len(FILES) >= 17 and all(len(sites_of(file)) >= 2 for file in FILES.values())
