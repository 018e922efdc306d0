"""``titan-ext bench convergence`` at toy size: equal tokens, bytes of the ledger, tuning, and taking runs up."""

import json
import math

import pytest
import torch

from titan_ext import cli
from titan_ext.errors import RunError, UserError
from titan_ext.experiments.convergence.methods import Result, Settings, slow_beta
from titan_ext.experiments.convergence.outcome import Outcome, claims
from titan_ext.experiments.convergence.report import draw
from titan_ext.experiments.convergence.train import rate, train
from titan_ext.experiments.models import loss_of, small_llama
from titan_ext.experiments.report import tuned_outcomes
from titan_ext.experiments.runs import ResultStore, RunPool
from titan_ext.experiments.text import training_text, validation_text
from titan_ext.experiments.tuning import Run, best_rate, missing_runs

SITES, STEPS, EVERY = 2, 12, 2
SHAPE = {"dim": 32, "layers": 1, "batch": 2, "length": 16, "rank": 4}
SIZES = SHAPE | {"steps": STEPS, "sites": SITES, "sync_every": EVERY}
FLAGS = [flag for key, value in SIZES.items() for flag in (f"--{key.replace('_', '-')}", str(value))]
COMMAND = ["bench", "convergence", *FLAGS, "--corpus", "builtin:code", "--seeds", "1", "--learning-rates", "1e-2"]


def settings(**changes) -> Settings:
    rest = {"slow_beta": 0.9, "omega": 0.9, "corpus": "builtin:code", "device": "cpu"}
    return Settings(**SIZES | rest | changes)


def result(*losses: float | None, sent: int = 100, tokens: str = "same") -> Result:
    steps = [EVERY * place for place in range(1, len(losses) + 1)]
    return Result(
        steps=steps,
        losses=list(losses),
        bytes_sent=[sent * step // steps[-1] for step in steps],
        parameters=10,
        tokens_sha256=tokens,
        seconds=1.0,
        cpu_seconds=1.0,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of results after a comparison of three methods, and the command that made it."""
    folder = tmp_path_factory.mktemp("convergence")
    command = [*COMMAND, "--methods", "ddp,local_adam,des_loc", "--workers", "1", "--out", str(folder)]
    assert cli.main(command) == 0
    return folder, command


def figures_of(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1])


def test_a_repeated_command_takes_what_is_there(compared, capsys, monkeypatch):
    """... and what it prints has the bytes of the methods' formulas and the losses of the runs."""
    folder, command = compared
    monkeypatch.setattr(RunPool, "train", lambda self, runs: pytest.fail(f"trained again: {runs}"))
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    figures = figures_of(captured.out)
    sent = {row["method"]: row["bytes_sent"] for row in figures["rows"]}
    size = 4 * figures["parameters"]
    # A ring over two sites: each sends half, and then the sum of the other half.
    assert sent["ddp"] == STEPS * size
    assert sent["local_adam"] == STEPS // EVERY * 3 * size
    assert sent["des_loc"] * 2 == sent["local_adam"]
    kept = {content["run"]["method"]: content["result"] for content in map(json.loads, map(_text, folder.iterdir()))}
    assert {method: round(each["losses"][-1], 5) for method, each in kept.items()} == {
        row["method"]: row["loss"] for row in figures["rows"]
    }
    assert len({each["tokens_sha256"] for each in kept.values()}) == 1
    assert captured.err.count("found in --out") == 3
    for word in ("DDP-Adam", "Local Adam", "DES-LOC", "loss by learning rate", "expected from the papers"):
        assert word in captured.out


def test_results_of_other_settings_are_not_taken(compared, monkeypatch):
    asked = []

    def pretend(self, runs):
        for run in runs:
            asked.append(run)
            yield run, result(1.0, 0.5)

    monkeypatch.setattr(RunPool, "train", pretend)
    assert cli.main([*compared[1], "--length", "8"]) == 0
    assert asked == [Run(method, 1e-2, 0) for method in ("ddp", "local_adam", "des_loc")]


def test_a_kept_file_that_is_no_result_is_named(tmp_path):
    store = ResultStore(tmp_path, settings(), Result, lambda method: None)
    store.keep(Run("ddp", 1e-2, 0), result(1.0))
    (path,) = tmp_path.iterdir()
    assert store.find(Run("ddp", 1e-2, 0)) == result(1.0)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=f"--out {path}: not a result"):
        store.find(Run("ddp", 1e-2, 0))


def _text(path) -> str:
    return path.read_text(encoding="utf-8")


def test_text_is_that_of_the_seed_and_never_of_the_validation():
    first, again, other = (next(training_text(settings(), seed)) for seed in (0, 0, 1))
    assert len(first) == SITES
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, again))
    assert not torch.equal(first[0].inputs, first[1].inputs) and not torch.equal(first[0].inputs, other[0].inputs)
    assert torch.equal(first[0].inputs[:, 1:], first[0].labels[:, :-1]) or (first[0].positions[:, 1:] == 0).any()
    held = {tuple(row.tolist()) for batch in validation_text(settings()) for row in batch.inputs}
    seen = {tuple(row.tolist()) for batch in first for row in batch.inputs}
    assert held and not held & seen


def test_a_step_of_data_parallelism_is_adams_on_the_mean_of_the_sites_gradients():
    sizes, run = settings(steps=2, sync_every=1), Run("ddp", 1e-2, 3)
    model = small_llama(sizes, run.seed)
    parameters = dict(model.named_parameters())
    gradients = []
    for batch in next(training_text(sizes, run.seed)):
        model.zero_grad()
        loss_of(model, batch).backward()
        gradients.append({name: each.grad.clone() for name, each in parameters.items()})
    mean = {name: sum(each[name] for each in gradients) / SITES for name in parameters}
    norm = math.sqrt(sum(float(each.square().sum()) for each in mean.values()))
    clipped = {name: each / max(1.0, norm) for name, each in mean.items()}
    # Adam's first step, its bias corrected, is the gradient over its own size.
    with torch.no_grad():
        for name, each in parameters.items():
            each.sub_(run.lr * rate(0, steps=2) * clipped[name] / (clipped[name].abs() + 1e-8))
        validation = validation_text(sizes)
        total = sum(float(loss_of(model, batch)) * batch.labels.numel() for batch in validation)
    tokens = sum(each.labels.numel() for each in validation)
    assert train(sizes, run).losses[0] == pytest.approx(total / tokens, rel=1e-5)


def test_synced_after_each_step_sites_with_local_states_measure_one_model():
    """Parameters averaged after each step: what is measured is the mean, and fewer syncs send less."""
    often = train(settings(steps=4, sync_every=1), Run("fedavg", 1e-2, 0))
    seldom = train(settings(steps=4, sync_every=4), Run("fedavg", 1e-2, 0))
    assert often.bytes_sent[-1] == 4 * seldom.bytes_sent[-1] > 0
    assert often.tokens_sha256 == seldom.tokens_sha256
    assert often.steps == [1, 2, 3, 4] and seldom.steps == [4]


def test_a_run_that_diverges_ends_early():
    found = train(settings(), Run("diloco", 1e30, 0))
    assert found.losses == [None] and found.loss == math.inf


def test_the_learning_rate_rises_stays_and_falls():
    rates = [rate(step, steps=60) for step in range(60)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:55] == [1.0] * 45
    assert rates[54:] == pytest.approx([1 - math.sqrt(place / 6) for place in range(6)])


def tune(losses: dict[float, float], grid: list[float], seeds: int) -> tuple[list[float], dict[Run, Result]]:
    """Learning rates in the order in which they were asked for, and all results."""
    done: dict[Run, Result] = {}
    asked = []
    while wanted := missing_runs({"ddp": grid}, seeds, done):
        asked += [run.lr for run in wanted if run.seed == 0]
        done |= {run: result(losses.get(run.lr, 9.0)) for run in wanted}
    return asked, done


def test_a_grid_is_widened_until_its_best_rate_has_neighbours():
    asked, done = tune({0.4: 1.0, 0.2: 2.0, 0.1: 3.0, 0.05: 4.0}, [0.05, 0.1], seeds=3)
    assert asked == [0.05, 0.1, 0.2, 0.4, 0.8] and best_rate("ddp", done) == 0.4
    assert sorted(run.seed for run in done if run.lr == 0.4) == [0, 1, 2]
    assert tune({0.1: 1.0}, [0.05, 0.1, 0.2], seeds=1)[0] == [0.05, 0.1, 0.2]
    assert tune({0.025: 1.0}, [0.05, 0.1], seeds=1)[0][:2] == [0.05, 0.1]
    assert tune({}, [0.1], seeds=2)[0] == [0.1]


def test_widening_has_an_end():
    falling = {0.1 * 2.0**place: 5.0 - place for place in range(20)}
    assert len(tune({float(f"{lr:.4g}"): loss for lr, loss in falling.items()}, [0.1, 0.2], seeds=1)[0]) == 6


def test_the_slow_momentum_lasts_the_same_share_of_any_run():
    assert slow_beta(40960) == 0.999
    halved = {steps: math.log(0.5) / math.log(slow_beta(steps)) / steps for steps in (1152, 4096)}
    assert halved[1152] == pytest.approx(0.0169, rel=0.01) == halved[4096]


def outcome(method: str, *last: float, sent: int = 100) -> Outcome:
    return Outcome(method, 1e-2, {1e-2: last[0]}, [result(3.0, each, sent=sent) for each in last])


def test_claims_go_by_noise_and_bytes():
    found = {
        "ddp": outcome("ddp", 1.00, 1.02),
        "local_adam": outcome("local_adam", 1.10, 1.12, sent=60),
        "des_loc": outcome("des_loc", 1.11, 1.13, sent=30),
        "mt_dao": outcome("mt_dao", 1.01, 1.03, sent=60),
        "low_rank_ddp": outcome("low_rank_ddp", 1.2, 1.2),
        "lordo": outcome("lordo", 1.25, 1.25, sent=9),
    }
    assert [each["holds"] for each in claims(found)] == [True, True, False]
    assert "perplexity +5.13%; 11.1 times fewer bytes" in claims(found)[2]["figures"]
    found["des_loc"] = outcome("des_loc", 1.11, 1.13, sent=31)
    found["mt_dao"] = outcome("mt_dao", 1.05, 1.07, sent=60)
    found["lordo"] = outcome("lordo", 1.205, 1.205, sent=9)
    assert [each["holds"] for each in claims(found)] == [False, False, True]
    assert claims({"ddp": found["ddp"]}) == []


def test_steps_to_a_target_lie_between_measurements():
    found = outcome("ddp", 1.0)
    assert found.steps_to(2.0) == pytest.approx(1.5 * EVERY)
    assert found.steps_to(4.0) == EVERY and found.steps_to(0.9) is None


def test_results_on_other_tokens_are_refused():
    done = {Run("ddp", 1e-2, 0): result(1.0), Run("fedavg", 1e-2, 0): result(1.0, tokens="other")}
    with pytest.raises(RunError, match="fedavg, seed 0: trained on other tokens"):
        tuned_outcomes(Outcome, ["ddp", "fedavg"], 1, done)


def test_the_plot_is_written_twice(tmp_path):
    pytest.importorskip("matplotlib")
    files = draw([outcome("ddp", 1.0), outcome("local_adam", 1.2, 1.3)], tmp_path / "curves")
    assert [file.name for file in files] == ["curves.png", "curves.svg"]
    assert all(file.stat().st_size > 1000 for file in files)
