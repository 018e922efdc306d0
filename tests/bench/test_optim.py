"""``titan-ext bench optim`` on a model of toy size: its table, its last line, and what it refuses."""

import json

import pytest

from titan_ext import cli
from titan_ext.trainer.optimizers import OptimizersContainer

SMALL = ["bench", "optim", "--parameters", "2e5", "--seconds", "0.01", "--device", "cpu"]


def test_every_optimizer_is_measured(capsys):
    assert cli.main(SMALL) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    figures = json.loads(last)
    assert figures["benchmark"] == "optim" and figures["parameters"] == pytest.approx(2e5, rel=0.2)
    rows = {row["optimizer"]: row for row in figures["rows"]}
    assert set(rows) == {"AdamW", "AdamW, fused", *OptimizersContainer.own_optimizers()}
    for name, row in rows.items():
        assert row["seconds"] > 0 and row["ratio"] > 0 and row["turns"] >= 1
        assert any(line.startswith(name) for line in table)
    assert rows["AdamW"]["ratio"] == 1


def test_state_is_what_the_optimizers_keep(capsys):
    assert cli.main([*SMALL, "--optimizers", "ADOPT,QHSGDM,Muon,DeMo,SGD", "--state-dtype", "bfloat16"]) == 0
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    kept = {row["optimizer"]: row["state_bytes_per_parameter"] for row in figures["rows"]}
    # Step counts and rates are a number for each tensor.
    assert kept["AdamW"] == pytest.approx(8, abs=0.01) and kept["SGD"] == 0
    assert kept["ADOPT, bfloat16"] == pytest.approx(4, abs=0.01)
    assert kept["QHSGDM, bfloat16"] == pytest.approx(2, abs=0.01)
    assert kept["DeMo"] == pytest.approx(4, abs=0.01) and 4 < kept["Muon"] < 8


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--parameters", "10"], "--parameters 10: must be"),
        (["--parameters", "nan"], "--parameters nan: must be"),
        (["--seconds", "0"], "--seconds 0: must be"),
        (["--optimizers", "Adopt"], "--optimizers Adopt: unknown optimizer; did you mean ADOPT?"),
        (["--device", "abacus"], "--device abacus: must be of cpu"),
    ],
)
def test_wrong_options_are_named(flags, problem, capsys):
    assert cli.main(["bench", "optim", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"titan-ext: error: {problem}")


def test_help_explains_the_table(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "optim", "--help"])
    text = capsys.readouterr().out
    for word in ("x AdamW", "ms/step", "examples:", "--state-dtype"):
        assert word in text
