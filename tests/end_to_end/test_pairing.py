"""Sites of different layout: their leaders exchange whole tensors."""

import os
import signal

import pytest

from tests.end_to_end.file_runs import FileRun, train_in_turn
from tests.end_to_end.forked import lighthouse, start_site
from tests.end_to_end.test_layouts import LAYOUTS, STEPS, write_config
from tests.end_to_end.test_runs import one_line, pause_alone, start_again, wait_for


def with_layouts(folder, corpus, layouts):
    """A configuration of two sites, each with its own layout and seed."""
    data = [f'{{dataset = "{corpus}", seed = {seed}}}' for seed in (1, 2)]
    config = write_config(folder, ["a", "b"], data, {})
    text = config.read_text()
    for name, layout in zip(("a", "b"), layouts):
        ranks, degrees = LAYOUTS[layout]
        table = ", ".join(f"{key} = {value}" for key, value in degrees.items())
        text = text.replace(f'name = "{name}"\n', f'name = "{name}"\nnproc = {ranks}\nparallelism = {{{table}}}\n')
    config.write_text(text)
    return config


def run_both(folder, corpus, layouts, *flags):
    config = with_layouts(folder, corpus, layouts)
    with lighthouse(2) as url:
        sites = [start_site(config, name, LAYOUTS[layout][0], url, *flags) for name, layout in zip(("a", "b"), layouts)]
        for site, layout in zip(sites, layouts):
            assert site.wait() == [0] * LAYOUTS[layout][0], site.log()[-3000:]
    first, second = (site.summary()["shared_state_sha256"] for site in sites)
    assert first == second
    for site in sites:
        assert {line["participants"] for line in site.lines("round")} == {2}
        assert len(site.losses()) == STEPS
    return sites, first


@pytest.mark.parametrize(
    "layouts, flags",
    [
        pytest.param(("fsdp2", "tp2"), [], marks=pytest.mark.slow),
        pytest.param(("plain", "fsdp2_tp2"), [], marks=pytest.mark.slow),
        (("fsdp2", "pp2"), ["--semi_sync.codec=int4", "--semi_sync.fragment_sync_delay=1"]),
        pytest.param(("pp2", "tp2"), ["--semi_sync.method=noloco", "--semi_sync.sync_every=2"], marks=pytest.mark.slow),
    ],
    ids=["fsdp2-tp2", "plain-fsdp2_tp2", "fsdp2-pp2 int4 delayed", "pp2-tp2 noloco"],
)
def test_sites_of_two_layouts_agree(layouts, flags, tmp_path, text_corpus):
    if "--semi_sync.method=noloco" in flags:
        flags = [*flags, "--semi_sync.outer_optimizer=average"]
    sites, _ = run_both(tmp_path, text_corpus, layouts, *flags)
    assert "their leaders exchange for all ranks" in sites[0].log()


def test_leaders_give_the_bits_that_ranks_give(tmp_path, text_corpus):
    flags = ["--semi_sync.method=des_loc", "--semi_sync.outer_optimizer=average"]
    pairings = {"rank": flags, "leader": [*flags, "--semi_sync.pairing=leader"]}
    runs = [
        FileRun(
            path=with_layouts(tmp_path / name, text_corpus, ("fsdp2", "fsdp2")).rename(tmp_path / f"{name}.toml"),
            sites=("a", "b"),
            flags=own,
        )
        for name, own in pairings.items()
    ]
    ranked, led = train_in_turn(runs, tmp_path, 2)
    assert not any(site.failure() for site in (*ranked, *led))
    assert len({site.summary()["shared_state_sha256"] for site in (*ranked, *led)}) == 1
    assert "their leaders exchange for all ranks" in (tmp_path / "rank_site0_0.txt").read_text()
    assert ranked[0].losses() == led[0].losses()
    assert ranked[0].summary()["bytes_sent"] == led[0].summary()["bytes_sent"]


@pytest.mark.slow
def test_a_killed_site_of_another_layout_heals_through_its_leader(tmp_path, text_corpus):
    flags = ["--training.steps=60", "--semi_sync.sync_every=10", "--replica.min_sites=1"]
    config = with_layouts(tmp_path, text_corpus, ("fsdp2", "pp2"))
    with lighthouse(1) as url:
        first = start_site(config, "a", 2, url, *flags, pause=tmp_path / "pause")
        second = start_site(config, "b", 2, url, *flags)
        wait_for(lambda: any(line["participants"] == 2 for line in first.lines("round")), first, second)
        for rank in second.ranks:
            os.kill(rank.pid, signal.SIGKILL)
        assert second.wait() == [-signal.SIGKILL] * 2
        pause_alone(config, first)
        again = start_again(config, "b", 2, url, *flags)
        for site in (first, again):
            assert site.wait() == [0, 0], site.log()[-3000:]
    assert first.summary()["shared_state_sha256"] == again.summary()["shared_state_sha256"]
    assert first.lines("round")[-1]["participants"] == 2


def test_a_method_that_needs_equal_layouts_says_so(tmp_path, text_corpus):
    config = with_layouts(tmp_path, text_corpus, ("fsdp2", "plain"))
    with lighthouse(2) as url:
        site = start_site(config, "b", 1, url, "--semi_sync.method=sparta", "--semi_sync.outer_optimizer=average")
        assert site.wait() == [2], site.log()[-3000:]
    assert "semi_sync.method" in one_line(site) and "one parallel layout" in one_line(site)
