"""``titan-ext bench stall`` with a small model and few methods."""

import json

import pytest

from titan_ext import cli
from titan_ext.bench import stall


def test_rare_rounds_stall_less_and_hidden_ones_least(monkeypatch, capsys):
    streaming = next(name for name in stall._METHODS if name.startswith("Streaming"))
    chosen = ("data parallelism", "DiLoCo", streaming)
    monkeypatch.setattr(stall, "_METHODS", {name: stall._METHODS[name] for name in chosen})
    # A round of DiLoCo takes 0.2 s of round trips and more, and an inner step 0.1 s.
    sizes = ["--flavor", "tiny", "--sites", "2", "--sync-every", "16", "--rounds", "2", "--step-seconds", "0.1"]
    assert cli.main(["bench", "stall", *sizes, "--link", "100mbit,50ms"]) == 0
    printed = capsys.readouterr().out
    every, diloco, hidden = json.loads(printed.splitlines()[-1])["rows"]
    assert every["stalled_a_step_seconds"] > 8 * diloco["stalled_a_step_seconds"]
    assert diloco["stalled_a_step_seconds"] > hidden["stalled_a_step_seconds"] > 0
    assert every["bytes_a_step"] == pytest.approx(16 * diloco["bytes_a_step"], rel=0.05)
    assert hidden["bytes_a_step"] == pytest.approx(diloco["bytes_a_step"], rel=0.05)
    for row in (every, diloco):
        apart = 1 / (1 + row["stalled_a_step_seconds"] / 0.1)
        assert row["utilised"] == pytest.approx(apart, rel=0.05)
    assert "stalled a round" in printed and "100mbit,50ms" in printed


@pytest.mark.slow
def test_every_method_is_rehearsed_with_what_it_needs(monkeypatch, capsys):
    """Those with settings or an optimizer of their own, each to its end."""
    names = ("MuLoCo, int4", "MT-DAO, one momentum", "SPARTA")
    monkeypatch.setattr(stall, "_METHODS", {name: stall._METHODS[name] for name in names})
    sizes = ["--flavor", "tiny", "--sites", "2", "--sync-every", "8", "--rounds", "1"]
    assert cli.main(["bench", "stall", *sizes]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == list(names) and all(row["bytes_a_step"] > 0 for row in rows)
    assert cli.main(["bench", "stall", "--rounds", "0"]) == 2
