"""Keys that come to nothing because of another key are said, and none where they count."""

import pytest

from titan_ext.config import load_site

from .conftest import GOOD


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--semi_sync.method=none", "--replica.min_sites=2"],
            'semi_sync.method is "none": semi_sync.sync_every, replica.min',
        ),
        (
            ["--parallelism.pipeline_parallel_schedule=GPipe"],
            "pipeline_parallel_degree is 1: parallelism.pipeline_parallel_sch",
        ),
        (
            ["--checkpoint.interval=5", "--checkpoint.keep_latest_k=3"],
            "checkpoint.enable is false: checkpoint.interval, checkpo",
        ),
        (["--validator.freq=5"], "validator.enable is false: validator.freq"),
        (["--profiler.profile_freq=50"], "profiler.enable_profiling is false: profiler.profile_freq"),
        (["--compile.backend=eager"], "compile.enable is false: compile.backend"),
        (["--spikes.deviations=3"], 'spikes.action is "none": spikes.deviations'),
        (["--dept.vocabulary_multiple=128"], 'dept.variant is "none": dept.vocabulary_multiple'),
        (
            ["--semi_sync.outlier_threshold=0", "--semi_sync.outlier_action=drop"],
            "outlier_threshold is 0.0: semi_sync.outl",
        ),
        (
            ["--replica.region_lighthouse=eu:29510"],
            "semi_sync.region_sync_every is null: replica.region_lighthouse",
        ),
        (["--semi_sync.round_box_grace=0.2"], 'semi_sync.round_box is "steps": semi_sync.round_box_grace'),
        (["--debug.deterministic_warn_only"], "debug.deterministic is false: debug.deterministic_warn_only"),
        (["--comm.save_traces_folder=x"], "comm.trace_buf_size is 0: comm.save_traces_folder"),
        (["--hf_assets_path=x", "--tokenizer=byte"], "checkpoint.initial_load_in_hf is false: hf_assets_path"),
        (
            ['--parallelism.module_fqns_per_model_part=[["norm"]]'],
            "pipeline_parallel_degree is 1: parallelism.module_fqns_per_model_part",
        ),
        (["--semi_sync.sampling_seed=3"], "nor semi_sync.sources_per_round is set: semi_sync.sampling_seed"),
        (
            ["--lr_scheduler.stretch=4", "--lr_scheduler.warmup_steps=0"],
            "total_steps (not set) alone: lr_scheduler.str",
        ),
        (["--lr_scheduler.stretch=4", "--lr_scheduler.warmup_steps=2"], ""),
        (["--semi_sync.sampling_seed=3", "--semi_sync.sites_per_round=1"], ""),
        ([], ""),
        (["--checkpoint.enable", "--checkpoint.interval=5", "--spikes.action=clip", "--spikes.deviations=3"], ""),
    ],
)
def test_keys_without_effect_are_said(flags, words, write):
    notes = [note for note in load_site(write(GOOD), "alpha", flags).notes if note.startswith("without effect")]
    assert (len(notes) == 1 and words in notes[0]) if words else not notes, notes


@pytest.mark.parametrize(
    ("late_work", "least", "told"), [("keep", 1, True), ("keep", 2, False), ("drop", 1, False)], ids=str
)
def test_that_a_round_needs_a_majority_is_said_where_late_work_is_kept(write, late_work, least, told):
    site = load_site(write(GOOD), "alpha", [f"--semi_sync.late_work={late_work}", f"--replica.min_sites={least}"])
    found = [note for note in site.notes if note.startswith("replica.min_sites = 1") and "(2 of 2)" in note]
    assert len(found) == told


@pytest.mark.parametrize("steps, told", [(20, True), (21, False)])
def test_shares_that_would_come_after_the_last_step_are_said(write, tmp_path, steps, told):
    for name in ("wiki", "code"):
        (tmp_path / f"{name}.txt").write_text("some text")
    mix = f'[data]\ndataset = "{tmp_path}"\nmix = {{wiki = 0.7, code = 0.3}}\n[[data.mix_changes]]\nstep = 20\nmix = {{code = 1}}\n'
    path = tmp_path / "run" / "run.toml"
    path.parent.mkdir()
    path.write_text(f'[[site]]\nname = "alpha"\n{mix}[training]\nsteps = {steps}\n')
    notes = load_site(path, "alpha").notes
    assert any("change at step 20" in note for note in notes) == told, notes


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--semi_sync.sync_every=2"], True),
        (["--semi_sync.sync_every=10"], False),
        (["--semi_sync.sync_every=2", "--semi_sync.outer_lr=0.1"], False),
        (["--semi_sync.sync_every=2", "--semi_sync.method=local_sgd"], False),
    ],
    ids=str,
)
def test_a_strong_outer_step_on_few_inner_steps_is_said(write, flags, told):
    found = [note for note in load_site(write(GOOD), "alpha", flags).notes if "overshoots" in note]
    assert len(found) == told
    assert not told or "up to 7 times as far" in found[0]


PHASE = '--regularizer.phases=[{name = "proximal", from_round = 4}]'


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([PHASE], "before round 4, from which on there is regularizer.phases[0] (proximal): the run has rounds 0 to 3"),
        ([PHASE, "--training.steps=21"], ""),
        ([PHASE, "--semi_sync.method=none"], "the run has rounds 0 to 0"),
        (["--semi_sync.round_box=tokens", "--semi_sync.round_box_size=640"], "sync_every = 5 steps are 640 tokens"),
        (["--semi_sync.round_box=tokens", "--semi_sync.round_box_size=639"], ""),
        (["--spikes.action=skip", "--spikes.window=40"], "ends before spikes are judged"),
        (["--spikes.action=skip", "--spikes.window=38"], ""),
        (["--training.global_batch_size=4", "--batch_warmup.steps=20"], "ends before the batch has grown"),
        (["--training.global_batch_size=4", "--batch_warmup.steps=19"], ""),
    ],
)
def test_what_would_come_after_the_last_step_is_said(write, flags, words):
    notes = load_site(write(GOOD), "alpha", flags).notes
    found = [note for note in notes if any(each in note for each in ("phases", "round_box", "spikes", "batch_warmup"))]
    assert (len(found) == 1 and words in found[0]) if words else not found, notes
