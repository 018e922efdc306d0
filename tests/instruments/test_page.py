"""The page in a browser: it shows what the data says, follows it, and complains about nothing."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.instruments.lines import append, commit, step, trained
from tests.instruments.test_run import BOTH
from tests.instruments.test_views import trouble
from titan_ext import cli
from titan_ext.commands.watch import page_server
from titan_ext.instruments.alerts import load_rules
from titan_ext.instruments.places import LocalSites
from titan_ext.instruments.reader import RunReader

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's test needs playwright")
    if CHROMIUM is None:
        pytest.skip("the page's test needs chromium")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    opened = browser.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    # Nothing may be fetched from anywhere else.
    opened.on("request", lambda request: complaints.append(request.url) if "127.0.0.1" not in request.url and not request.url.startswith(("file:", "data:")) else None)  # fmt: skip
    yield opened
    opened.close()
    assert complaints == []


def test_the_page_follows_a_run(tab: Any, tmp_path: Path) -> None:
    for name in BOTH:
        trained(tmp_path, name, (1, 2), BOTH)
        (tmp_path / name / "summary.json").write_text("{}")
    reader = RunReader("run", [LocalSites([tmp_path])])
    server = page_server(reader, load_rules(), "127.0.0.1", 0)
    reader.refresh()
    reader.start(0.1)
    try:
        tab.goto(f"http://127.0.0.1:{server.port}/")
        tab.wait_for_selector("#verdict.over")
        assert tab.locator("#timeline svg g").count() == 4 and "40" not in tab.inner_text("#sites")
        (tmp_path / "west" / "summary.json").unlink()
        trained(tmp_path, "west", (3, 4, 5), ["west"])
        text = "rank 0 was ended by SIGKILL; restart 1 of 3"
        append(tmp_path / "east" / "events.jsonl", {"kind": "phase", "phase": "waiting", "text": text, "time": 21.0})
        (tmp_path / "east" / "summary.json").unlink()
        tab.wait_for_selector("#verdict.critical")
        assert f"east: missed the last 3 rounds: {text}" in tab.inner_text("#verdict")
        assert text in tab.inner_text("#gaps") and text in tab.inner_text("#alerts")
        assert tab.locator("#timeline svg g").count() == 10
        append(tmp_path / "west" / "metrics.jsonl", step(51, 51.0, loss=1.2345))
        tab.wait_for_function("document.getElementById('sites').innerText.includes('1.2345')")
        tab.click("text=bytes sent")
        assert "Loss by bytes sent" in tab.inner_text("#charts") or "LOSS BY BYTES SENT" in tab.inner_text("#charts")
    finally:
        reader.stop()
        server.stop()


def test_a_report_in_a_browser(tab: Any, tmp_path: Path) -> None:
    trouble(tmp_path / "first")
    name = "<b>x"
    trained(tmp_path / "second", name, (1, 2), [name])
    append(tmp_path / "second" / name / "commits.jsonl", commit(3, 30.0, [name], [name]))
    out = tmp_path / "report.html"
    assert cli.main(["report", str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(out)]) == 0
    tab.goto(out.as_uri())
    tab.wait_for_selector("#verdict.critical")
    assert "east: missed the last 3 rounds" in tab.inner_text("#verdict")
    tab.click("#runs button:has-text('second')")
    assert name in tab.inner_text("#sites"), "a name is text, whatever it looks like"
