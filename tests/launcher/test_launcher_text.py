"""What people read: numbers, tables, the live display, and how the machine's resources are assigned."""

import io
import re

import pytest

from titan_ext.errors import UserError
from titan_ext.launcher.display import LineDisplay, TableDisplay
from titan_ext.launcher.placement import assign_resources
from titan_ext.launcher.results import compare_shared_state, results_table
from titan_ext.launcher.text import bytes_text, round_text, step_text

STEP = {"kind": "step", "step": 5, "loss": 3.25, "tokens_per_second": 9123.4, "lr": 0.001}
ROUND = {"kind": "round", "round": 2, "step": 20, "participants": 1, "bytes_sent": 0, "bytes_received": 0}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (12_345_678, "12.3 MB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_bytes(size: float | None, text: str) -> None:
    assert bytes_text(size) == text


def test_a_loss_that_is_no_number_is_shown_as_such() -> None:
    assert "loss     nan" in step_text(STEP | {"loss": None}, 120)


def test_a_round_that_was_not_committed_says_why() -> None:
    assert round_text(ROUND | {"committed": False, "error": "peer gone"}) == "round at step 20 not committed: peer gone"
    assert round_text(ROUND).startswith("round 2 at step 20: 1 site, 0 B sent")


def test_lines_pass_over_kinds_they_do_not_know() -> None:
    out = io.StringIO()
    LineDisplay({"east": 120}, out).record("east", {"kind": "news"})
    assert out.getvalue() == ""


def screen(written: str) -> list[str]:
    """What a terminal shows after the given output (cursor up, clear to the end of line and screen only)."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[\d*[FKJ]|\n|[^\x1b\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("F") and part[0] == "\x1b":
            row -= int(part[2:-1])
        elif part == "\x1b[J":
            lines = lines[:row] + [""]
        elif part != "\x1b[K":
            lines[row] = part
    return lines


def test_the_table_is_drawn_over_itself_below_the_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "40")
    out = io.StringIO()
    display = TableDisplay({"east": 120, "west": 120}, out)
    display.refresh()
    display.record("east", STEP)
    display.record("east", ROUND | {"bytes_sent": 2_000_000, "seconds_reduce": 0.5})
    display.refresh()
    display.note("west: died")
    display.state("west", "restarting", "will be restarted")
    display.refresh()
    lines = screen(out.getvalue())
    assert [line.split()[0] for line in lines if line] == ["west:", "site", "east", "west"]
    assert lines[2].split() == "east training 5/120 3.2500 9,123 1.00e-03 2 1 2.0 MB 0.50 s".split()
    assert lines[3].split()[:4] == ["west", "restarting", "0/120", "-"]


def test_the_table_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("LINES", "40")
    out = io.StringIO()
    TableDisplay({"east": 120}, out).refresh()
    assert max(len(line) for line in screen(out.getvalue())) < 30


def test_nothing_new_is_not_drawn_again() -> None:
    out = io.StringIO()
    display = TableDisplay({"east": 120}, out)
    display.refresh()
    written = out.getvalue()
    display.refresh()
    assert out.getvalue() == written


def test_results_of_a_site_without_a_summary_are_dashes() -> None:
    lines = results_table({"east": None})
    assert lines[1].split() == ["east"] + ["-"] * 8


def test_shared_state_is_compared() -> None:
    same, other, none = (
        {"shared_state_sha256": "a" * 64},
        {"shared_state_sha256": "b" * 64},
        {"shared_state_sha256": ""},
    )
    assert compare_shared_state({"east": same, "west": same}, complete=True)[0]
    assert not compare_shared_state({"east": same, "west": other}, complete=True)[0]
    assert not compare_shared_state({"east": same, "west": none}, complete=True)[0]
    assert not compare_shared_state({"east": same, "west": None}, complete=True)[0]
    assert compare_shared_state({"east": none, "west": none}, complete=True) == (True, "the sites shared no state")
    assert compare_shared_state({"east": same}, complete=False)[1].endswith("at every other site it must be the same")
    in_part = same | {"scopes_not_compared": ["experts", "embeddings"]}
    assert compare_shared_state({"east": in_part, "west": in_part}, complete=True)[1].endswith("experts, embeddings")
    more = same | {"buffers_not_compared": ["count"], "steps_past_shared_state": 2}
    sound, sentence = compare_shared_state({"east": more, "west": same}, complete=True)
    assert sound and sentence.endswith(
        "keeps its own: buffer count; each site's own model has taken 2 inner steps since"
    )


def test_cores_and_gpus_are_dealt_by_ranks() -> None:
    assigned = assign_resources({"east": 2, "west": 1}, cores=16, gpus=["4", "5", "7", "8"], environment={})
    assert [each["OMP_NUM_THREADS"] for each in assigned.values()] == ["5", "5"]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in assigned.values()] == ["4,5", "7"]


def test_without_gpus_a_site_still_gets_a_core() -> None:
    assigned = assign_resources({"east": 8}, cores=2, gpus=[], environment={})
    assert assigned["east"]["OMP_NUM_THREADS"] == "1" and "CUDA_VISIBLE_DEVICES" not in assigned["east"]


def test_a_thread_count_of_the_user_is_kept() -> None:
    assert (
        assign_resources({"east": 1}, cores=8, gpus=[], environment={"OMP_NUM_THREADS": "3"})["east"]["OMP_NUM_THREADS"]
        == "3"
    )


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"take 3 GPUs \(east 2, west 1\) and this machine shows 2"):
        assign_resources({"east": 2, "west": 1}, cores=8, gpus=["0", "1"], environment={})
