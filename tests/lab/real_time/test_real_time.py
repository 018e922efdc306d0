"""Rehearsals in real time: their files, their faults, what comes of them, and one whole run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.conftest import GOOD
from titan_ext import cli
from titan_ext.config.load import load_run
from titan_ext.errors import UserError
from titan_ext.lab.build import Request, make_real_script
from titan_ext.lab.real_time import namespaced
from titan_ext.lab.real_time.derived import derive
from titan_ext.lab.real_time.outcome import read_outcome
from titan_ext.semi_sync.wire.ledger import RoundRecord

REST = """[replica]
hostname = "here.example"
[metrics]
log_freq = 1
enable_tensorboard = false
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(GOOD.replace("[[site]]", REST + "[[site]]", 1))
    return path


def test_a_rehearsals_file_says_nothing_of_other_machines(file: Path, tmp_path: Path) -> None:
    addresses = ["127.77.0.1", "127.77.0.2"]
    path = derive(str(file), tmp_path / "out", copies=None, addresses=addresses, ranks=[1, 1], streams=3)
    sites = load_run(path, needs=()).sites
    assert [site.name for site in sites] == ["alpha", "beta"]
    assert [site.config.replica.hostname for site in sites] == addresses
    assert [site.config.semi_sync.streams for site in sites] == [3, 3]
    assert sites[0].config.dump_folder == str(tmp_path / "out" / "alpha")
    path = derive(str(file), tmp_path / "more", copies=3, addresses=["127.0.0.1"] * 3, ranks=[1] * 3, streams=None)
    sites = load_run(path, needs=()).sites
    assert [site.name for site in sites] == ["site0", "site1", "site2"]
    assert {site.config.semi_sync.streams for site in sites} == {"auto"}


def test_a_folder_with_a_run_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "beta").mkdir(parents=True)
    (tmp_path / "out" / "beta" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="holds a run already"):
        derive(str(file), tmp_path / "out", copies=None, addresses=["127.0.0.1"] * 2, ranks=[1, 1], streams=None)


def test_a_folder_that_cannot_be_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*file.* cannot be written"):
        derive(str(file), tmp_path / "file", copies=None, addresses=["127.0.0.1"] * 2, ranks=[1, 1], streams=None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"steps": ["1s"]}, "--step: inner steps take as long as they take"),
        ({"flops": "1tflops"}, "--flops: inner steps"),
        ({"faults": ["slow:beta@1s+1s*0.5"]}, "slow:beta"),
    ],
)
def test_what_real_time_cannot_do_is_said(options: dict, problem: str, file: Path) -> None:
    sites = load_run(file, needs=()).sites
    with pytest.raises(UserError, match=problem):
        make_real_script(str(file), [], sites, Request(links=["1gbit"], **options))


def round_line(time: float, step: int, committed: bool, stalled: float) -> dict:
    record = RoundRecord(
        round=1,
        step=step,
        rules=["parameters"],
        participants=2,
        sites=2,
        bytes_sent=10,
        bytes_received=10,
        seconds_quorum=0.0,
        seconds_reduce=1.0,
        seconds_apply=0.0,
        committed=committed,
        error=None if committed else "lost",
        seconds_stalled=stalled,
    )
    return {"kind": "round", **record.as_dict(), "time": time}


def test_an_outcome_is_what_the_sites_have_written(tmp_path: Path) -> None:
    lines = {
        "alpha": [
            {"kind": "start", "step": 0, "time": 100.0},
            {"kind": "step", "step": 5, "time": 105.0},
            round_line(107.0, 5, True, 2.0),
            {"kind": "step", "step": 10, "time": 110.0},
        ],
        "beta": [
            {"kind": "start", "step": 0, "time": 101.0},
            round_line(105.0, 5, False, 1.0),
            {"kind": "start", "step": 0, "time": 108.0},
            {"kind": "step", "step": 7, "time": 110.0},
        ],
    }
    for name, each in lines.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in each))
    (tmp_path / "alpha" / "summary.json").write_text(json.dumps({"shared_state_sha256": "ab"}))
    phases = [
        {"phase": "running", "time": 100.0},
        {"phase": "waiting", "time": 106.0},
        {"phase": "running", "time": 107.0},
        {"phase": "failed", "time": 112.0, "text": "out of memory"},
    ]
    (tmp_path / "beta" / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in phases))
    outcome = read_outcome(tmp_path, list(lines), 100.0, [7, 8])
    alpha, beta = outcome.sites
    assert outcome.finished and outcome.seconds == 12.0 and outcome.state_sha256 == "ab"
    assert (alpha.lives, alpha.steps, alpha.committed, alpha.utilisation, alpha.error) == (1, 10, 1, 0.8, None)
    assert (beta.lives, beta.steps, beta.committed, beta.away_seconds) == (2, 7, 0, 2.0)
    # There from 1 to 6 s and from 8 to 12 s; in a round for a second, in nothing that is written for 1 and 2 s.
    assert beta.utilisation == pytest.approx(5 / 9) and beta.error == "out of memory"
    assert [alpha.sent_bytes, beta.sent_bytes] == [7, 8]
    cut = read_outcome(tmp_path, list(lines), 100.0, [7, 8], until=11.0)
    assert cut.seconds == 11.0 and cut.sites[1].utilisation == pytest.approx(5 / 8)


def lab(file: Path, *flags: str) -> dict:
    command = [sys.executable, "-m", "titan_ext", "lab", str(file), *flags, "--json"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.slow
def test_a_run_over_a_slow_and_long_link_loses_no_site_and_can_be_planned_from(file: Path, tmp_path: Path) -> None:
    link, out = "10mbit,200ms", str(tmp_path / "out")
    told = lab(file, "--link", link, "--out", out, "--semi_sync.sync_every", "10")
    assert told["finished"] and told["state_sha256"] and told["participation"] == 1
    for site in told["sites"]:
        assert (site["starts"], site["steps"], site["committed_rounds"], site["failed_rounds"]) == (1, 20, 2, 0)
        assert site["sent_bytes"] > 2 * 7_000_000
    assert cli.main(["plan", f"{out}/rehearsal.json", "--link", link, "--from", out]) == 0


@pytest.mark.slow
def test_a_rehearsal_with_faults_goes_on_until_its_time_is_up(file: Path, tmp_path: Path) -> None:
    faults = ["kill:site2@2s+3s", "slow:site0@1s+2s*3", "partition:site0-site1@6s+1s"]
    flags = [word for fault in faults for word in ("--fault", fault)]
    flags += ["--link", "100mbit,20ms", "--sites", "3", "--until", "40s", "--training.steps", "100000"]
    told = lab(file, *flags, "--out", str(tmp_path / "out"))
    assert not told["finished"] and told["seconds"] > 30
    assert all(site["committed_rounds"] for site in told["sites"][:2])
    events = (tmp_path / "out" / "site2" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["phase"] for line in events] == ["running", "waiting", "running", "stopped"]


def test_namespaces_need_root(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(namespaced, "missing", lambda: "network namespaces need root")
    assert cli.main(["lab", str(file), "--link", "1gbit", "--namespaces"]) == 2
    assert "--namespaces: network namespaces need root" in capsys.readouterr().err
    assert cli.main(["lab", str(file), "--link", "1gbit", "--namespaces", "--virtual-time"]) == 2
    assert "leave it or --virtual-time out" in capsys.readouterr().err
