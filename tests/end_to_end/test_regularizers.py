"""Regularisers in real processes: nothing changes where they weigh nothing, and a resume is exact."""

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from tests.end_to_end.test_layouts import LAYOUTS, write_config
from tests.end_to_end.test_losses import trajectory

_LONG = ("fsdp2", "tp2", "pp2", "fsdp2_tp2", "fsdp2_pp2")
CHECKPOINTS = "[checkpoint]\nenable = true\ninterval = 3\nkeep_latest_k = 0\n"


def phase(name: str, **settings: float) -> str:
    return "\n".join(
        ["[[regularizer.phases]]", f'name = "{name}"', *(f"{key} = {value}" for key, value in settings.items())]
    )


def config_with(folder: Path, corpus: Path, parallelism: dict[str, int], extra: str) -> Path:
    return write_config(folder, ["a"], [f'{{dataset = "{corpus}"}}'], parallelism, extra)


def train(config: Path, ranks: int, *flags: str) -> SiteRun:
    with lighthouse(1) as url:
        site = start_site(config, "a", ranks, url, "--training.global_batch_size=16", *flags)
        assert site.wait() == [0] * ranks, site.log()[-3000:]
    return site


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=pytest.mark.slow) if each in _LONG else each for each in LAYOUTS]
)
def test_a_strength_of_0_trains_as_the_plain_run_on_every_layout(layout, tmp_path, text_corpus):
    ranks, parallelism = LAYOUTS[layout]
    plain = train(config_with(tmp_path / "plain", text_corpus, parallelism, ""), ranks)
    names = ["proximal", "ewc"] if "pp" in layout else ["proximal", "ewc", "distillation"]
    phases = "\n".join(phase(name, strength=0.0, **({"fisher_batches": 2} if name == "ewc" else {})) for name in names)
    kept = train(config_with(tmp_path / "kept", text_corpus, parallelism, phases), ranks)
    assert trajectory(kept) == trajectory(plain)
    assert kept.summary()["shared_state_sha256"] == plain.summary()["shared_state_sha256"]


def test_regularizers_act_in_their_rounds_and_a_resume_is_exact(tmp_path, text_corpus):
    """Rounds come after steps 2 and 4: EWC in the second, distillation from the second on."""
    phases = "\n".join(
        [
            phase("ewc", from_round=1, until_round=2, strength=1e6, fisher_batches=2),
            phase("distillation", from_round=1, strength=0.5, temperature=2.0),
        ]
    )
    plain = train(config_with(tmp_path / "plain", text_corpus, {}, ""), 1)
    config = config_with(tmp_path / "run", text_corpus, {}, phases + "\n" + CHECKPOINTS)
    whole = trajectory(train(config, 1))
    assert whole[:2] == trajectory(plain)[:2] and whole[2] != trajectory(plain)[2]
    lines = {line["step"]: line for line in SiteRun("a", config.parent, []).lines("loss")}
    assert "divergence" not in lines[2]
    assert lines[3]["divergence"] == pytest.approx(0, abs=1e-4), "a round's first step is at the received model"
    assert lines[4]["divergence"] > 1e-3
    folder = config.parent / "a"
    shutil.rmtree(folder / "checkpoint" / "step-5")
    (folder / "metrics.jsonl").unlink()
    assert trajectory(train(config, 1)) == whole[3:]


def test_without_an_outer_loop_the_start_is_what_was_received(tmp_path, text_corpus):
    """Adaptation of a trained model, stopped and resumed: the start is kept in its checkpoints."""
    extra = phase("proximal", strength=50.0) + "\n" + CHECKPOINTS
    config = config_with(tmp_path / "run", text_corpus, {}, extra)
    alone = ("--semi_sync.method=none", "--semi_sync.sync_every=none", "--metrics.parameter_norms_every=1")
    whole = trajectory(train(config, 1, *alone))
    folder = config.parent / "a"
    shutil.rmtree(folder / "checkpoint" / "step-5")
    (folder / "metrics.jsonl").unlink()
    assert trajectory(train(config, 1, *alone)) == whole[3:]


def test_a_method_without_a_received_model_is_refused(tmp_path, text_corpus):
    config = config_with(tmp_path, text_corpus, {}, phase("proximal"))
    with lighthouse(1) as url:
        site = start_site(config, "a", 1, url, "--semi_sync.method=noloco")
        assert site.wait() != [0]
    assert 'semi_sync.method = "noloco" keeps no copy of what sites receive' in site.log()
