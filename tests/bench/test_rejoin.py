"""``titan-ext bench rejoin``: both methods survive both kinds of kill, and ours counts every step of the survivors."""

import argparse
import json
import subprocess
import sys

import pytest

from titan_ext.bench import rejoin
from titan_ext.bench.rejoin_sites import Attempt


def options(**changed: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    rejoin.add_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **changed})


def test_figures_count_from_the_kill_to_the_first_round_with_the_newcomer() -> None:
    first = [
        Attempt(time=9.0, waited=7.0, counted=[8, 8, 8], lost=0.0),  # before the kill
        Attempt(time=15.0, waited=4.0, counted=[0, 0, 0], lost=8.0),
        Attempt(time=21.0, waited=1.0, counted=[8, 8, 0], lost=0.0),  # the newcomer only joins
        Attempt(time=22.0, waited=0.5, counted=[8, 8, 8], lost=0.0),
    ]
    second = [Attempt(time=22.0, waited=5.6, counted=[8, 8, 8], lost=0.0)]
    figures = rejoin._figures([first, second], killed=10.0, back=20.0, options=options(step_seconds=0.5))
    assert figures == {"rejoin": 2.0, "longest": 5.6, "waited": 5.6, "wasted": 9.5, "lost": 8.0}


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--sites", "2"], "--sites 2: must be at least 3"),
        (["--step-seconds", "nan"], "--step-seconds nan: must be at least 0.001"),
    ],
)
def test_bad_options_are_one_line(flags: list[str], problem: str) -> None:
    command = [sys.executable, "-m", "titan_ext", "bench", "rejoin", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"titan-ext: error: {problem}\n"


@pytest.mark.slow
def test_survivors_of_ours_lose_no_step() -> None:
    sizes = ["--parameters", "1e5", "--sync-every", "10", "--step-seconds", "0.02", "--repeats", "1"]
    command = [sys.executable, "-m", "titan_ext", "bench", "rejoin", *sizes]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert [(row["killed"], row["method"]) for row in rows] == [
        (where, method) for where in ("inner", "reduce") for method in ("torchft", "ours")
    ]
    assert [row["lost"] for row in rows if row["method"] == "ours"] == [0.0, 0.0]
