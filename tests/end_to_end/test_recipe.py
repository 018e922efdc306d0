"""Spikes, a growing batch, z-loss, unigram-normalised loss and norms in real processes: the same on every layout."""

import pytest

from tests.end_to_end.forked import SiteRun, lighthouse, start_site
from tests.end_to_end.test_layouts import LAYOUTS, write_config

RECIPE = """
[loss]
z_loss = 0.01
unigram_documents = 20
[batch_warmup]
steps = 3
[spikes]
action = "skip"
window = 4
deviations = 1e-6
"""
FLAGS = ("--training.global_batch_size=16", "--metrics.parameter_norms_every=1", "--metrics.activation_norms_every=2")


def train(folder, corpus, layout: str) -> SiteRun:
    ranks, parallelism = LAYOUTS[layout]
    data = f'{{dataset = "{corpus}", shuffle = false}}'
    config = write_config(folder, ["a"], [data], parallelism, RECIPE)
    with lighthouse(1) as url:
        site = start_site(config, "a", ranks, url, *FLAGS, "--optimizer.lr=3e-2", "--training.steps=8")
        assert site.wait() == [0] * ranks, site.log()[-3000:]
    return site


def total(layers: dict[str, float]) -> float:
    return sum(each**2 for each in layers.values()) ** 0.5


def test_a_recipe_in_one_process(tmp_path, text_corpus):
    site = train(tmp_path, text_corpus, "plain")
    steps, norms = site.lines("step"), {line["step"]: line for line in site.lines("norms")}
    grown = [after["tokens"] - before["tokens"] for before, after in zip([{"tokens": 0}, *steps], steps)]
    assert grown == [64 * 4 * passes for passes in (1, 2, 3, 4, 4, 4, 4, 4)]
    spikes = {line["step"]: line for line in site.lines("spike")}
    assert spikes and min(spikes) > 2, "nothing is judged before half of the window is there"
    for step in range(1, 9):
        assert (total(norms[step]["updates"]) == 0) == (step in spikes), step
        assert ("activations" in norms[step]) == (step % 2 == 0)
        assert total(norms[step]["gradients"]) == pytest.approx(steps[step - 1]["grad_norm"], rel=1e-4)
    for line, step in zip(site.lines("loss"), steps, strict=True):
        assert step["loss"] == pytest.approx(line["cross_entropy"] + line["z_loss"], rel=1e-5)
        assert line["normalised_loss"] == pytest.approx(line["cross_entropy"] - line["unigram_ce"])
        assert 0 < line["unigram_ce"] < 8


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2", "fsdp2_tp2"])
def test_a_recipe_adds_up_on_other_layouts(layout, tmp_path, text_corpus):
    """Each layout draws a model of its own: what must be equal within it is, and what all draws have in common."""
    plain, other = train(tmp_path / "plain", text_corpus, "plain"), train(tmp_path / "other", text_corpus, layout)
    spikes, steps = {line["step"] for line in other.lines("spike")}, other.lines("step")
    assert spikes and len(steps) == 8
    for line, loss, step in zip(other.lines("norms"), other.lines("loss"), steps, strict=True):
        assert (total(line["updates"]) == 0) == (step["step"] in spikes)
        assert total(line["gradients"]) == pytest.approx(step["grad_norm"], rel=1e-4)
        assert step["loss"] == pytest.approx(loss["cross_entropy"] + loss["z_loss"], rel=1e-4)
    for kind, tolerance in {"norms": 0.2, "loss": 0.1}.items():
        mine, wanted = other.lines(kind)[1], plain.lines(kind)[1]
        assert mine.keys() == wanted.keys()
        for key in wanted.keys() - {"kind", "time", "updates", "gradients", "attention_logits", "normalised_loss"}:
            assert mine[key] == pytest.approx(wanted[key], rel=tolerance), key
    assert other.lines("norms")[1]["attention_logits"].keys() == plain.lines("norms")[1]["attention_logits"].keys()
