"""Figures that are kept, and the pages that say what they say and nothing else."""

import argparse
import json

import pytest

from titan_ext import cli
from titan_ext.bench import plan
from titan_ext.errors import UserError
from titan_ext.experiments import pages, records, summary
from titan_ext.experiments.records import Record

FIGURES = {
    "parameters": 1234,
    "sites": 4,
    "steps": 100,
    "seeds": 3,
    "ddp_bytes_a_step": 7404,
    "hypotheses": {"methods": "It is so."},
    "rows": [
        {
            "part": "methods",
            "arm": arm,
            "label": arm.upper(),
            "k": every,
            "steps": 100,
            "gap": gap,
            "gap_half_width": 0.0123,
            "own_gap": gap,
            "own_gap_half_width": None,
            "bytes_sent": sent,
            "losses": [1.0, 2.0, 3.0],
        }
        for arm, every, gap, sent in (("ddp", None, 0.0, 0), ("a|b", 8, -0.0456, 98700), ("c", 8, None, 4400))
    ],
    "claims": [{"claim": "methods, it is so", "holds": False, "figures": "-0.0456 +- 0.0123"}],
}


def record(**changes) -> Record:
    rest = {"version": "1", "commit": "abc", "machine": {"cores": 2, "device": "cpu"}, "figures": FIGURES}
    return Record(**{"command": "titan-ext bench tiny --seeds 3", **rest, **changes})


def test_the_pages_say_what_the_records_say():
    """Those of this repository: no number on them was written by hand."""
    pages.run(argparse.Namespace(check=True))


def test_each_figure_of_a_record_is_on_the_page():
    lines = pages.page({"tiny": record()}).splitlines()
    assert "titan-ext bench tiny --seeds 3" in lines
    assert any("commit abc; 2 core(s), cpu, 3 seed(s)" in line for line in lines)
    assert "| A\\|B | 8 | 100 | -0.0456 ± 0.0123 | -0.0456 | 98,700 |" in lines
    assert "| C | 8 | 100 | diverged | diverged | 4,400 |" in lines
    assert "| methods, it is so | does NOT hold | -0.0456 +- 0.0123 |" in lines


def test_the_table_of_the_readme_is_between_its_marks():
    begin, end = pages._BEGIN, pages._END
    text = pages.with_table(f"before\n{begin}\nold 1.23\n{end}\nafter", {"tiny": record()})
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"{end}\nafter") and "old" not in text
    assert "| A\\|B | -0.0456 ± 0.0123 | -0.0456 | 987 (13.3%) |  |" in text and "7,404 bytes a step" in text
    assert pages.with_table(text, {"tiny": record()}) == text
    assert pages.with_table(text, {}) == f"before\n{begin}\n{end}\nafter"
    with pytest.raises(UserError, match="is missing"):
        pages.with_table("before", {})


def test_stalls_distance_faults_and_the_lane_are_in_the_readme():
    """Each from its record: a stall beside its method's loss."""
    step = {"utilised": 0.5, "stalled_a_round_seconds": 9.0}
    stall = {
        **{"sites": 4, "link": "1gbit,40ms", "flavor": "125M", "step_seconds": 0.35, "sync_every": 32},
        "rows": [
            {"method": "data parallelism", "bytes_a_step": 1000, "stalled_a_step_seconds": 1.5, **step},
            {"method": "C, settings", "bytes_a_step": 100, "stalled_a_step_seconds": 0.25, **step},
        ],
    }
    kill = {
        "killed": "inner",
        "method": "torchft",
        "rejoin": 1.234,
        "longest": 2.0,
        "waited": 3.0,
        "wasted": 4.0,
        "lost": 5,
    }
    links = {
        **{"sites": 2, "parameters": 25e6, "rounds": 3},
        "rows": [
            {
                **{"rate_mbit": 500.0, "rtt": 80.0, "seconds": 2.051, "x_plain_tcp": 1.147, "x_torchft": 0.358},
                **{"int8_x_fp32": 0.446, "empty_round_trips": 3.05, "state_x_plain_tcp": None},
            }
        ],
    }
    lane = {
        **{"nightly": "2026.1.2", "release": "0.2.0"},
        "rows": [{"check": "tests", "passes": False, "detail": "1 failed, 2 passed"}],
    }
    records_of = {
        "tiny": record(),
        "stall": record(figures=stall, command="titan-ext bench stall"),
        "wan": record(figures=links, command="titan-ext bench wan"),
        "rejoin": record(figures={"sites": 3, "rows": [kill]}, command="titan-ext bench rejoin"),
        "nightly": record(figures=lane, command="titan-ext bench nightly"),
    }
    text = "\n".join(summary.readme_lines(records_of))
    assert "| C | diverged | diverged | 44 (0.6%) | 0.250 s |" in text
    assert "under data parallelism 1.500 s a step. `titan-ext bench stall`." in text
    assert "| 500 Mbit/s, 80 ms | 2.05 | 1.15 | 0.36 | 0.45 | 3.0 |" in text and "A round of 25,000,000 fp32" in text
    assert "| inner | torchft | 1.23 | 2.00 | 4.00 | 5.00 |" in text and "`titan-ext bench rejoin`." in text
    assert "torchft-nightly 2026.1.2, beside the release 0.2.0: tests FAILS (1 failed, 2 passed)" in text


def test_a_page_that_differs_from_the_records_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "_ROOT", tmp_path / "nowhere")
    monkeypatch.setattr(pages, "read", lambda: records.read(tmp_path))
    records.keep("tiny", ["bench", "tiny"], FIGURES, tmp_path)
    assert cli.main(["bench", "results"]) == 0 and cli.main(["bench", "results", "--check"]) == 0
    path = tmp_path / "tiny.json"
    path.write_text(path.read_text(encoding="utf-8").replace("-0.0456", "-0.0457"), encoding="utf-8")
    assert cli.main(["bench", "results", "--check"]) == 2


def test_a_command_is_kept_with_its_figures(tmp_path, monkeypatch, capsys):
    """Without what only says where files go and how many processes train."""
    monkeypatch.setattr(plan, "run", lambda options: {"device": "cpu", "rows": [{"a": 1.5}], "seeds": 2})
    assert cli.main(["bench", "plan", "--record", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == [{"a": 1.5}]
    found = records.read(tmp_path)["plan"]
    assert found.command == "titan-ext bench plan" and found.figures["rows"] == [{"a": 1.5}]
    assert set(found.machine) == {"cores", "device"} and found.machine["device"] == "cpu"
    arguments = [
        "bench",
        "tiny",
        "--out",
        "here",
        "--seeds",
        "3",
        "--workers=2",
        "--record",
        "--plot",
        "x y",
        "--parts",
        "a b",
    ]
    records.keep("tiny", arguments, FIGURES, tmp_path)
    found = records.read(tmp_path)
    assert found["tiny"].command == "titan-ext bench tiny --seeds 3 --parts 'a b'" and found["tiny"].figures == FIGURES
    assert list(found) == ["plan", "tiny"]


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="x.json: not a record"):
        records.read(tmp_path)
