"""The command line, as a user types it."""

import argparse
import dataclasses
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.launcher.sites import PATIENCE_SECONDS, ROOT
from titan_ext import __version__, cli
from titan_ext.commands import launch as command
from titan_ext.commands.command import Command
from titan_ext.errors import RunError, UserError
from titan_ext.launcher.jobs import all_nodes_here
from titan_ext.launcher.placement import free_port


def titan_ext(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "titan_ext", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_names_every_command(arguments: list[str]) -> None:
    found = titan_ext(*arguments)
    assert found.returncode == 0
    for name in ("launch", "lighthouse", "check", "data", "bench", "examples:"):
        assert name in found.stdout


def test_version() -> None:
    assert titan_ext("--version").stdout == f"titan-ext {__version__}\n"


def test_help_does_not_load_torch() -> None:
    program = "import sys; from titan_ext.cli import main\ntry: main(['--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)


def test_a_command_that_does_not_exist() -> None:
    found = titan_ext("lunch")
    assert found.returncode == 2 and "launch" in found.stderr


def paths(commands: tuple[Command, ...], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [(*above, each.name) for each in commands] + [
        path for each in commands for path in paths(each.actions, (*above, each.name))
    ]


@pytest.mark.parametrize("path", paths(cli.COMMANDS), ids=" ".join)
def test_every_command_helps(path: tuple[str, ...], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*path, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: titan-ext {' '.join(path)} " in said
    assert "option_strings" not in said


def test_a_command_runs_or_has_actions_that_do() -> None:
    def check(command: Command) -> None:
        assert (command.run is None) == bool(command.actions)
        for each in command.actions:
            check(each)

    for each in cli.COMMANDS:
        check(each)


def test_an_action_is_missing() -> None:
    found = titan_ext("data")
    assert found.returncode == 2 and "ACTION" in found.stderr


def test_flags_that_a_command_does_not_take() -> None:
    found = titan_ext("lighthouse", "--training.steps", "3")
    assert found.returncode == 2
    assert "lighthouse does not know --training.steps 3" in found.stderr


def replace_launch(monkeypatch: pytest.MonkeyPatch, run) -> None:
    monkeypatch.setattr(cli, "COMMANDS", (dataclasses.replace(command.COMMAND, run=run),))


def test_overrides_reach_the_command_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace_launch(monkeypatch, lambda options: seen.append(options) or 0)
    assert cli.main("launch a.toml --training.steps 20 --only east --optimizer.lr=1e-3 --plain".split()) == 0
    assert seen[0].overrides == ["--training.steps", "20", "--optimizer.lr=1e-3"]
    assert (seen[0].file, seen[0].only, seen[0].plain) == ("a.toml", ["east"], True)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("steps = -1: must be at least 1"), 2, "titan-ext: error: steps = -1: must be at least 1\n"),
        (RunError("the disk is gone"), 1, "titan-ext: error: the disk is gone\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_one_line_and_a_code(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(options) -> int:
        raise error

    replace_launch(monkeypatch, fail)
    assert cli.main(["launch", "a.toml"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bind", "29510"], "--bind 29510: must be ADDRESS:PORT"),
        (["--min-sites", "0"], "--min-sites 0: must be at least 1"),
        (["--join-timeout-seconds", "0"], "--join-timeout-seconds 0.0: must be above 0 seconds"),
        (["--bind", "192.0.2.1:0"], "--bind 192.0.2.1:0: the lighthouse cannot listen there: "),
    ],
)
def test_a_lighthouse_that_cannot_be(arguments: list[str], said: str) -> None:
    found = titan_ext("lighthouse", *arguments)
    assert found.returncode == 2
    assert found.stderr.startswith(f"titan-ext: error: {said}") and found.stderr.count("\n") == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_a_grace_that_cannot_be(seconds: str) -> None:
    found = titan_ext("launch", "missing.toml", f"--grace-seconds={seconds}")
    assert found.returncode == 2
    assert found.stderr.startswith("titan-ext: error: --grace-seconds") and "must be above 0 seconds" in found.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_lighthouse_says_where_it_is_and_ends_when_told(number: signal.Signals) -> None:
    port = free_port()
    arguments = ["lighthouse", "--bind", f"127.0.0.1:{port}", "--min-sites", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", "titan_ext", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            lines = [process.stdout.readline() for _ in range(3)]
            assert f"--lighthouse http://127.0.0.1:{port}" in lines[1]
            assert urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE_SECONDS).status == 200
            process.send_signal(number)
            _, err = process.communicate(timeout=PATIENCE_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0 and "Traceback" not in err


@pytest.mark.parametrize(
    "overrides, expected", [([], "2"), (["--replica.expected_sites", "5"], "5")], ids=["by count", "by the user"]
)
def test_sites_that_are_started_together_begin_together(tmp_path: Path, overrides: list[str], expected: str) -> None:
    file = tmp_path / "run.toml"
    sites = "".join(f'[[site]]\nname = "{name}"\ndata = "builtin:docs"\n' for name in ("east", "west"))
    file.write_text(f'dump_folder = "{tmp_path}/out"\n[semi_sync]\nmethod = "diloco"\n{sites}')
    arguments = argparse.Namespace(
        file=str(file),
        only=None,
        lighthouse=None,
        lighthouse_port=0,
        local_nodes=None,
        rendezvous_seconds=30.0,
        grace_seconds=30.0,
    )
    sites = command._load_sites(str(file), None, overrides)
    jobs = command._plan(arguments, sites, all_nodes_here(sites), overrides)
    assert [job.name for job in jobs] == ["lighthouse", "east", "west"]
    for job in jobs[1:]:
        flags = [job.command[place + 1] for place, each in enumerate(job.command) if each == "--replica.expected_sites"]
        assert flags == [expected]


@pytest.mark.parametrize("name", ["a/file/below", "a"])
def test_a_path_that_cannot_be_had_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Whatever a command was about to do with it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("")
    path = tmp_path / name
    monkeypatch.setattr(cli, "run", lambda arguments: path.write_text("x"))
    assert cli.main(["check"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"titan-ext: error: {path}: cannot be read or written: ") and line.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ['site "east" has 2 nodes', "--only east", "--local-nodes 2"]),
        (["--only", "east", "--lighthouse", "h:1"], ["--node-rank K and --rendezvous HOST"]),
        (["--only", "east", "--node-rank", "2", "--rendezvous", "127.0.0.1"], ["--node-rank 2", "0 to 1"]),
        (["--only", "east", "--node-rank", "1", "--rendezvous", "127.0.0.1"], ["several nodes", "--lighthouse"]),
        (["--only", "west", "--node-rank", "1"], ["--node-rank 1", "nodes = 1"]),
        (["--local-nodes", "2", "--rendezvous", "h"], ["--rendezvous h", "--local-nodes"]),
        (["--local-nodes", "0"], ["--local-nodes 0", "at least 1"]),
        (["--local-nodes", "3"], ["nodes = 3", "must divide", "2 rank(s)"]),
        (["--rendezvous-seconds", "0"], ["--rendezvous-seconds 0"]),
    ],
)
def test_nodes_that_are_not_told_apart_are_refused_before_anything_starts(flags, words, tmp_path, monkeypatch, capsys):
    for name in ("SLURM_NODEID", "JOB_COMPLETION_INDEX", "SKYPILOT_NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "run.toml"
    sites = '[[site]]\nname = "east"\nnodes = 2\n[[site]]\nname = "west"\n'
    parallelism = "[parallelism]\ndata_parallel_shard_degree = 2\n"
    file.write_text(
        f'dump_folder = "{tmp_path}/out"\ndata = "builtin:docs"\n{parallelism}[semi_sync]\nmethod = "diloco"\n{sites}'
    )
    assert cli.main(["launch", str(file), *flags]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert said.startswith("titan-ext: error:") and said.count("\n") == 1


def test_two_sites_of_a_machine_do_not_listen_on_one_port(tmp_path, capsys):
    file = tmp_path / "run.toml"
    sites = '[[site]]\nname = "east"\n[[site]]\nname = "west"\n'
    file.write_text(f'dump_folder = "{tmp_path}/out"\ndata = "builtin:docs"\nrendezvous_port = {free_port()}\n{sites}')
    assert cli.main(["launch", str(file)]) == 2
    said = capsys.readouterr().err
    assert 'site "west": rendezvous_port = ' in said and 'site "east" on this machine has it too' in said
    assert said.startswith("titan-ext: error:") and said.count("\n") == 1
