"""``titan-ext bench sparsity`` and ``mup`` at toy size."""

import json

import pytest

from tests.experiments.wrong_options import assert_one_line
from titan_ext import cli

COMMAND = ["bench", "sparsity", "--dim", "32", "--layers", "1", "--steps", "6", "--sync-every", "2", "--sites", "2"]
COMMAND += ["--batch", "2", "--length", "16", "--corpus", "builtin:code", "--seeds", "1", "--workers", "1"]
MUP = ["bench", "mup", "--layers", "1", "--steps", "10", "--batch", "2", "--length", "16", "--corpus", "builtin:code"]
MUP += ["--seeds", "1", "--dims", "32,64", "--workers", "1", "--learning-rates", "1e-2", "--check-steps", "2"]


def figures_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_sparse_contributions_are_smaller_and_the_union_is_bounded(capsys):
    assert cli.main([*COMMAND, "--sparsities", "0.5,0.9", "--learning-rates", "2e-2"]) == 0
    rows = {row["arm"]: row for row in figures_of(capsys)["rows"]}
    assert list(rows) == ["dense", "topk_0.5", "topk_0.9", "sparsyfed_0.5", "sparsyfed_0.9"]
    assert rows["dense"]["density"] == 1.0 and rows["dense"]["regrown"] == 0.0
    for arm, row in rows.items():
        assert 0 < row["loss"] < 20
        if arm != "dense":
            sparsity = float(arm.partition("_")[2])
            assert 1 - sparsity - 1e-3 <= row["density"] <= min(1, 2 * (1 - sparsity)) + 1e-3
    assert rows["sparsyfed_0.9"]["bytes_sent"] < rows["sparsyfed_0.5"]["bytes_sent"]
    assert rows["sparsyfed_0.5"]["regrown"] == 0 < rows["topk_0.5"]["regrown"], "a weight at zero has no gradient"


def test_a_transfer_has_a_row_for_each_width_and_arm(capsys):
    assert cli.main(MUP) == 0
    figures = figures_of(capsys)
    assert [row["label"] for row in figures["rows"]] == ["mup_32", "mup_64", "standard_32", "standard_64"]
    assert set(figures["coordinates"]["mup"]) == {"32", "64"} and len(figures["claims"]) == 4
    assert all(row["loss_at_base_lr"] == row["loss"] for row in figures["rows"]), "of one rate"


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        (COMMAND, ["--sparsities", "1.0"], "--sparsities"),
        (COMMAND, ["--sparsities", "much"], "--sparsities"),
        (COMMAND, ["--exponent", "0.5"], "--exponent"),
        (MUP, ["--dims", "32"], "--dims"),
        (MUP, ["--dims", "33,64"], "--dims"),
    ],
)
def test_a_wrong_option_is_one_line(command, flags, said, capsys):
    assert_one_line([*command, *flags], said, capsys)


def test_sites_that_lose_are_counted_against_themselves_alone(corpus, capsys):
    flags = ["--dim", "32", "--layers", "1", "--steps", "8", "--sync-every", "2", "--batch", "2", "--length", "16"]
    command = ["bench", "pafl", "--corpus", str(corpus), "--languages", "latin,greek", *flags]
    command += ["--shrink", "2", "--adapt-steps", "2"]
    assert cli.main([*command, "--seeds", "1", "--workers", "1"]) == 0
    rows = {row["arm"]: row for row in figures_of(capsys)["rows"]}
    assert list(rows) == ["alone", "federated", "proximal", "ewc", "distillation"]
    assert rows["alone"]["losing"] == rows["alone"]["losing_adapted"] == [0]
    for row in rows.values():
        alone = rows["alone"]["by_site"]
        assert row["losing"] == [sum(own > theirs for own, theirs in zip(row["by_site"], alone))]
    assert len({row[key] for row in rows.values() for key in ("loss", "adapted")}) == 10
