"""``titan-ext bench nightly`` without the registry: what it runs, in whose surroundings, and that a failure is a figure."""

import json
import subprocess
import sys
from pathlib import Path

from titan_ext import cli
from titan_ext.bench import nightly


def test_what_fails_with_the_build_is_a_figure(monkeypatch, capsys):
    def fetch(folder: str) -> None:
        Path(folder, "torchft.py").write_text("WHICH = 'the build'", encoding="utf-8")

    code = "import torchft; print(torchft.WHICH); print('{}'); raise SystemExit({})"
    commands = {name: [sys.executable, "-c", code.replace("{})", f"{end})")] for name, end in (("a", 0), ("b", 3))}
    monkeypatch.setattr(nightly, "_fetch", fetch)
    monkeypatch.setattr(nightly, "_commands", lambda: commands)
    monkeypatch.setattr(nightly, "_VERSION", "print('2026.1.2')")
    assert cli.main(["bench", "nightly"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["nightly"] == "2026.1.2" and found["release"]
    assert [(row["check"], row["passes"], row["detail"]) for row in found["rows"]] == [
        ("a", True, "the build"),
        ("b", False, "the build"),
    ]


def test_a_registry_that_does_not_answer_is_one_line(monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found")
    monkeypatch.setattr(nightly.subprocess, "run", lambda *_, **__: failed)
    assert cli.main(["bench", "nightly"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("torchft-nightly: cannot be fetched: ERROR: No matching distribution found")


def test_it_runs_suites_and_tests_of_this_repository():
    commands = nightly._commands()
    assert list(commands) == ["conformance", "tests"]
    assert all(Path(nightly._ROOT, each).is_dir() for each in nightly._TESTS)
