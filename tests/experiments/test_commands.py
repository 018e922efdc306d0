"""What the commands of all reproductions refuse, before anything is trained."""

import pytest

from tests.experiments import test_abbie, test_convergence
from titan_ext import cli
from titan_ext.experiments.dept import command as dept
from titan_ext.experiments.runs import RunPool


@pytest.fixture
def command_of(command):
    """By name the arguments of each command at toy size; nothing may be trained."""
    return {"abbie": test_abbie.COMMAND, "convergence": test_convergence.COMMAND, "dept": command}


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
    monkeypatch.setattr(RunPool, "train", lambda self, runs: pytest.fail("trained"))
    monkeypatch.setattr(dept, "_train_missing", lambda *_: pytest.fail("trained"))


@pytest.mark.parametrize("name", ["abbie", "convergence", "dept"])
def test_a_plot_without_matplotlib(name, command_of, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("titan_ext.experiments.plots.find_spec", lambda name: None)
    assert cli.main([*command_of[name], "--plot", str(tmp_path / "curves")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("titan-ext: error: --plot: needs matplotlib")


@pytest.mark.parametrize(
    "name, flags, problem",
    [
        ("abbie", ["--variants", "c,d"], "--variants d: must be of standard"),
        ("abbie", ["--iterations", "0,2"], "--iterations 0,2: must be numbers of at least 1"),
        ("abbie", ["--iterations", "two"], "--iterations two: must be numbers of at least 1"),
        ("abbie", ["--iterations", "1,4"], "--iterations (1, 4): must be with 2 among them"),
        ("abbie", ["--steps", "9,few"], "--steps 9,few: must be numbers of at least 1"),
        ("abbie", ["--learning-rates", "0"], "--learning-rates 0: must be numbers above 0"),
        ("abbie", ["--seeds", "0"], "--seeds 0: must be at least 1"),
        ("abbie", ["--speed-turns", "-1"], "--speed-turns -1: must be at least 0"),
        ("abbie", ["--device", "abacus"], "--device abacus: must be of cpu"),
        ("abbie", ["--corpus", "/nowhere"], "data = '/nowhere': no such file or folder"),
        ("convergence", ["--methods", "ddp,adam"], "--methods adam: must be of ddp"),
        ("convergence", ["--steps", "13"], "--steps 13: must be a multiple of --sync-every (2)"),
        ("convergence", ["--sites", "1"], "--sites 1: must be at least 2"),
        ("convergence", ["--dim", "40"], "--dim 40: must be a multiple of 32"),
        ("convergence", ["--learning-rates", "1e-3,fast"], "--learning-rates 1e-3,fast: must be numbers above 0"),
        ("convergence", ["--omega", "1.5"], "--omega 1.5: must be from 0 to 1"),
        ("convergence", ["--device", "abacus"], "--device abacus: must be of cpu"),
        ("convergence", ["--corpus", "/nowhere"], "data = '/nowhere': no such file or folder"),
        ("dept", ["--arms", "std,act"], "--arms act: must be of std"),
        ("dept", ["--languages", "latin,coptic"], "--languages coptic: must be of --corpus: cyrillic, greek, latin"),
        ("dept", ["--languages", "latin"], "--languages latin: must be at least two"),
        ("dept", ["--unseen", "greek"], "--unseen greek: must be none of --languages (latin,greek)"),
        ("dept", ["--corpus", "/nowhere"], "--corpus /nowhere: must be a folder with a folder for each language"),
        ("dept", ["--steps", "5"], "--steps 5: must be a multiple of --sync-every (2)"),
        ("dept", ["--vocab-size", "100"], "--vocab-size 100: must be at least 259"),
        ("dept", ["--adapt-lr", "0"], "--adapt-lr 0: must be a number above 0"),
        ("dept", ["--learning-rates", "1e-3,fast"], "--learning-rates 1e-3,fast: must be numbers above 0"),
        ("dept", ["--device", "abacus"], "--device abacus: must be of cpu"),
    ],
)
def test_wrong_options_are_named(name, flags, problem, command_of, capsys):
    assert cli.main([*command_of[name], *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"titan-ext: error: {problem}")
