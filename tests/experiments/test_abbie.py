"""``titan-ext bench abbie`` at toy size: equal tokens and sizes for all, the readings of D, and taking runs up."""

import json
import math

import pytest
import torch

from titan_ext import cli
from titan_ext.errors import RunError
from titan_ext.experiments.abbie.outcome import Outcome, claims, outcomes
from titan_ext.experiments.abbie.report import draw, perplexities, rows
from titan_ext.experiments.abbie.speed import compare
from titan_ext.experiments.abbie.train import build_model, drift, loss_of, train
from titan_ext.experiments.abbie.variants import VARIANTS, Result, Settings, training_of
from titan_ext.experiments.runs import RunPool
from titan_ext.experiments.text import training_text, validation_text
from titan_ext.experiments.tuning import Run

STEPS, BATCH, LENGTH = 2, 2, 16
ITERATIONS = (1, 2, 4, 8)
SIZES = ["--steps", str(STEPS), "--batch", str(BATCH), "--length", str(LENGTH), "--corpus", "builtin:code"]
COMMAND = ["bench", "abbie", *SIZES, "--seeds", "1", "--speed-turns", "0"]
TRAININGS = {training_of(variant) for variant in VARIANTS}


def settings(**changes) -> Settings:
    sizes = {"flavor": "tiny", "steps": STEPS, "batch": BATCH, "length": LENGTH, "iterations": ITERATIONS}
    return Settings(**sizes | {"corpus": "builtin:code", "device": "cpu", "compile": False} | changes)


def result(*losses: float | None, variant: str = "c", tokens: str = "same") -> Result:
    values = list(losses)
    return Result(
        trained_loss=values[0],
        losses={variant: values},
        cosines={variant: [1.0] * len(values)},
        sizes={variant: [1.0] * len(values)},
        parameters=10,
        tokens=20,
        tokens_sha256=tokens,
        seconds=1.0,
    )


def outcome(variant: str, *seeds: tuple[float | None, ...]) -> Outcome:
    return Outcome(variant, ITERATIONS[: len(seeds[0])], [result(*losses, variant=variant) for losses in seeds])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of results after a comparison of all variants, and the command that made it."""
    folder = tmp_path_factory.mktemp("abbie")
    command = [*COMMAND, "--out", str(folder)]
    assert cli.main(command) == 0
    return folder, command


def figures_of(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1])


@pytest.mark.slow
def test_all_variants_have_equal_tokens_and_parameters_and_are_taken_up(compared, capsys, monkeypatch):
    folder, command = compared
    monkeypatch.setattr(RunPool, "train", lambda self, runs: pytest.fail(f"trained again: {runs}"))
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert captured.err.count("found in --out") == len(TRAININGS)
    kept = [json.loads(path.read_text(encoding="utf-8"))["result"] for path in folder.iterdir()]
    assert len({each["tokens_sha256"] for each in kept}) == 1
    assert {each["tokens"] for each in kept} == {STEPS * BATCH * LENGTH}
    figures = figures_of(captured.out)
    found = {row["variant"]: row for row in figures["rows"]}
    assert list(found) == list(VARIANTS)
    sizes = {variant: row["parameters"] for variant, row in found.items()}
    assert len({size for variant, size in sizes.items() if variant != "depth"}) == 1
    assert sizes["depth"] == pytest.approx(sizes["standard"], rel=0.005)
    for row in figures["rows"]:
        assert list(row["perplexity"]) == ["1", "2", "4", "8"]
        assert row["perplexity"] == pytest.approx(
            {count: math.exp(loss) for count, (loss,) in row["losses"].items()}, rel=1e-4
        )
    for word in ("perplexity at iterations", "tail's input at iterations", "depth recurrence", "D, prev, norm"):
        assert word in captured.out
    assert figures["speed"] == []


def test_two_readings_of_one_training_differ_beyond_its_iterations_only(compared, capsys):
    assert cli.main(compared[1]) == 0
    found = {row["variant"]: row["losses"] for row in figures_of(capsys.readouterr().out)["rows"]}
    for count in "12":
        assert found["d_prev"][count] == found["d_input"][count]
    for count in "48":
        assert found["d_prev"][count] != found["d_input"][count]


def test_results_of_other_settings_are_not_taken(compared, monkeypatch):
    asked = []

    def pretend(self, runs):
        for run in runs:
            asked.append(run)
            yield run, result(*[1.0] * len(ITERATIONS))

    monkeypatch.setattr(RunPool, "train", pretend)
    assert cli.main([*compared[1], "--variants", "c", "--length", "8", "--seeds", "2"]) == 0
    assert asked == [Run("c", 2e-3, 0), Run("c", 2e-3, 1)]


def test_a_step_is_adams_on_the_clipped_gradient_and_the_loss_is_that_of_held_out_text():
    sizes, run = settings(steps=1), Run("c", 1e-2, 3)
    model = build_model(sizes, "c", run.seed)
    ((batch,),) = [next(training_text(sizes, run.seed))]
    loss_of(model, batch).backward()
    norm = math.sqrt(sum(float(each.grad.square().sum()) for each in model.parameters()))
    with torch.no_grad():
        for each in model.parameters():
            gradient = each.grad / max(1.0, norm)
            # Adam's first step, its bias corrected, is the gradient over its own size.
            each.mul_(1 - run.lr * 0.1).sub_(run.lr * gradient / (gradient.abs() + 1e-8))
        losses = [float(loss_of(model.eval(), each, 4)) for each in validation_text(sizes)]
    found = train(sizes, run)
    assert found.losses["c"][ITERATIONS.index(4)] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found.trained_loss == found.losses["c"][ITERATIONS.index(2)]


def test_the_drift_of_a_body_that_computes_nothing():
    """Without what its blocks add, C stays where the head left it, and D doubles it with each iteration."""
    models = {variant: build_model(settings(), variant, 0).eval() for variant in ("c", "d_prev")}
    for model in models.values():
        with torch.no_grad():
            for layer in model.config.body:
                block = model.layers[str(layer)]
                block.attention.wo.weight.zero_()
                block.feed_forward.w2.weight.zero_()
    batch = validation_text(settings())[0]
    for variant, growth in (("c", 1.0), ("d_prev", 2.0)):
        cosines, sizes = drift(models[variant], batch, ITERATIONS)
        assert cosines == pytest.approx([1.0] * len(ITERATIONS))
        assert sizes == pytest.approx([growth ** (count - 2) for count in ITERATIONS])


def test_the_noise_of_depth_recurrence_is_the_seeds():
    batch = validation_text(settings())[0]
    first, other = (build_model(settings(), "depth", seed) for seed in (0, 1))
    other.load_state_dict(first.state_dict())
    assert not torch.equal(*(loss_of(model.train(), batch) for model in (first, other)))


def test_speed_is_measured_at_equal_operations():
    theirs, ours = compare(settings(), 1, compiled=False)
    assert theirs["operations"] == ours["operations"] and theirs["applied_blocks"] == ours["applied_blocks"]
    assert theirs["parameters"] > ours["parameters"]
    # Both keep the same for backward, apart from the state that the skip makes; gradients are fewer.
    assert ours["memory_bytes"] < theirs["memory_bytes"]
    assert theirs["speed_ratio"] == theirs["memory_ratio"] == 1.0
    assert ours["tokens_per_second"] > 0


def test_claims_go_by_differences_of_the_same_seed():
    found = {
        "standard": outcome("standard", (1.40, 1.5, 1.6, 1.7), (1.30, 1.4, 1.5, 1.6)),
        "depth": outcome("depth", (1.8, 1.4, 1.5, 1.6), (1.8, 1.4, 1.5, 1.6)),
        "c": outcome("c", (1.38, 1.36, 1.4, 1.66), (1.28, 1.26, 1.3, 1.56)),
        "d_prev": outcome("d_prev", (1.4, 1.38, 1.4, 1.5), (1.3, 1.28, 1.3, 1.4)),
        "d_input": outcome("d_input", (1.4, 1.38, 1.4, 1.54), (1.3, 1.28, 1.3, 1.44)),
    }
    held = {each["claim"].split(":")[0].split(" (")[0]: each["holds"] for each in claims(found, ITERATIONS)}
    assert held == {
        "C": True,
        "D, prev": True,
        "D at 2 iterations is below the standard decoder's perplexity": True,
        "D, input": False,
        "D at 4 iterations is below D at 2": False,
        "depth recurrence loses more than D where trained for 2 iterations and run with 1": True,
        "depth recurrence loses more than D where trained for 2 iterations and run with 8": True,
    }
    assert "loss -0.0200, noise 0.0000; perplexity -2.0%" in claims(found, ITERATIONS)[2]["figures"]
    found["d_prev"] = outcome("d_prev", (1.4, 1.43, 1.4, 1.5), (1.3, 1.28, 1.3, None))
    fewer = {variant: found[variant] for variant in ("standard", "d_prev")}
    assert [each["holds"] for each in claims(fewer, ITERATIONS)] == [False, False]
    assert claims({"c": found["c"]}, (1, 4)) == []


def test_a_run_that_diverged_has_no_number():
    (row,) = rows([outcome("c", (1.0, None), (1.2, None))])
    assert row["perplexity"] == {"1": pytest.approx((math.e + math.exp(1.2)) / 2, rel=1e-4), "2": None}
    assert row["deviation"]["1"] == pytest.approx((math.exp(1.2) - math.e) / math.sqrt(2), rel=1e-4)
    assert perplexities([row])[1].split() == ["C", "3.019", "±0.426", "diverged"]


def test_results_on_other_tokens_are_refused():
    done = {Run("c", 1e-3, 0): result(1.0), Run("standard", 1e-3, 0): result(1.0, variant="standard", tokens="other")}
    with pytest.raises(RunError, match="seed 0: trained on other tokens"):
        outcomes(["c", "standard"], (1,), 1e-3, 1, done)


def test_the_plot_is_written_twice(tmp_path):
    pytest.importorskip("matplotlib")
    files = draw(rows([outcome("c", (1.0, 1.2), (1.1, None))]), tmp_path / "curves")
    assert [file.name for file in files] == ["curves.png", "curves.svg"]
    assert all(file.stat().st_size > 1000 for file in files)
