"""Training goes on from a loaded model: every site starts at its loss, and nothing pushes it back."""

import subprocess
import sys

import pytest

from tests.end_to_end.forked import lighthouse, start_site
from tests.end_to_end.test_layouts import write_config
from tests.end_to_end.test_runs import own_data

STAND_STILL = ["--optimizer.lr=0.0", "--training.steps=5", "--semi_sync.sync_every=2", "--checkpoint.enable"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_corpus):
    """A model that has learned something: its checkpoint, the same for Hugging Face, and its loss."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, ["a"], own_data(text_corpus, 1), {})
    flags = ["--semi_sync.method=none", "--training.steps=40", "--optimizer.lr=1e-2", "--checkpoint.enable"]
    site = start_site(config, "a", 1, "http://127.0.0.1:1", *flags)
    assert site.wait() == [0], site.log()[-3000:]
    checkpoint = folder / "a" / "checkpoint" / "step-40"
    exported = folder / "exported"
    export = [
        sys.executable,
        "-m",
        "titan_ext",
        "export",
        str(config),
        "--out",
        str(exported),
        f"--dump_folder={folder}",
    ]
    subprocess.run(export, check=True)
    return checkpoint, exported, site.losses()


def run(folder, text_corpus, *flags, layouts=({}, {}), loads=((), ())):
    config = write_config(folder, ["a", "b"], own_data(text_corpus), {})
    with lighthouse(2) as url:
        sites = []
        for name, layout, load in zip(("a", "b"), layouts, loads, strict=True):
            degrees = [f"--parallelism.{key}={value}" for key, value in layout.items()]
            ranks = max([1, *layout.values()])
            sites.append(start_site(config, name, ranks, url, *STAND_STILL, *degrees, *load, *flags))
        codes = [site.wait() for site in sites]
    return sites, codes


def stand_still_at(sites, codes, loss):
    for site, code in zip(sites, codes, strict=True):
        assert not any(code), site.log()[-3000:]
        assert all(abs(each - loss) < 0.5 for each in site.losses()), site.losses()
    assert sites[0].summary()["shared_state_sha256"] == sites[1].summary()["shared_state_sha256"]


@pytest.mark.parametrize("method", ["diloco", "local_sgd", "noloco"])
def test_sites_stay_at_the_loss_of_the_model_they_loaded(tmp_path, text_corpus, trained, method):
    checkpoint, _, losses = trained
    load = [f"--checkpoint.initial_load_path={checkpoint}", "--checkpoint.initial_load_model_only=true"]
    stand_still_at(*run(tmp_path, text_corpus, f"--semi_sync.method={method}", *load), losses[-1])


def test_a_hugging_face_folder_is_a_start_too_also_by_leaders(tmp_path, text_corpus, trained):
    _, exported, losses = trained
    load = [f"--checkpoint.initial_load_path={exported}", "--checkpoint.initial_load_in_hf=true"]
    layouts = ({}, {"data_parallel_shard_degree": 2})
    stand_still_at(*run(tmp_path, text_corpus, "--semi_sync.pairing=leader", *load, layouts=layouts), losses[-1])


def test_a_resume_without_the_outer_loops_state_starts_from_the_loaded_parameters(tmp_path, text_corpus, trained):
    checkpoint, _, losses = trained
    load = [f"--checkpoint.initial_load_path={checkpoint}", "--checkpoint.initial_load_model_only=true"]
    stand_still_at(*run(tmp_path, text_corpus, *load), losses[-1])
    again = run(tmp_path, text_corpus, "--training.steps=9", '--checkpoint.exclude_from_loading=["semi_sync"]')
    stand_still_at(*again, losses[-1])


def test_sites_that_load_different_models_are_refused(tmp_path, text_corpus, trained):
    checkpoint, _, _ = trained
    load = [f"--checkpoint.initial_load_path={checkpoint}", "--checkpoint.initial_load_model_only=true"]
    sites, codes = run(tmp_path, text_corpus, loads=(load, ()))
    assert all(code[0] not in (0, 1) for code in codes), [site.log()[-2000:] for site in sites]
    for site in sites:
        assert "do not start from one model (" in site.log() and "a: loaded model" in site.log()
        assert "b: random initialisation" in site.log() and "Traceback" not in site.log()
