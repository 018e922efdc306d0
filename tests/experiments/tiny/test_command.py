"""``titan-ext bench tiny`` at toy size: equal tokens, shared arms, tables and what is refused."""

import json
from dataclasses import replace
from itertools import chain

import pytest

from titan_ext import cli
from titan_ext.experiments.claims import SeedDifferences
from titan_ext.experiments.runs import RunPool
from titan_ext.experiments.tiny.arms import Settings, half_life
from titan_ext.experiments.tiny.cohorts import CohortPool
from titan_ext.experiments.tiny.parts import PARTS
from titan_ext.experiments.tiny.train import _factor, train
from titan_ext.experiments.tuning import Run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    for place in range(20):
        (folder / f"{place}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return str(folder)


@pytest.fixture
def settings(corpus) -> Settings:
    return Settings(
        steps=1280,
        warmup=8,
        warmup_lr=1e-2,
        sites=2,
        batch=1,
        dim=4,
        beta2=0.99,
        decay=0.0,
        corpus=corpus,
        device="cpu",
    )


def pretend(self, cohorts):
    """As a pool does, but in this process and with few steps: what it trained with, and what came of it."""
    function, (settings, arms), _ = self._arguments
    short = replace(settings, steps=40)
    few = {name: replace(arm, sync_every=arm.sync_every and 2) for name, arm in arms.items()}
    for cohort in cohorts:
        yield cohort, function(short, few, cohort)


def command(corpus, *flags: str) -> list[str]:
    sizes = [
        "--steps",
        "2560",
        "--warmup",
        "8",
        "--sites",
        "2",
        "--batch",
        "4",
        "--dim",
        "32",
        "--learning-rates",
        "1e-2",
    ]
    return ["bench", "tiny", *sizes, "--corpus", corpus, *flags]


@pytest.mark.slow
def test_all_questions_with_their_arms(corpus, monkeypatch, capsys, tmp_path):
    """Every arm of every part trains; rows compare with data parallelism on equal tokens; the rest is taken up."""
    monkeypatch.setattr(RunPool, "train", pretend)
    given = command(corpus, "--seeds", "2", "--workers", "1", "--out", str(tmp_path / "out"))
    assert cli.main(given) == 0
    output = capsys.readouterr()
    figures = json.loads(output.out.splitlines()[-1])
    assert {row["part"] for row in figures["rows"]} == set(PARTS)
    for row in figures["rows"]:
        assert len(row["losses"]) == 2 and len(row["curve"]) == 20 and row["trials"] == 1
        if row["arm"] == "ddp":
            assert row["gap"] == 0 and row["gap_half_width"] == 0 and row["bytes_sent"] == 0
    by_arm = {row["arm"]: row for row in figures["rows"] if row["part"] in ("des_loc", "methods")}
    assert 2 * by_arm["des_loc_k32"]["bytes_sent"] < 1.2 * by_arm["local_adam_k32"]["bytes_sent"]
    assert by_arm["local_sgd_k32"]["bytes_sent"] * 3 == by_arm["local_adam_k32"]["bytes_sent"]
    claims = [each["claim"] for each in figures["claims"]]
    assert any(each.startswith("des_loc, ") and "DES-LOC" in each for each in claims)
    assert any(each.startswith("low_rank, ") and "1%" in each for each in claims)
    assert any(each.startswith("cause, ") and "MT-DAO" in each for each in claims)
    monkeypatch.setattr(RunPool, "train", lambda self, runs: pytest.fail("trained again"))
    assert cli.main(given) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures


def test_local_adam_is_the_methods_whatever_optimizer_it_is_written_with(settings):
    """QHAdamW with one momentum of weight 1 under MT-DAO's plan trains as AdamW under Local Adam's."""
    arm = replace(PARTS["methods"].arms["local_adam_k32"], sync_every=4)
    arms = {"quasi": arm, "adam": replace(arm, method="local_adam")}
    found = [train(replace(settings, steps=40), arms, [Run(name, 1e-2, 0)])[0] for name in arms]
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-4)
    assert found[0].bytes_sent == found[1].bytes_sent and found[0].tokens_sha256 == found[1].tokens_sha256


def test_a_run_that_diverges_leaves_those_beside_it_alone(settings):
    arms, short = {"ddp": PARTS["cause"].arms["ddp"]}, replace(settings, steps=20)
    good, bad = train(short, arms, [Run("ddp", 1e-2, 0), Run("ddp", 1e38, 0)])
    (alone,) = train(short, arms, [Run("ddp", 1e-2, 0)])
    assert bad.loss == float("inf") and good.losses == pytest.approx(alone.losses, rel=1e-5)


def test_runs_of_one_shape_are_shared_out():
    pool = CohortPool(train, (), 2, 2, shape=lambda run: run.method)
    runs = [Run("a", float(place), 0) for place in range(20)] + [Run("b", 1.0, 0)]
    cohorts = pool.cohorts(runs)
    assert sorted(map(len, cohorts)) == [1, 10, 10] and sorted(chain(*cohorts), key=str) == sorted(runs, key=str)


def test_the_learning_rate_stays_or_falls_at_the_end():
    assert [_factor(step, 10, 0.0) for step in range(10)] == [1.0] * 10
    assert [_factor(step, 10, 0.2) for step in range(10)] == pytest.approx([1.0] * 9 + [1 - 0.5**0.5])


def test_an_interval_is_students():
    of = SeedDifferences([1.0, 2.0, 3.0])
    assert of.half_width == pytest.approx(4.303 / 3**0.5, rel=1e-4)
    assert SeedDifferences([1.0]).half_width is None and SeedDifferences([1.0, float("inf")]).half_width is None
    assert half_life(0.999) == pytest.approx(692.8, rel=1e-3)


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--parts", "cause,effect"], "--parts effect: must be of cause"),
        (["--steps", "100"], "--steps 100: must be a multiple of"),
        (["--beta2", "1.0"], "--beta2 1: must be from 0 to below 1"),
        (["--corpus", "/nowhere"], "data = '/nowhere': no such file or folder"),
    ],
)
def test_wrong_options_are_named(corpus, flags, problem, capsys):
    assert cli.main(command(corpus, *flags)) == 2
    assert capsys.readouterr().err.strip().startswith(f"titan-ext: error: {problem}")
