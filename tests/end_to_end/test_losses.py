"""Losses that weigh tokens, in real processes: nothing changes where weights are 1, and resumes are exact."""

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from tests.end_to_end.test_layouts import LAYOUTS, write_config

_LONG = ("plain", "fsdp2", "tp2", "fsdp2_tp2", "fsdp2_pp2")


def config_with(folder: Path, corpus: Path, parallelism: dict[str, int], loss: str, extra: str = "") -> Path:
    anchors = folder.parent / "anchors.jsonl"
    anchors.write_text(json.dumps({"text": "the order of operations"}) + "\n" + json.dumps({"text": "x" * 90}) + "\n")
    data = f'{{dataset = "{corpus}"}}'
    return write_config(
        folder,
        ["a"],
        [data],
        parallelism,
        f"""
[loss]
{loss.format(anchors=anchors)}
[validator]
enable = true
freq = 2
steps = 2
dataloader = {data}
{extra}
""",
    )


ADAPT = """name = "adapt"
[loss.adapt]
anchors = "{anchors}"
refresh_every = 2
"""


def train(config: Path, ranks: int, *flags: str) -> SiteRun:
    with lighthouse(1) as url:
        site = start_site(config, "a", ranks, url, "--training.global_batch_size=16", *flags)
        assert site.wait() == [0] * ranks, site.log()[-3000:]
    return site


def trajectory(site: SiteRun) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in site.lines("step")]


@pytest.mark.parametrize(
    "layout", [pytest.param(each, marks=pytest.mark.slow) if each in _LONG else each for each in LAYOUTS]
)
def test_weights_of_one_train_as_the_plain_loss_on_every_layout(layout, tmp_path, text_corpus):
    ranks, parallelism = LAYOUTS[layout]
    plain = train(config_with(tmp_path / "plain", text_corpus, parallelism, ""), ranks)
    ones = "by_source = true\n" + ADAPT + "min_weight = 1.0\nmax_weight = 1.0\n"
    weighted = train(config_with(tmp_path / "weighted", text_corpus, parallelism, ones), ranks)
    assert trajectory(weighted) == trajectory(plain)
    assert weighted.summary()["shared_state_sha256"] == plain.summary()["shared_state_sha256"]
    validations = [[line["loss"] for line in site.lines("validation")] for site in (plain, weighted)]
    assert validations[0] == validations[1] and validations[0]
    for line, step in zip(weighted.lines("loss"), plain.lines("step")):
        assert line["cross_entropy"] == pytest.approx(step["loss"], rel=1e-5)
        by_source = [part for name, part in line.items() if name.startswith("cross_entropy/")]
        assert by_source and min(by_source) <= step["loss"] * 1.00001 and max(by_source) >= step["loss"] * 0.99999


def test_a_resume_of_adapt_equals_never_having_stopped(tmp_path, text_corpus):
    loss = ADAPT + "standardize = true\nscale_outer_weight = true\n"
    checkpoints = "[checkpoint]\nenable = true\ninterval = 3\nkeep_latest_k = 0\n"
    config = config_with(tmp_path / "run", text_corpus, {}, loss, checkpoints)
    whole = trajectory(train(config, 1))
    weights = [line["weight_mean"] for line in SiteRun("a", config.parent, []).lines("loss")]
    folder = config.parent / "a"
    shutil.rmtree(folder / "checkpoint" / "step-5")
    (folder / "metrics.jsonl").unlink()
    resumed = train(config, 1)
    assert trajectory(resumed) == whole[3:]
    assert [line["weight_mean"] for line in resumed.lines("loss")] == weights[3:]
    assert len(set(weights)) == len(weights)
