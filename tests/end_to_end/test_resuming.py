"""A run that goes on as something else than it was: what it takes up, what starts fresh, and that it says so."""

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.forked import lighthouse, start_ranks, start_site
from tests.end_to_end.resume_runs import PAIRS, STEPS, run_pairs
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from tests.end_to_end.test_runs import own_data

NO_LIGHTHOUSE = "http://127.0.0.1:1"
OUTER, INNER = "the outer loop", "the inner optimizer"
REST = {"the learning rate's schedule", "the place in the data", "the count of steps and tokens"}
FRESH = {
    "none to diloco": {OUTER},
    "none to streaming": {OUTER},
    "local_sgd to diloco": {"the outer loop's momentum_buffer"},
    "noloco to diloco": {OUTER},
    "diloco to noloco": {OUTER},
    "nesterov to adam": {f"the outer loop's {each}" for each in ("exp_avg", "exp_avg_sq")},
    "AdamW to SGD": {INNER},
    "SGD to AdamW": {INNER},
    "model only": {OUTER, INNER, *REST},
    "model only, none": {INNER, *REST},
    "Hugging Face": {OUTER, INNER, *REST},
}
"""By pair: what starts fresh; nothing in the others."""


@pytest.mark.parametrize("layout", ["plain", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_settings(layout, tmp_path, text_corpus):
    ranks, parallelism = LAYOUTS[layout]
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), parallelism)
    with lighthouse(1) as url:
        site = start_ranks(config, "a", ranks, url, run_pairs, config, "a", tmp_path)
        assert site.wait() == [0] * ranks, site.log()[-3000:]
    found = json.loads((tmp_path / "a.json").read_text())
    for pair, (before, after) in PAIRS.items():
        result, fresh = found[pair], FRESH.get(pair, set())
        notes = " ".join(result["notes"]).partition("starts fresh: ")[2]
        assert {part.partition(" (")[0] for part in notes.split("; ") if part} == fresh, pair
        assert len(result["notes"]) == bool(fresh), f"{pair}: one line or none"
        assert result["parameters"] and result["finite"], pair
        assert result["step"] == result["epoch"] == STEPS, f"{pair}: inner steps count on"
        assert (
            result["moments_zero"] if INNER in fresh else result["moments"] or after.get("inner") == {"name": "SGD"}
        ), pair
        if "outer" in after and after["outer"]["method"] != "none":
            assert result["from_local" if OUTER in fresh else "shared"], f"{pair}: what the sites share"
    assert found["AdamW to other settings"]["changed"] == [
        "betas was (0.9, 0.999) in the checkpoint, is (0.8, 0.9)",
        "weight_decay was 0.01 in the checkpoint, is 0.3",
    ]
    assert found["AdamW to other settings"]["groups"][0] == {"weight_decay": 0.3, "betas": [0.8, 0.9], "momentum": None}
    assert found["the same"]["changed"] == []


ALONE = ["--semi_sync.method=none", "--lr_scheduler.total_steps=8", "--checkpoint.enable"]


def test_changed_rates_count_from_the_first_step_on_and_tokens_count_on_in_another_layout(tmp_path, text_corpus):
    data = own_data(text_corpus, 1)
    config = write_config(tmp_path, ["a"], data, {"data_parallel_shard_degree": 2})
    before = start_site(config, "a", 2, NO_LIGHTHOUSE, *ALONE, "--training.steps=3")
    assert before.wait() == [0, 0], before.log()[-3000:]
    config = write_config(tmp_path, ["a"], data, {})
    flags = ["--training.steps=5", "--optimizer.lr=3e-4", "--optimizer.weight_decay=0.3"]
    after = start_site(config, "a", 1, NO_LIGHTHOUSE, *ALONE, *flags)
    assert after.wait() == [0], after.log()[-3000:]
    lines = after.lines("step")
    assert [line["lr"] for line in lines[3:]] == pytest.approx([3e-4 * factor for factor in (5 / 7, 4 / 7)], rel=1e-6)
    notes = [line["text"] for line in after.lines("note")]
    assert notes == [
        "data: dp_world_size was 2, is 1: going on at document 1 of epoch 0",
        "settings are not those of the checkpoint: training.global_batch_size was 8, is 4; "
        "parallelism.data_parallel_shard_degree was 2, is 1",
        "optimizer: lr was 0.001 in the checkpoint, is 0.0003",
        "optimizer: weight_decay was 0.1 in the checkpoint, is 0.3",
    ]
    assert [line["tokens"] for line in lines] == [512, 1024, 1536, 1792, 2048]


def test_a_seed_checkpoint_is_what_a_run_starts_from(tmp_path, text_corpus):
    config = write_config(tmp_path, ["a"], own_data(text_corpus, 1), {})
    seed = start_site(config, "a", 1, NO_LIGHTHOUSE, "--checkpoint.enable", "--checkpoint.create_seed_checkpoint")
    assert seed.wait() == [0], seed.log()[-3000:]
    assert [each.name for each in (tmp_path / "a" / "checkpoint").iterdir()] == ["step-0"]
    assert seed.lines("step") == [] and seed.summary()["steps"] == 0
    run = start_site(config, "a", 1, NO_LIGHTHOUSE, *ALONE, "--training.steps=1", "--debug.seed=1")
    plain = start_site(
        config,
        "a",
        1,
        NO_LIGHTHOUSE,
        "--semi_sync.method=none",
        f"--dump_folder={tmp_path / 'plain'}",
        "--training.steps=1",
    )
    for site in (run, plain):
        assert site.wait() == [0], site.log()[-3000:]
    lines = map(json.loads, (tmp_path / "plain" / "a" / "metrics.jsonl").read_text().splitlines())
    assert run.losses() == [next(line["loss"] for line in lines if line["kind"] == "step")], (
        "as the seed of the first run initialises, not as that of this one"
    )


@pytest.mark.parametrize("layout", ["plain", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_checkpoint_written_beside_training_is_that_of_its_step(layout, tmp_path, text_corpus):
    """With error feedback the outer loop's state holds stretches of flat buffers, too."""
    ranks, parallelism = LAYOUTS[layout]
    flags = ["--training.steps=5", "--checkpoint.enable", "--checkpoint.interval=3", "--checkpoint.async_mode=async"]
    flags += ["--semi_sync.sync_every=2", "--semi_sync.codec=int4"]

    def run(folder: Path):
        config = write_config(folder, ["a"], own_data(text_corpus, 1), parallelism)
        with lighthouse(1) as url:
            site = start_site(config, "a", ranks, url, *flags)
            assert site.wait() == [0] * ranks, site.log()[-3000:]
        return site

    straight = run(tmp_path / "straight")
    (tmp_path / "resumed" / "a" / "checkpoint").mkdir(parents=True)
    shutil.copytree(*(tmp_path / each / "a" / "checkpoint" / "step-3" for each in ("straight", "resumed")))
    resumed = run(tmp_path / "resumed")
    assert resumed.losses() == straight.losses()[3:]
    assert resumed.summary()["shared_state_sha256"] == straight.summary()["shared_state_sha256"]
