"""Data sources in a configuration file: where they may stand, who shares them out, and what is refused."""

import pytest

from titan_ext.config import load_run
from titan_ext.errors import UserError

SITES = '[[site]]\nname = "a"\n[[site]]\nname = "b"\n'
TABLES = (
    '[[source]]\nname = "x"\ndataset = "builtin:docs"\n[[source]]\nname = "y"\ndataset = "builtin:code"\nweight = 2.0\n'
)
MODEL = '[model]\nflavor = "tiny"\n'


def load(tmp_path, text, *flags):
    file = tmp_path / "run.toml"
    file.write_text(text)
    return load_run(file, flags)


def test_sources_common_to_sites_are_shared_out_unless_they_move(tmp_path):
    run = load(tmp_path, MODEL + TABLES + SITES)
    for place, site in enumerate(run.sites):
        data = site.config.dataloader
        assert [(each.name, each.weight) for each in data.all_sources()] == [("x", 1.0), ("y", 2.0)]
        assert (data.share_index, data.share_count) == (place, 2)
    run = load(tmp_path, MODEL + TABLES + SITES, "--semi_sync.source_placement=pollen")
    assert [site.config.dataloader.share_count for site in run.sites] == [1, 1]


def test_a_site_has_sources_of_its_own_and_a_pattern_finds_more(tmp_path):
    for name in ("u.jsonl", "v.jsonl", ".hidden"):
        (tmp_path / name).write_text('{"text": "words"}\n')
    own = f'[[site]]\nname = "a"\n[[site.source]]\nname = "x"\ndataset = "builtin:docs"\n[site.data]\nsources = "{tmp_path}/*.jsonl"\n'
    run = load(tmp_path, f'{MODEL}{own}[[site]]\nname = "b"\ndata = "builtin:code"\n')
    first, second = (site.config.dataloader for site in run.sites)
    assert [each.name for each in first.all_sources()] == ["x", "u", "v"]
    assert second.all_sources() == [] and second.dataset == "builtin:code"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data.dataset=builtin:code"], "data.dataset"),
        (["--data.infinite=false"], "data.infinite"),
        (["--semi_sync.method=none"], "must be an outer loop"),
        (["--semi_sync.method=local_adam"], "parameters alone"),
        (["--semi_sync.num_fragments=2"], "without a delay"),
        (["--semi_sync.weighting=q_fair"], "semi_sync.weighting"),
        (["--semi_sync.sources_per_round=0"], "semi_sync.sources_per_round = 0"),
        (["--semi_sync.sources_per_round=2", "--semi_sync.sites_per_round=1"], "sources_per_round"),
        (["--lr_scheduler.stretch=0"], "lr_scheduler.stretch = 0"),
        (["--data.sources=/nowhere/*"], "no file or folder fits"),
        (["--loss.name=adapt"], "loss.name"),
        (["--loss.z_loss=1e-4"], "loss.z_loss = 0.0001: must be left out"),
        (
            [
                "--semi_sync.source_placement=pollen",
                "--batch_warmup.steps=4",
                "--training.global_batch_size=32",
                "--nproc=1",
            ],
            "batch_warmup.steps = 4: must be 0 with",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_with_sources_is_refused_by_key(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        load(tmp_path, MODEL + TABLES + SITES, *flags)


def test_sources_that_move_need_sources(tmp_path):
    with pytest.raises(UserError, match="source_placement"):
        load(tmp_path, f'data = "builtin:code"\n{MODEL}{SITES}', "--semi_sync.source_placement=pollen")


def test_two_sources_of_one_name_are_refused_at_their_tables(tmp_path):
    with pytest.raises(UserError, match=r"\n.*run.toml: data.source\[1\].name = \"x\": must be unique"):
        load(tmp_path, MODEL + TABLES.replace('"y"', '"x"') + SITES)


@pytest.mark.parametrize("beside", [["u", "v.jsonl"], ["u.txt", "v.md"]], ids=str)
def test_a_card_beside_corpora_is_no_source_and_is_said(tmp_path, beside):
    for name in ["README.md", *beside]:
        place = tmp_path / "corpora" / name
        place = place if place.suffix else place / "one.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text('{"text": "words"}\n')
    site = f'[[site]]\nname = "a"\ndata.sources = "{tmp_path}/corpora/*"\n[[site]]\nname = "b"\ndata = "builtin:code"\n'
    first = load(tmp_path, MODEL + site).sites[0]
    of_texts = beside == ["u.txt", "v.md"]  # a folder of texts reads it as well
    assert [each.name for each in first.config.dataloader.all_sources()] == ["README"] * of_texts + ["u", "v"]
    assert any("README.md (a dataset card)" in line for line in first.data) != of_texts


def test_weights_that_no_policy_looks_at_are_said(tmp_path):
    weighted = MODEL + TABLES + SITES.replace('"b"', '"b"\nweight = 3')
    for policy, keys in (("tokens", "weight, data.source[1].weight"), ("site", "")):
        notes = load(tmp_path, weighted, f"--semi_sync.weighting={policy}").sites[1].notes
        found = [note for note in notes if "semi_sync.weighting" in note]
        assert found == ([f'without effect, because semi_sync.weighting is "{policy}": {keys}'] if keys else [])
