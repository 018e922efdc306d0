"""The benchmark of boxed rounds, with real processes."""

import json

import pytest

from titan_ext import cli


@pytest.mark.slow
def test_the_slow_site_takes_fewer_steps_where_rounds_are_boxed(capsys):
    flags = ["--rounds", "3", "--sync-every", "16", "--step-ms", "60", "--slowdown", "4"]
    assert cli.main(["bench", "boxes", *flags]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    steps = {row["arm"]: row["steps"] for row in rows}
    assert steps["fixed steps"] == [16, 16]
    fast, slow = steps["boxed by speed"]
    assert slow < fast and 1 <= slow <= 8


@pytest.mark.parametrize(("flags", "problem"), [(["--sites", "1"], "--sites 1"), (["--slowdown", "0.5"], "--slowdown")])
def test_bad_options(flags, problem, capsys):
    assert cli.main(["bench", "boxes", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert problem in line
