"""``titan-ext bench abbie`` at toy size: equal tokens and sizes for all, the readings of D, and taking runs up."""

import json
import math

import pytest
import torch

from titan_ext import cli
from titan_ext.errors import RunError
from titan_ext.experiments.abbie.outcome import Outcome, claims, outcomes
from titan_ext.experiments.abbie.report import draw, rows, tables
from titan_ext.experiments.abbie.speed import compare
from titan_ext.experiments.abbie.train import build_model, drift, loss_of, rescaled_loss, train, validation_loss
from titan_ext.experiments.abbie.variants import VARIANTS, Result, Settings, training_of
from titan_ext.experiments.report import TunedOutcome
from titan_ext.experiments.runs import RunPool
from titan_ext.experiments.text import training_text, validation_text
from titan_ext.experiments.tuning import Run

STEPS, BATCH, LENGTH = (2, 4), 2, 16
ITERATIONS = (1, 2, 4, 8)
SIZES = ["--steps", "2,4", "--batch", str(BATCH), "--length", str(LENGTH), "--corpus", "builtin:code"]
COMMAND = ["bench", "abbie", *SIZES, "--learning-rates", "8e-3", "--seeds", "1"]
CHOSEN = [*COMMAND, "--variants", "standard,c,d_prev,d_input"]
TRAININGS = {training_of(variant) for variant in VARIANTS}


def settings(**changes) -> Settings:
    sizes = {"flavor": "micro", "steps": STEPS, "batch": BATCH, "length": LENGTH, "iterations": ITERATIONS}
    return Settings(**sizes | {"corpus": "builtin:code", "device": "cpu", "compile": False} | changes)


def result(*losses: tuple, variant: str = "c", tokens: str = "same", rescaled: tuple = ()) -> Result:
    """With the losses of each length."""
    same = [[1.0] * len(each) for each in losses]
    return Result(
        trained_loss=losses[-1][0],
        losses={variant: [list(each) for each in losses]},
        rescaled={variant: [list(each) for each in rescaled or losses]},
        cosines={variant: same},
        sizes={variant: same},
        parameters=10,
        tokens=[20] * len(losses),
        tokens_sha256=tokens,
        seconds=1.0,
    )


def outcome(variant: str, *seeds: Result, **changes) -> Outcome:
    return Outcome(variant, settings(**changes), TunedOutcome(variant, 1e-3, {1e-3: 1.0}, list(seeds)))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of results after a comparison of all variants, and the command that made it."""
    folder = tmp_path_factory.mktemp("abbie")
    command = [*CHOSEN, "--out", str(folder)]
    assert cli.main(command) == 0
    return folder, command


def figures_of(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1])


def test_runs_have_equal_tokens_and_parameters_and_are_taken_up(compared, capsys, monkeypatch):
    folder, command = compared
    monkeypatch.setattr(RunPool, "train", lambda self, runs: pytest.fail(f"trained again: {runs}"))
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert captured.err.count("found in --out") == 3
    kept = [json.loads(path.read_text(encoding="utf-8"))["result"] for path in folder.iterdir()]
    assert len({each["tokens_sha256"] for each in kept}) == 1
    assert {tuple(each["tokens"]) for each in kept} == {tuple(steps * BATCH * LENGTH for steps in STEPS)}
    found = figures_of(captured.out)["rows"]
    own = [row for row in found if row["part"] == "standard"]
    assert [(row["variant"], row["steps"]) for row in own] == [
        (variant, steps) for steps in STEPS for variant in ("standard", "c", "d_prev", "d_input")
    ]
    assert len({row["parameters"] for row in own}) == 1
    for row in own:
        assert row["gap"] == pytest.approx(row["losses"][0] - own[4 * STEPS.index(row["steps"])]["losses"][0], abs=2e-5)
    for word in ("tokens a parameter", "rescaled rise at 4", "D, input", "expected, and what came out"):
        assert word in captured.out


def test_all_variants_are_of_one_size():
    sizes = {
        variant: sum(each.numel() for each in build_model(settings(), variant, 0).parameters()) for variant in TRAININGS
    }
    deep, depth = sizes.pop("d_deep"), sizes.pop("depth")
    assert len(set(sizes.values())) == 1
    assert depth == pytest.approx(sizes["standard"], rel=0.005) and deep > 1.8 * sizes["standard"]


def test_two_readings_of_one_training_differ_beyond_its_iterations_only(compared, capsys):
    assert cli.main(compared[1]) == 0
    rows_of = [row for row in figures_of(capsys.readouterr().out)["rows"] if row["part"] == "beyond"]
    found = {row["variant"]: row for row in rows_of}
    assert found["d_prev"]["rise_at_1"] == found["d_input"]["rise_at_1"]
    for count in (4, 8):
        assert found["d_prev"][f"rise_at_{count}"] != found["d_input"][f"rise_at_{count}"]


def test_results_of_other_settings_are_not_taken(compared, monkeypatch):
    asked = []

    def pretend(self, runs):
        for run in runs:
            asked.append(run)
            yield run, result(*[[1.0] * len(ITERATIONS)] * len(STEPS))

    monkeypatch.setattr(RunPool, "train", pretend)
    assert cli.main([*compared[1], "--variants", "c", "--length", "8", "--seeds", "2"]) == 0
    assert asked == [Run("c", 8e-3, 0), Run("c", 8e-3, 1)]


def test_each_length_is_as_if_it_were_trained_alone():
    """The decay of a shorter one leaves no trace in the longer."""
    run = Run("d_prev", 1e-2, 3)
    together, *alone = (train(settings(steps=steps), run) for steps in ((5, 10), (5,), (10,)))
    for place, each in enumerate(alone):
        assert together.losses["d_prev"][place] == each.losses["d_prev"][0]
    assert together.tokens_sha256 == alone[1].tokens_sha256 != alone[0].tokens_sha256


def test_a_step_is_adams_on_the_clipped_gradient_and_the_loss_is_that_of_held_out_text():
    sizes, run = settings(steps=(1,)), Run("c", 1e-2, 3)
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
    assert found.losses["c"][0][ITERATIONS.index(4)] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found.trained_loss == found.losses["c"][0][ITERATIONS.index(2)]


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
        # Its norm alone changes, which rescaling takes back.
        trained = validation_loss(models[variant], [batch], 2)
        assert rescaled_loss(models[variant], [batch], 8) == pytest.approx(trained, rel=1e-5)
        assert (validation_loss(models[variant], [batch], 8) == pytest.approx(trained, rel=1e-5)) is (growth == 1.0)
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


def losses(*values: tuple, shift: float = 0.0) -> tuple:
    return tuple(tuple(each + shift for each in row) for row in values)


def two(variant: str, first: tuple, last: tuple, rescaled: tuple = (), by: float = 0.1, apart: float = 0.0) -> Outcome:
    """Two seeds, ``by`` apart, after two lengths of training; the second seed differs in its last length by ``apart``."""
    other = tuple(each + apart for each in last)
    kept = (first, rescaled or last)
    return outcome(
        variant,
        result(first, last, variant=variant, rescaled=kept),
        result(*losses(first, other, shift=by), variant=variant, rescaled=losses(*kept, shift=by)),
    )


def test_claims_go_by_intervals_over_differences_of_the_same_seed():
    found = {
        "standard": two("standard", (1.5, 1.6, 1.7, 1.8), (1.4, 1.5, 1.6, 1.7)),
        "c": two("c", (1.6, 1.52, 1.6, 1.7), (1.5, 1.36, 1.40, 1.66)),
        "d_prev": two("d_prev", (1.6, 1.45, 1.5, 1.6), (1.3, 1.38, 1.39, 1.4), rescaled=(1.38, 1.38, 1.381, 1.382)),
        "d_input": two("d_input", (1.6, 1.45, 1.5, 1.6), (1.3, 1.38, 1.37, 1.60)),
        "d_deep": two("d_deep", (1.5, 1.4, 1.5, 1.6), (1.4, 1.3, 1.302, 1.31), apart=0.001),
    }
    made = claims(found, settings())
    held = {each["claim"].removeprefix("beyond, 4 steps: "): each["holds"] for each in made}
    assert held["standard, 2 steps: C at 2 iterations is below the standard decoder"] is False
    assert held["standard, 4 steps: C at 2 iterations is below the standard decoder"] is True
    texts = {each["claim"]: each["figures"] for each in made}
    for label, start in (("C", 4), ("D, prev", 2)):
        name = f"standard, {label} is below the standard decoder from some length of training on"
        assert held[name] is True and texts[name] == f"from {start} steps on"
    assert texts["standard, 4 steps: D, prev at 2 iterations is below the standard decoder"] == "-0.0200 ± 0.0000 nats"
    assert held["D, input at 4 iterations is below itself at 2"] is True
    assert held["D, prev at 4 iterations is below itself at 2"] is False
    assert held["D, prev: at 4 the norm of the latent is what raises its loss"] is True
    assert held["C: at 4 the norm of the latent is what raises its loss"] is False
    assert held["D, prev: its rise at 8 is less than after 2 steps"] is True
    assert held["D, prev: its rise at 4 is more than that of D, prev, twice the blocks"] is True
    assert held["C at 2 iterations is below itself at 1"] is True
    assert held["D, prev at 2 iterations is below itself at 1"] is False
    far = "rises far less than C from 2 to 8 iterations (at most 50%)"
    assert held[f"D, prev {far}"] is True and held[f"D, input {far}"] is False
    assert "D, input: at 4 the norm of the latent is what raises its loss" not in held


def test_a_difference_within_its_interval_does_not_count():
    found = {
        "standard": two("standard", (1.5,) * 4, (1.4,) * 4),
        "c": two("c", (1.4,) * 4, (1.38,) * 4, apart=0.02),
    }
    held = {each["claim"]: each["holds"] for each in claims(found, settings())}
    assert held["standard, 2 steps: C at 2 iterations is below the standard decoder"] is True
    assert held["standard, C is below the standard decoder from some length of training on"] is False


def test_a_run_that_diverged_has_no_number():
    own = outcome("c", result((1.0, None), (1.0, None)), result((1.2, 1.3), (1.2, 1.4)), iterations=(1, 2))
    standard, _, beyond, _ = rows({"c": own}, own.settings)
    assert standard["loss"] is None and standard["losses"] == [None, 1.3] and "gap" not in standard
    assert beyond["rise_at_1"] is None and beyond["rise_at_1_half_width"] is None
    assert "-" in "".join(tables([standard, beyond]))


def test_results_on_other_tokens_are_refused():
    one = [[1.0]]
    done = {
        Run("c", 1e-3, 0): result(*one),
        Run("standard", 1e-3, 0): result(*one, variant="standard", tokens="other"),
    }
    with pytest.raises(RunError, match="seed 0: trained on other tokens"):
        outcomes(["c", "standard"], settings(steps=(1,), iterations=(2,)), 1, done)


def test_the_plot_is_written_twice(tmp_path):
    pytest.importorskip("matplotlib")
    found = {
        "standard": two("standard", (1.5,) * 4, (1.4,) * 4),
        "c": two("c", (1.4,) * 4, (1.38,) * 4, apart=0.02),
    }
    files = draw(rows(found, settings()), tmp_path / "curves")
    assert [file.name for file in files] == ["curves.png", "curves.svg"]
    assert all(file.stat().st_size > 1000 for file in files)
