"""The terminal view of a run, drawn from its snapshot with rich."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from titan_ext.instruments.plot import AXES, loss_plot
from titan_ext.launcher.text import bytes_text, duration_text, number_text

COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")
"""Of the sites' curves."""

_LEVELS = {
    "critical": ("✖", "bold white on red"),
    "warning": ("▲", "bold black on yellow"),
    "ok": ("●", "bold white on green"),
    "over": ("■", "bold white on blue"),
}
_STATES = {
    "training": "green",
    "finished": "blue",
    "starting": "cyan",
    "waiting": "cyan",
    "restarting": "bold yellow",
    "silent": "bold red",
    "failed": "bold red",
    "unreadable": "bold red",
}
_ROWS = {"critical": "bold red", "warning": "yellow"}
"""Of what a site does, where it has raised an alert."""
_MARKS = {
    "c": ("█", "green"),
    "r": ("▓", "yellow"),
    "j": ("◐", "cyan"),
    "l": ("◇", "yellow"),
    "a": ("✖", "bold red"),
    "b": ("·", "dim"),
    "u": ("?", "dim"),
}
_LEGEND = (("c", "contributed"), ("r", "after a failed try"), ("j", "joined"), ("l", "left out"), ("a", "absent"))
_TITLES = (
    "step",
    "loss",
    "took part",
    "stall",
    "last line",
    "tokens/s",
    "round",
    "sent",
    "loss so far",
    "restarts",
    "disk",
)
_COLUMNS = ((11, 113), (8, 82), (5, 56), (3, 32), (1, 14), (0, 0))
"""How many of the titles can be shown, and what they take; a number that is cut would be another one."""
_STATE_WIDTH = 11
"""That is left for what a site does, at least."""
_BARS = "▁▂▃▄▅▆▇█"


def draw(shot: Mapping[str, Any], console: Console, axis: str = "step") -> RenderableType:
    """All of the view, in the console's size.

    Args:
        shot: as ``snapshot`` makes it.
        console: where it will be shown.
        axis: what the loss is drawn over, one of ``AXES``.
    """
    width, height = console.size
    colors = {site["name"]: COLORS[place % len(COLORS)] for place, site in enumerate(shot["sites"])}
    parts: list[RenderableType] = [_headline(shot)]
    if shot["alerts"]:
        # Above the sites, of which there may be more than lines. Without alerts the first problem is the headline.
        parts += [Text(f" ▲ {each}", "yellow", no_wrap=True, overflow="ellipsis") for each in shot["problems"]]
        parts.append(_alerts(shot["told"], most=max(2, height // 6)))
    parts.append(_sites(shot, colors, width))
    if shot["timeline"]["rounds"]:
        parts.append(_timeline(shot["timeline"], width, wanted=6))
    used = sum(len(console.render_lines(part)) for part in parts)
    rows = min(16, height - used - 4)
    if rows >= 5:
        plot = loss_plot(shot["sites"], axis, width - 4, rows, colors)
        parts.append(Panel(plot, title=f"loss by {AXES[axis]}", title_align="left", box=box.SQUARE, border_style="dim"))
    return Group(*parts)


def _headline(shot: Mapping[str, Any]) -> RenderableType:
    verdict = shot["verdict"]
    sign, style = _LEVELS[verdict["level"]]
    line = Text.assemble((f" {sign} {verdict['text']} ", style), no_wrap=True, overflow="ellipsis")
    clock = time.strftime("%H:%M:%S", time.localtime(shot["time"]))
    return Group(line, Text(f"{shot['name']}   {verdict['state']}   {clock}", style="dim", no_wrap=True))


def _sites(shot: Mapping[str, Any], colors: Mapping[str, str], width: int) -> Table:
    longest = max(map(len, colors), default=4)
    room = width - longest - _STATE_WIDTH
    count, taken = next((each for each in _COLUMNS if each[1] <= room), _COLUMNS[-1])
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(
        "site", no_wrap=True, min_width=min(longest, max(4, width - _STATE_WIDTH - 3)), overflow="ellipsis"
    )
    table.add_column(
        "state",
        min_width=5,
        max_width=max(_STATE_WIDTH, room + _STATE_WIDTH - taken),
        overflow="ellipsis",
        no_wrap=True,
    )
    for title in _TITLES[:count]:
        table.add_column(title, justify="right", no_wrap=True)
    levels = {alert["site"]: alert["severity"] for alert in reversed(shot["alerts"])}
    for site in shot["sites"]:
        cells = _cells(site, shot["time"])
        level = levels.get(site["name"])
        sign = f"{_LEVELS[level][0]} " if level else ""
        style = _ROWS[level] if level else _STATES.get(site["state"], "dim")
        table.add_row(
            Text(site["name"], style=f"bold {colors[site['name']]}"),
            Text(f"{sign}{site['state']}{': ' if site['text'] else ''}{site['text']}", style),
            *cells[:count],
        )
    return table


def _cells(site: Mapping[str, Any], now: float) -> list[Text]:
    measures = site["measures"]
    stall, part, free = measures["stall"], measures["participation"], measures["disk_free"]
    total = f"/{site['steps']}" if site["steps"] else ""
    loss = number_text(site["loss"], ".4f") if site["is_finite"] else "nan"
    age = None if site["last_time"] is None or site["over"] else max(0.0, now - site["last_time"])
    return [
        Text("-" if site["step"] is None else f"{site['step']}{total}"),
        Text(loss, "bold red" if not site["is_finite"] else ""),
        Text(_percent(part), "red" if part is not None and part < 0.8 else ""),
        Text(_percent(stall), "yellow" if stall is not None and stall > 0.2 else ""),
        Text("-" if age is None else f"{duration_text(age)} ago", "red" if measures["silent"] else ""),
        Text(number_text(site["tokens_per_second"], ",.0f")),
        Text(number_text(site["round"], "d")),
        Text(bytes_text(site["bytes_sent"])),
        Text(sparkline(site["curve"]["loss"]), "dim"),
        Text(number_text(site["restarts"], "d")),
        Text(_percent(free), "red" if free is not None and free < 0.05 else ""),
    ]


def _alerts(alerts: Sequence[Mapping[str, Any]], most: int) -> Panel:
    table = Table.grid(padding=(0, 1))
    for alert in alerts[:most]:
        sign, _ = _LEVELS[alert["severity"]]
        color = "bold red" if alert["severity"] == "critical" else "yellow"
        table.add_row(
            Text(sign, color),
            Text.assemble((f"{alert['site']}: ", "bold"), alert["text"], "\n", (alert["advice"], "dim")),
        )
    more = len(alerts) - most
    title = f"alerts ({len(alerts)}{f', {more} not shown' if more > 0 else ''})"
    return Panel(table, title=title, title_align="left", box=box.SQUARE, border_style="red")


def _timeline(timeline: Mapping[str, Any], width: int, wanted: int) -> RenderableType:
    name_width = min(max(len(name) for name in timeline["rows"]), max(8, width // 2 - 6))
    columns = max(10, width - name_width - 6)
    rounds = timeline["rounds"][-columns:]
    lines = [Text(f"{'round':<{name_width}}  {_ruler(rounds)}", "dim")]
    for name, row in timeline["rows"].items():
        cells = [_MARKS[letter] for letter in row[-columns:]]
        lines.append(Text.assemble((f"{name[:name_width]:<{name_width}}  ", "bold"), *cells))
    legend = Text.assemble(*(part for mark, text in _LEGEND for part in (_MARKS[mark], (f" {text}   ", "dim"))))
    shown = [each for each in timeline["stretches"] if each["last"] >= rounds[0] and each["mark"] != "r"]
    told = sorted(shown, key=lambda each: (each["last"], each["first"]))[-wanted:]
    reasons = [_reason(each, name_width) for each in reversed(told)]
    if len(shown) > wanted:
        reasons.append(Text(f"{'':<{name_width}}  … and {len(shown) - wanted} earlier gaps", "dim"))
    title = "who took part, and why not"
    return Panel(Group(*lines, legend, *reasons), title=title, title_align="left", box=box.SQUARE, border_style="dim")


def _reason(stretch: Mapping[str, Any], name_width: int) -> Text:
    sign, color = _MARKS[stretch["mark"]]
    first, last = stretch["first"], stretch["last"]
    where = f"round {first}" if first == last else f"rounds {first}-{last}"
    name = (f"{stretch['site'][:name_width]:<{name_width}}  ", "bold")
    return Text.assemble(name, (f"{sign} ", color), f"{where}: {stretch['reason']}", no_wrap=True, overflow="ellipsis")


def _ruler(rounds: Sequence[int]) -> str:
    """The rounds' numbers over their columns, every tenth."""
    line = [" "] * len(rounds)
    for place, each in enumerate(rounds):
        text = str(each)
        if (
            (place == 0 or each % 10 == 0)
            and place + len(text) <= len(rounds)
            and "".join(line[place - 1 : place]) in ("", " ")
        ):
            line[place : place + len(text)] = text
    return "".join(line)


def sparkline(values: Sequence[float | None], cells: int = 12) -> str:
    """A curve in one line; a space for what is not known."""
    if not values:
        return ""
    stride = max(1, -(-len(values) // cells))
    thinned = [values[place : place + stride][-1] for place in range(0, len(values), stride)]
    known = [each for each in thinned if each is not None]
    low, span = min(known, default=0.0), (max(known, default=0.0) - min(known, default=0.0)) or 1.0
    top = len(_BARS) - 1
    return "".join(" " if each is None else _BARS[round((each - low) / span * top)] for each in thinned)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
