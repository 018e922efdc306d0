"""``titan-ext bench dept`` at toy size: who shares what, equal text for all, costs by formula, and taking runs up."""

import json
import math

import pytest
import torch

from tests.experiments.conftest import LANGUAGES, SIZES, UNSEEN
from titan_ext import cli
from titan_ext.errors import RunError
from titan_ext.experiments.dept import command as dept
from titan_ext.experiments.dept.arms import ARMS, Result, Settings, mean_normalised
from titan_ext.experiments.dept.outcome import Costs, Outcome, claims, common_target, costs
from titan_ext.experiments.dept.pretrain import body_of, pretrain, table_of
from titan_ext.experiments.dept.report import draw, row
from titan_ext.experiments.dept.text import Texts, make_tokenizers
from titan_ext.experiments.report import steps_to, tuned_outcomes
from titan_ext.experiments.runs import RunPool
from titan_ext.experiments.tuning import Run


@pytest.fixture(scope="module")
def sizes(corpus) -> Settings:
    rest = {"keep_inner_state": False, "adapt_lr": 1e-2, "device": "cpu"}
    return Settings(corpus=str(corpus), languages=LANGUAGES, unseen=UNSEEN, **SIZES, **rest)


@pytest.fixture(scope="module")
def texts(sizes, tmp_path_factory) -> Texts:
    folder = tmp_path_factory.mktemp("tokenizers")
    make_tokenizers(sizes, folder)
    return Texts(sizes, folder)


@pytest.fixture(scope="module")
def compared(command, tmp_path_factory):
    """The folder of results after a comparison of all arms, and the command that made it."""
    folder = tmp_path_factory.mktemp("dept")
    whole = [*command, "--arms", ",".join(ARMS), "--out", str(folder)]
    assert cli.main(whole) == 0
    return folder, whole


def measured(*losses: float | None, unigram: float = 1.0) -> dict:
    return {"steps": list(range(len(losses))), "losses": {"latin": list(losses)}, "unigram": {"latin": unigram}}


def result(continued: float | None, *adapted: float | None, tokens: str = "same") -> Result:
    return Result(
        pretrained=measured(2.0),
        continued=measured(continued),
        adapted=measured(*adapted),
        body=100,
        joint_vocabulary=10,
        vocabularies=[4, 6],
        embeddings=[20, 30],
        bytes_a_round=[400, 400],
        tokens_sha256=tokens,
        seconds=1.0,
        cpu_seconds=1.0,
    )


def outcome(arm: str, *runs: Result) -> Outcome:
    return Outcome(arm, 1e-2, {1e-2: 0.0}, list(runs))


@pytest.mark.slow
def test_a_repeated_command_takes_what_is_there(compared, capsys, monkeypatch):
    """... and all arms end in trainings on the same tokens, with the costs of the formulas."""
    folder, whole = compared
    monkeypatch.setattr(RunPool, "train", lambda self, runs: pytest.fail(f"trained again: {runs}"))
    assert cli.main(whole) == 0
    captured = capsys.readouterr()
    assert captured.err.count("found in --out") == len(ARMS)
    kept = [json.loads(path.read_text(encoding="utf-8"))["result"] for path in folder.iterdir()]
    assert len({each["tokens_sha256"] for each in kept}) == 1
    figures = json.loads(captured.out.strip().splitlines()[-1])
    found = {each["arm"]: each for each in figures["rows"]}
    assert list(found) == list(ARMS)
    for each in found.values():
        assert list(each["normalised"]) == list(LANGUAGES) and all(map(math.isfinite, each["normalised"].values()))
        assert [step for step, _ in each["adapted_curve"]] == [0, 1, 2]
        assert each["parameters"] >= each["parameters_by_formula"]
    for arm in ("spec", "spec-opt"):
        assert found[arm]["bytes_a_round"] == found[arm]["bytes_a_round_by_formula"] == 4 * figures["body"]
    assert found["std"]["bytes_a_round"] == SIZES["sync_every"] * found["glob"]["bytes_a_round"]
    assert found["trim"]["embedding"] == found["spec"]["embedding"] < found["glob"]["embedding"]
    assert len(figures["claims"]) == 2 * (len(ARMS) - 1) + len(ARMS)
    for word in ("SPEC-OPT", "perplexity", f"{UNSEEN} after step", "sent a round", "expected from the paper"):
        assert word in captured.out


def test_results_of_other_settings_are_not_taken(compared, monkeypatch):
    asked = []

    def pretend(self, runs):
        for run in runs:
            asked.append(run)
            yield run, result(1.0, 2.0, 1.0)

    monkeypatch.setattr(RunPool, "train", pretend)
    monkeypatch.setattr(dept, "_print", lambda figures: None)
    monkeypatch.setattr("titan_ext.experiments.dept.report.row", lambda *_: {})
    assert cli.main([*compared[1], "--keep-inner-state"]) == 0
    assert asked == [Run(arm, 1e-2, 0) for arm in ARMS]


@pytest.mark.parametrize("arm", ["glob", "trim", "spec", "spec-opt"])
def test_after_a_round_the_sites_agree_on_what_they_share(arm, sizes, texts):
    first, second = pretrain(sizes, texts, Run(arm, 1e-2, 0)).models
    bodies = body_of(first), body_of(second)
    assert all(torch.equal(bodies[0][name], bodies[1][name]) for name in bodies[0])
    tables = table_of(first), table_of(second)
    if ARMS[arm].vocabulary == "own":
        return
    if arm == "glob":
        assert torch.equal(*tables)
        return
    ids = [texts.row_ids(language, len(table)).ids.tolist() for language, table in zip(LANGUAGES, tables)]
    common = sorted(set(ids[0]) & set(ids[1]) - {-1})
    ours, theirs = (table[[each.index(token) for token in common]] for each, table in zip(ids, tables))
    assert common and torch.equal(ours, theirs) == (arm == "trim")


def test_what_the_inner_optimizer_keeps_changes_what_follows_a_round(sizes, texts):
    kept = Settings(**{name: getattr(sizes, name) for name in Settings.__slots__} | {"keep_inner_state": True})
    bodies = [body_of(pretrain(each, texts, Run("glob", 1e-2, 0)).models[0]) for each in (sizes, kept)]
    assert any(not torch.equal(bodies[0][name], bodies[1][name]) for name in bodies[0])


@pytest.mark.parametrize("arm", ["std", "glob"])
def test_an_arm_that_diverges_has_no_numbers_left(arm, sizes, texts):
    found = pretrain(sizes, texts, Run(arm, 1e30, 0))
    assert all(each.isnan().all() for model in found.models for each in model.parameters())
    assert all(sent > 0 for sent in found.bytes_a_round)


def test_the_trimmed_text_is_the_joint_one(texts):
    for language in LANGUAGES:
        joint, trimmed = (next(texts.training(kind, language, (0, 1), 2)) for kind in ("joint", "trimmed"))
        ids = texts.row_ids(language, texts.tokens("trimmed", language)).ids
        assert torch.equal(ids[trimmed.inputs], joint.inputs) and torch.equal(ids[trimmed.labels], joint.labels)


def test_losses_are_normalised_by_the_unigram_models():
    both = {"steps": [1], "losses": {"latin": [3.0], "greek": [2.0]}, "unigram": {"latin": 4.0, "greek": 2.5}}
    assert mean_normalised(both) == [-0.75]
    assert mean_normalised(measured(None)) == [math.inf]
    assert result(None, 1.0).loss == math.inf


def test_costs_are_means_over_the_sites(sizes):
    spent = {arm: costs(outcome(arm, result(1.0, 1.0)), sizes) for arm in ("std", "trim", "spec")}
    dim, sent = SIZES["dim"], {arm: each.bytes_a_round_by_formula for arm, each in spent.items()}
    assert sent == {"std": 2 * 4 * (100 + 10 * dim), "trim": 4 * (100 + 5 * dim), "spec": 4 * 100}
    assert spent["trim"].vocabulary == 5 and spent["trim"].parameters == 125
    assert spent["trim"].parameters_by_formula == 100 + 5 * dim


def test_claims_go_by_differences_of_the_same_seed():
    found = {
        "std": outcome("std", result(1.5, 3.0, 2.0), result(1.4, 3.1, 2.1)),
        "glob": outcome("glob", result(1.4, 3.0, 1.9), result(1.3, 3.0, 2.0)),
        "spec": outcome("spec", result(1.6, 3.0, 2.1), result(1.5, 3.1, 2.2)),
    }
    exact = Costs(4, 20, 120, 120, 400.0, 400.0)
    spent = {"std": exact, "glob": Costs(4, 20, 120, 120, 400.0, 300.0), "spec": exact}
    target = common_target(found.values())
    assert target == pytest.approx(2.2 - 1.0)
    held = [each["holds"] for each in claims(found, spent, target)]
    assert held == [True, True, False, False, True, False, True]
    assert "loss after the last: -0.1000, noise 0.0000" in claims(found, spent, target)[0]["figures"]
    assert [each["holds"] for each in claims({"glob": found["glob"]}, spent, target)] == [False]
    found["glob"] = outcome("glob", result(None, None, None), result(1.3, 3.0, 2.0))
    assert [each["holds"] for each in claims(found, spent, target)][:2] == [False, False]


def test_steps_to_a_target_lie_between_measurements():
    assert steps_to([(0, 3.0), (4, 2.0)], 2.5) == 2.0
    assert steps_to([(4, 2.0)], 2.5) == 4 and steps_to([(4, 2.0)], 1.0) is None
    assert outcome("std", result(1.0, 3.0, 2.0)).steps_to(0.5) == [math.inf]


def test_an_arm_that_diverged_has_no_number():
    diverged = outcome("glob", result(None, 3.0, None), result(1.0, 3.0, 2.0))
    figures = row(diverged, Costs(4, 20, 120, 120, 400.0, 400.0), ["latin"], 1.0)
    assert figures["loss"] is figures["deviation"] is figures["adapted_loss"] is figures["steps_to_target"] is None
    assert figures["adapted_curve"] == [(0, 2.0)]
    json.dumps(figures, allow_nan=False)


def test_results_on_other_tokens_are_refused():
    done = {Run("std", 1e-2, 0): result(1.0, 1.0), Run("glob", 1e-2, 0): result(1.0, 1.0, tokens="other")}
    with pytest.raises(RunError, match="glob, seed 0: trained on other tokens"):
        tuned_outcomes(Outcome, ["std", "glob"], 1, done)


def test_the_plot_is_written_twice(tmp_path):
    pytest.importorskip("matplotlib")
    figures = row(outcome("glob", result(1.0, 3.0, 2.0)), Costs(4, 20, 120, 120, 400.0, 400.0), ["latin"], 1.0)
    files = draw([figures], UNSEEN, tmp_path / "curves")
    assert [file.name for file in files] == ["curves.png", "curves.svg"]
    assert all(file.stat().st_size > 1000 for file in files)
