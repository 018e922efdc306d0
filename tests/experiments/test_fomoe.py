"""``titan-ext bench fomoe`` at toy size: bytes of the ledger are those of the formula, at equal tokens."""

import json
from importlib.util import find_spec

import pytest

from tests.experiments.wrong_options import assert_one_line
from titan_ext import cli
from titan_ext.experiments.fomoe.arms import Settings, arms, expected_bytes

SIZES = {"dim": 32, "layers": 1, "experts": 3, "top_k": 1, "expert_dim": 8, "steps": 4, "sync_every": 2, "sites": 3}
FLAGS = [flag for key, value in SIZES.items() for flag in (f"--{key.replace('_', '-')}", str(value))]
COMMAND = ["bench", "fomoe", *FLAGS, "--batch", "2", "--length", "16", "--corpus", "builtin:code", "--seeds", "1"]


def test_bytes_by_formula_and_the_figures_of_every_arm(capsys, tmp_path):
    plot = ["--plot", str(tmp_path / "plot")] if find_spec("matplotlib") else []
    assert cli.main([*COMMAND, "--learning-rates", "1e-2", "--workers", "1", *plot]) == 0
    assert {each.suffix for each in tmp_path.iterdir()} == ({".png", ".svg"} if plot else set())
    figures = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    rows = {row["arm"]: row for row in figures["rows"]}
    assert list(rows) == list(arms(3)) == ["copies_1", "copies_2", "full"]
    for row in rows.values():
        # Of what does not divide by the sites some own an element more.
        assert row["bytes_a_round"] == pytest.approx([row["expected_bytes"]] * 3, abs=4)
        assert 0 < row["loss"] < 8 and 0 < row["loss_at_a_site"] < 8 and 0 <= row["evenness"] <= 1
    held = [row["parameters_held"] for row in rows.values()]
    assert held[1] - held[0] == held[2] - held[1] == 3 * 32 * 8
    assert figures["claims"][0]["holds"] and len(figures["claims"]) == 3


def test_the_formula_written_out():
    settings = Settings(**SIZES | {"experts": 12}, batch=1, length=1, corpus="", device="cpu")
    # One copy: nothing of an expert travels but a bit each, a word to each of two sites.
    assert expected_bytes(settings, 1, body=300) == 4 * 300 * 4 // 3 + 2 * 4
    # Two copies: the site holds 8 and owns 4: it sends 4 contributions and 4 sums, with a weight each.
    assert expected_bytes(settings, 2, body=300) == 4 * 300 * 4 // 3 + 2 * 4 + 8 * 4 * (3 * 32 * 8 + 1)


@pytest.mark.parametrize(
    "flags, said",
    [(["--experts", "4"], "--experts 4"), (["--arms", "copies_3"], "--arms copies_3"), (["--top-k", "4"], "--top-k 4")],
)
def test_a_wrong_option_is_one_line(flags, said, capsys):
    assert_one_line([*COMMAND, *flags], said, capsys)
