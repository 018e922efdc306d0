"""Regions with lighthouses of their own: real sites, real kills."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from tests.end_to_end.test_personalize import weights
from tests.end_to_end.test_runs import own_data, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
REGIONS = {"bonn": "eu", "lyon": "eu", "austin": "us", "boston": "us"}
FLAGS = [
    "--semi_sync.sync_every=8",
    "--semi_sync.topology=regions",
    "--semi_sync.region_sync_every=2",
    "--replica.min_sites=1",
]


@dataclass
class Tree:
    """The sites of a file, and where they meet."""

    config: Path
    url: str
    of_region: dict[str, str]
    layouts: dict[str, str]
    flags: Sequence[str]

    def start(self, name: str, pause: Path | None = None) -> SiteRun:
        ranks, place = LAYOUTS[self.layouts[name]][0], self.of_region.get(REGIONS[name])
        region = [f"--replica.region_lighthouse={place}"] if place else []
        return start_site(self.config, name, ranks, self.url, *FLAGS, *region, *self.flags, pause=pause)


@contextmanager
def tree(folder: Path, corpus: Path, *flags: str, layouts: dict[str, str] | None = None) -> Iterator[Tree]:
    layouts = layouts or dict.fromkeys(REGIONS, "plain")
    config = write_config(folder, list(layouts), own_data(corpus, len(layouts)), {})
    text = config.read_text()
    for name, layout in layouts.items():
        ranks, degrees = LAYOUTS[layout]
        table = ", ".join(f"{key} = {value}" for key, value in degrees.items())
        header = f'region = "{REGIONS[name]}"\nnproc = {ranks}\nparallelism = {{{table}}}\n'
        text = text.replace(f'name = "{name}"\n', f'name = "{name}"\n{header}')
    config.write_text(text)
    with lighthouse(1) as url, lighthouse(1) as eu, lighthouse(1) as us:
        yield Tree(config, url, {"eu": eu, "us": us}, layouts, [f"--replica.expected_sites={len(layouts)}", *flags])


def rounds(site: SiteRun, level: str) -> list[dict]:
    return [line for line in site.lines("round") if line["level"] == level]


def end_well(sites: Sequence[SiteRun]) -> None:
    for site in sites:
        assert set(site.wait(400)) == {0}, site.log()[-3000:]
    assert len({site.summary()["shared_state_sha256"] for site in sites}) == 1


def kill(site: SiteRun) -> None:
    for rank in site.ranks:
        os.kill(rank.pid, signal.SIGKILL)
    site.wait()


@pytest.mark.parametrize(
    "layouts",
    [
        {"bonn": "fsdp2", "lyon": "fsdp2", "austin": "fsdp2"},
        {"bonn": "pp2", "lyon": "pp2", "austin": "pp2"},
        {"bonn": "tp2", "lyon": "tp2", "austin": "plain"},
    ],
    ids=lambda layouts: "-".join(layouts.values()),
)
def test_sites_of_many_ranks_average_in_their_region(layouts, tmp_path, text_corpus):
    """What a region gives over a quorum of its own is what it gives over that of all sites, bit for bit."""
    found = []
    for name in ("own", "common"):
        with tree(tmp_path / name, text_corpus, "--training.steps=10", layouts=layouts) as run:
            if name == "common":
                run.of_region.clear()
            sites = [run.start(site) for site in layouts]
            end_well(sites)
            found.append([(site.losses(), site.summary()["shared_state_sha256"]) for site in sites])
    assert found[0] == found[1]


@pytest.mark.parametrize("layout", ["plain", "fsdp2", "tp2", "pp2"])
def test_sites_of_a_region_whose_gradients_are_averaged_hold_one_model(layout, tmp_path, text_corpus):
    """After some steps of AdamW on text of each one's own, with clipping, and before any round of all."""
    flags = [
        "--training.steps=5", "--semi_sync.region_sync_every=1", "--semi_sync.region_average=gradients",
        "--semi_sync.sync_every=100", "--training.max_norm=0.5", "--checkpoint.enable", "--checkpoint.interval=5",
    ]  # fmt: skip
    layouts = {"bonn": layout, "lyon": layout}
    with tree(tmp_path, text_corpus, *flags, layouts=layouts) as run:
        sites = [run.start(name) for name in layouts]
        end_well(sites)
    first, second = (weights(tmp_path / site.name / "checkpoint" / "step-5") for site in sites)
    assert first.keys() == second.keys() and len(first) > 10
    assert sites[0].losses() != sites[1].losses()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_killed_site_leaves_its_region_and_comes_back(tmp_path, text_corpus):
    """Its neighbour goes on alone at once, the other region loses nothing, and all end alike."""
    with tree(tmp_path, text_corpus, "--training.steps=80") as run:
        pause = tmp_path / "pause"
        sites = {name: run.start(name, pause=pause if name != "lyon" else None) for name in REGIONS}
        wait_for(lambda: len(rounds(sites["bonn"], "all")) >= 2, *sites.values())
        kill(sites["lyon"])
        left = [sites[name] for name in REGIONS if name != "lyon"]
        wait_for(lambda: rounds(sites["bonn"], "region")[-1]["sites"] == 1, *left)
        wait_for(lambda: rounds(sites["austin"], "all")[-1]["participants"] == 3, *left)
        pause.touch()
        again = run.start("lyon")
        wait_for(lambda: "waiting for the quorum" in again.log().rpartition("lyon: ")[2] or again.lines("step"), again)
        pause.unlink()
        end_well([*left, again])
    of_region = rounds(sites["bonn"], "region")
    at = next(place for place, line in enumerate(of_region) if line["sites"] == 1)
    failed = [line for line in of_region if not line["committed"]]
    assert len(failed) <= 1 and of_region[at]["committed"], "its region goes on within two rounds"
    assert of_region[-1]["sites"] == 2 and rounds(sites["bonn"], "all")[-1]["participants"] == 4
    for name in ("austin", "boston"):
        assert all(line["committed"] and line["sites"] == 2 for line in rounds(sites[name], "region"))
    for site in left:
        steps = [line["step"] for line in site.lines("step")]
        assert steps == list(range(1, 81)), "no inner step is lost"


def test_a_whole_region_goes_and_comes_back(tmp_path, text_corpus):
    with tree(tmp_path, text_corpus, "--training.steps=80") as run:
        pause = tmp_path / "pause"
        sites = {name: run.start(name, pause=pause if REGIONS[name] == "us" else None) for name in REGIONS}
        wait_for(lambda: len(rounds(sites["austin"], "all")) >= 2, *sites.values())
        for name in ("bonn", "lyon"):
            kill(sites[name])
        left = [sites["austin"], sites["boston"]]
        wait_for(lambda: rounds(sites["austin"], "all")[-1]["participants"] == 2, *left)
        pause.touch()
        again = [run.start(name) for name in ("bonn", "lyon")]
        wait_for(lambda: all(site.log().count("waiting for the quorum") > 1 for site in again), *again)
        pause.unlink()
        end_well([*left, *again])
    assert rounds(sites["austin"], "all")[-1]["participants"] == 4
    assert all(rounds(site, "region")[-1]["sites"] == 2 for site in again)


def test_all_stop_and_resume_bit_for_bit(tmp_path, text_corpus):
    flags = ["--lr_scheduler.total_steps=20", "--checkpoint.interval=11", "--checkpoint.enable"]

    def run(folder: Path, steps: int) -> list[SiteRun]:
        with tree(folder, text_corpus, *flags, f"--training.steps={steps}") as begun:
            sites = [begun.start(name) for name in REGIONS]
            end_well(sites)
        return sites

    straight = run(tmp_path / "straight", 20)
    run(tmp_path / "stopped", 11)
    resumed = run(tmp_path / "stopped", 20)
    for whole, halves in zip(straight, resumed, strict=True):
        assert halves.losses() == whole.losses()
        assert halves.summary()["shared_state_sha256"] == whole.summary()["shared_state_sha256"]
