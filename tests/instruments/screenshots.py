"""Pictures of all views, to look at: python -m tests.instruments.screenshots FOLDER [RUN]

Without a RUN, of one that is made up: eight sites, 150 rounds, and what goes wrong in such a run. Needs chromium, playwright
and rich.
"""

import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.instruments.lines import append, commit, round_, step
from titan_ext import cli
from titan_ext.commands.watch import open_reader, page_server
from titan_ext.instruments.alerts import load_rules
from titan_ext.instruments.snapshot import snapshot

SITES = ("amsterdam", "dallas", "helsinki", "mumbai", "oregon", "osaka", "paris", "sydney")
ROUNDS, STEPS, STEP_SECONDS = 150, 20, 1.5
AWAY = {"mumbai": range(40, 58), "sydney": range(139, 200), "paris": range(100, 101)}
"""Rounds without the site; it joins again in the one after."""
DEATHS = {
    "mumbai": "rank 3: RuntimeError: CUDA error: uncorrectable ECC error; restart 1 of 3",
    "sydney": "rank 0 was ended by SIGKILL, maybe for want of memory; restart 3 of 3",
}


def make_up(folder: Path) -> None:
    """Write the lines of the run, as if it were going on now."""
    lines = list(made_up())
    shift = time.time() - lines[-1][2]["time"] - 2
    for name, file, record in lines:
        append(folder / name / file, record | {"time": record["time"] + shift})
    for name in SITES:
        config = {
            "training": {"steps": 4000},
            "semi_sync": {"method": "diloco", "sync_every": STEPS},
            "site": [{"name": name}],
        }
        (folder / name / "config.json").write_text(json.dumps(config))


def made_up() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Site, file and line, in the order of time."""
    chance, now = random.Random(0), 0.0
    for name in SITES:
        yield name, "events.jsonl", {"kind": "phase", "phase": "running", "text": "starting", "time": now}
    for number in range(1, ROUNDS + 1):
        there = [name for name in SITES if number not in AWAY.get(name, ())]
        joined = [name for name in there if number - 1 in AWAY.get(name, ())]
        contributors = [name for name in there if name not in joined]
        late = 9.0 if any(number == away.start for away in AWAY.values()) else chance.uniform(0.2, 1.5)
        for name in contributors:
            for each in range(STEPS):
                taken = (number - 1) * STEPS + each + 1
                spike = 2.2 if name == "dallas" and number > ROUNDS - 2 else 0.0
                loss = 2.4 + 8 * math.exp(-taken / 400) + spike + chance.gauss(0, 0.06) + 0.1 * SITES.index(name) / 8
                rate = chance.gauss(21000, 400) * (0.8 if name == "osaka" else 1)
                line = step(taken, now + (each + 1) * STEP_SECONDS, loss=loss, tokens=32768 * taken, lr=3e-4)
                yield name, "metrics.jsonl", line | {"tokens_per_second": rate}
        now += STEPS * STEP_SECONDS + late + 2
        for name in there:
            layers = {f"layers.{each}": chance.random() * 2 for each in range(12)}
            record = round_(number, now, contributors, step=number * STEPS, healed=name in joined, seconds_quorum=late)
            record |= {"bytes_sent": 52_000_000 * len(there) // 8, "cosine": 0.3 + chance.random() / 10}
            record |= {"norms": {"pseudo_gradient": 3 * math.exp(-number / 60), "model": 210 + number / 10}}
            yield name, "metrics.jsonl", record | {"norms_by_layer": {"pseudo_gradient": layers, "model": layers}}
            yield name, "commits.jsonl", commit(number, now, contributors, there)
        for name, text in DEATHS.items():
            if number + 1 == AWAY[name].start:
                yield name, "events.jsonl", {"kind": "phase", "phase": "waiting", "text": text, "time": now + 1}


def terminal(run: str, out: Path) -> None:
    """The terminal view as SVG."""
    from rich.console import Console

    from titan_ext.instruments.terminal import draw

    reader = open_reader([run], None)
    reader.refresh()
    shot = reader.view(lambda run: snapshot(run, load_rules(), time.time()))
    with open("/dev/null", "w") as nowhere:
        console = Console(width=150, height=46, force_terminal=True, record=True, file=nowhere, highlight=False)
        console.print(draw(shot, console))
    out.write_text(console.export_svg(title="titan-ext watch"))


def pages(run: str, folder: Path) -> None:
    """The page and the report, light and dark."""
    from playwright.sync_api import sync_playwright

    reader = open_reader([run], None)
    reader.refresh()
    server = page_server(reader, load_rules(), "127.0.0.1", 0)
    cli.main(["report", run, "--out", str(folder / "report.html")])
    urls = {"page": f"http://127.0.0.1:{server.port}/", "report": (folder / "report.html").resolve().as_uri()}
    urls["terminal"] = (folder / "terminal.svg").resolve().as_uri()
    with sync_playwright() as running:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, url in urls.items():
            for scheme in ("light", "dark") if name != "terminal" else ("light",):
                tab = browser.new_page(viewport={"width": 1440, "height": 1000}, color_scheme=scheme)
                tab.goto(url)
                if name != "terminal":
                    tab.wait_for_selector("#verdict-text")
                tab.screenshot(path=folder / f"{name}_{scheme}.png", full_page=name != "terminal")
                tab.close()
        browser.close()
    server.stop()


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    run = sys.argv[2] if len(sys.argv) > 2 else str(folder / "run")
    if len(sys.argv) == 2:
        shutil.rmtree(run, ignore_errors=True)
        make_up(Path(run))
    terminal(run, folder / "terminal.svg")
    pages(run, folder)
    print(f"{folder}: {', '.join(sorted(each.name for each in folder.glob('*.png')))}")


if __name__ == "__main__":
    main()
