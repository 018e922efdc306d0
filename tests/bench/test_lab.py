"""The laboratory's relay beside network namespaces (root)."""

import argparse

import pytest

from titan_ext.bench import lab
from titan_ext.errors import UserError
from titan_ext.links.namespaces import missing


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    lab.add_arguments(parser)
    return parser.parse_args(flags)


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=f"network namespaces: {missing()}")
def test_rounds_through_the_relay_are_those_of_namespaces(capsys: pytest.CaptureFixture) -> None:
    (row,) = lab.run(options("--rates", "50", "--rtts", "40", "--rounds", "3"))["rows"]
    assert row["lab_bytes"] == row["namespaces_bytes"]
    assert 0.9 < row["frames_ratio"] < 1.1
    assert 0.5 < row["ratio"] < 2  # some per cent where nothing else runs; a busy machine delays either
    assert "50 Mbit/s, 40 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "problem"),
    [(["--rates", "fast"], "--rates fast"), (["--rtts", "-1"], "--rtts -1"), (["--rounds", "0"], "--rounds 0")],
)
def test_bad_options_are_named(flags: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        lab.run(options(*[f"{flags[0]}={flags[1]}"]))
