"""What is drawn of a run: the terminal, OpenMetrics and reports."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.instruments.lines import append, round_, step, trained
from tests.instruments.test_run import BOTH, read
from titan_ext import cli
from titan_ext.instruments.alerts import load_rules
from titan_ext.instruments.openmetrics import openmetrics
from titan_ext.instruments.snapshot import snapshot
from titan_ext.instruments.terminal import draw

PATIENCE_SECONDS = 120.0


def trouble(folder: Path) -> None:
    """The east dies after the second round, and the west goes on."""
    for name in BOTH:
        trained(folder, name, (1, 2), BOTH)
    trained(folder, "west", (3, 4, 5), ["west"])
    text = "rank 0 was ended by SIGKILL; restart 1 of 3"
    append(folder / "east" / "events.jsonl", {"kind": "phase", "phase": "waiting", "text": text, "time": 21.0})


def test_the_terminal_says_who_is_in_trouble_and_why(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("rich", reason="the terminal view needs rich")
    trouble(tmp_path)
    assert cli.main(["watch", str(tmp_path), "--once"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "✖ east: missed the last 3 rounds: rank 0 was ended by SIGKILL; restart 1 of 3" in lines[0]
    text = "\n".join(lines)
    assert re.search(r"east +██✖✖✖", text) and re.search(r"west +█████", text)
    assert "rounds 3-5: rank 0 was ended by SIGKILL" in text


@pytest.mark.parametrize("name", ["north", "a-datacenter-with-a-long-name-in-the-north"])
@pytest.mark.parametrize("width", [40, 60, 80, 130])
def test_in_a_narrow_terminal_no_number_is_cut_and_alerts_are_first(tmp_path: Path, width: int, name: str) -> None:
    trouble(tmp_path)
    trained(tmp_path, name, (1, 2, 3, 4, 5), ["west"])
    console = Console(width=width, height=24, file=io.StringIO())
    console.print(draw(snapshot(read(tmp_path), load_rules(), 60.0), console))
    lines = console.file.getvalue().splitlines()
    title = next(place for place, line in enumerate(lines) if line.split()[:2] == ["site", "state"])
    east = next(line for line in lines[title:] if line.startswith(" east"))
    assert "…" not in lines[title] and east.count("…") <= 1, "the state alone may be cut"
    assert next(place for place, line in enumerate(lines) if "alerts (" in line) < title
    assert sum(line.startswith("│ east ") and "✖✖✖" in line for line in lines) == 1


@pytest.mark.parametrize("ending", [b"q", b"\x03", "SIGTERM"])
def test_the_live_view_ends_cleanly(tmp_path: Path, ending: bytes | str) -> None:
    pytest.importorskip("rich", reason="the terminal view needs rich")
    trouble(tmp_path)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "titan_ext", "watch", str(tmp_path)])
    shown, deadline = b"", time.monotonic() + PATIENCE_SECONDS
    sent = False
    while time.monotonic() < deadline:
        try:
            shown += os.read(terminal, 65536) if select.select([terminal], [], [], 1.0)[0] else b""
        except OSError:
            break  # it has ended
        if not sent and b"who took part" in shown:
            sent = True
            os.write(terminal, ending) if isinstance(ending, bytes) else os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert sent and b"Traceback" not in shown
    assert os.waitstatus_to_exitcode(status) == 0
    assert shown.rstrip().endswith((b"\x1b[?25h", b"\x1b[?1049l")), "the cursor and the screen are as before"


def test_openmetrics_of_what_is_known(tmp_path: Path) -> None:
    trouble(tmp_path)
    last = round_(6, 60.0, ["west"], new_field=3.5, healing_bytes_sent=7)
    append(tmp_path / "west" / "metrics.jsonl", step(51, 51.0), last)
    text = openmetrics(snapshot(read(tmp_path), load_rules(), 61.0))
    lines = text.splitlines()
    assert lines[-1] == "# EOF"
    assert 'titan_ext_step{site="west"} 51' in lines and 'titan_ext_bytes_sent_total{site="east"} 2000' in lines
    assert 'titan_ext_round_new_field{site="west"} 3.5' in lines
    assert [line for line in lines if "healing_bytes_sent_total" in line] == [
        'titan_ext_healing_bytes_sent_total{site="west"} 7'
    ]
    assert 'titan_ext_alert{site="east",alert="missing",severity="critical"} 1' in lines
    assert not any(line.startswith("titan_ext_lr") for line in lines), "no line has told it"
    types = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types))


def test_a_run_that_has_not_begun_is_not_well(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'dump_folder = "{tmp_path}/runs"\n[[site]]\nname = "east"\n')
    assert cli.main(["watch", str(file), "--json"]) == 0
    printed = capsys.readouterr()
    assert f"no site has written into {tmp_path}/runs yet" in printed.err
    verdict = json.loads(printed.out)["verdict"]
    assert list(verdict.values()) == ["over", "nothing has been written yet", "1 no data"]


def frozen(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="frozen">(.*?)</script>', page, re.DOTALL)[1])


def test_an_alert_hides_no_target_that_cannot_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trouble(tmp_path / "run")
    assert cli.main(["watch", str(tmp_path / "run"), "http://127.0.0.1:9", "--once"]) == 1
    assert "http://127.0.0.1:9: Connection refused" in capsys.readouterr().out


def test_a_file_that_is_a_folder_is_no_good_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trouble(tmp_path / "run")
    (tmp_path / "run" / "west" / "commits.jsonl").unlink(missing_ok=True)
    (tmp_path / "run" / "west" / "commits.jsonl").mkdir()
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]) == 1
    assert "run: west: commits.jsonl: Is a directory" in capsys.readouterr().err
    assert cli.main(["watch", str(tmp_path / "run"), "--once"]) == 1


def test_a_report_holds_all_and_needs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trouble(tmp_path / "run")
    name = "</script><script>alert(1)</script>"
    append(tmp_path / "run" / "west" / "metrics.jsonl", {"kind": "note", "text": name, "time": 60.0})
    out = tmp_path / "report.html"
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(out)]) == 0
    page = out.read_text()
    assert (
        not re.search(r"(src|href)=\"(?!data:,)", page)
        and "@import" not in page
        and "</script><script>alert" not in page
    )
    (run,) = frozen(page)["runs"]
    assert [site["name"] for site in run["sites"]] == ["east", "west"]
    assert run["timeline"]["rows"] == {"east": "ccaaa", "west": "ccccc"}
    assert name in [event["text"] for event in run["sites"][1]["events"]]


def test_runs_are_grouped_by_what_they_differ_in_but_for_seeds(tmp_path: Path) -> None:
    for run, seed, every, loss in (("a", 1, 10, 2.0), ("b", 2, 10, 4.0), ("c", 1, 20, 5.0)):
        for site in BOTH:
            append(
                tmp_path / run / site / "metrics.jsonl", *(step(each, float(each), loss=loss) for each in range(1, 41))
            )
            config = {"debug": {"seed": seed}, "semi_sync": {"sync_every": every}, "training": {"steps": 40}}
            (tmp_path / run / site / "config.json").write_text(json.dumps(config))
    out = tmp_path / "report.html"
    assert cli.main(["report", *(str(tmp_path / run) for run in "abc"), "--out", str(out)]) == 0
    found = frozen(out.read_text())["comparison"]
    groups = {group["name"]: group for group in found["groups"]}
    assert {name: group["runs"] for name, group in groups.items()} == {
        "semi_sync.sync_every = 10": ["a", "b"],
        "semi_sync.sync_every = 20": ["c"],
    }
    curve = groups["semi_sync.sync_every = 10"]["curves"]["tokens"]
    assert set(curve["mean"]) == {3.0} and set(curve["low"]) == {2.0} and set(curve["high"]) == {4.0}
    assert curve["x"][-1] == 2 * 4000, "tokens of both sites"
    assert set(found["settings"]["differing"]) == {"debug.seed", "semi_sync.sync_every"}


def test_totals_of_runs_are_of_all_their_rounds(tmp_path: Path) -> None:
    for run, late in (("a", 0), ("b", 8)):
        for number in range(1, 31):
            there = ["east"] if 1 < number < 2 + late else list(BOTH)
            for site in there:
                trained(tmp_path / run, site, [number], there)
    out = tmp_path / "report.html"
    assert cli.main(["report", *(str(tmp_path / run) for run in "ab"), "--out", str(out)]) == 0
    one, other = frozen(out.read_text())["comparison"]["runs"]
    assert (one["participation"], one["utilisation"]) == (1.0, pytest.approx(0.8))
    assert other["participation"] == pytest.approx((1 + 22 / 30) / 2)
    assert one["bytes_sent"] == 60_000 and other["bytes_sent"] == 52_000


WRONG = [
    (["watch"], "name a FILE.toml"),
    (["watch", "absent"], "absent: no such folder"),
    (["watch", "."], "no site has written here"),
    (["watch", "absent.toml"], "absent.toml: cannot be read"),
    (["watch", "ftp://host:1"], "ftp://host:1: must be http://host:port"),
    (["watch", "http://host"], "http://host: must be http://host:port"),
    (["watch", "run", "--web", "nowhere"], "--web nowhere: must be HOST:PORT"),
    (["watch", "run", "--web", "192.0.2.1:80"], "--web 192.0.2.1:80: cannot listen there"),
    (["watch", "run", "--secret-file", "absent"], "--secret-file absent: cannot be read"),
    (["watch", "run", "--refresh-seconds", "0"], "--refresh-seconds 0: must be above 0"),
    (["report", "run", "run"], "run: is given twice"),
    (["report", "run", "--out", "absent/report.html"], "--out absent/report.html: cannot be written"),
    (["report", "http://127.0.0.1:9"], "http://127.0.0.1:9: Connection refused"),
]


@pytest.mark.parametrize("arguments, problem", WRONG)
def test_what_cannot_work_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], problem: str
) -> None:
    trained(tmp_path / "run", "east", [1], ["east"])
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_a_stopped_page_server_ends_in_order(tmp_path: Path) -> None:
    trained(tmp_path, "east", [1], ["east"])
    command = [sys.executable, "-m", "titan_ext", "watch", str(tmp_path), "--web", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "page:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, error) == (0, "")
