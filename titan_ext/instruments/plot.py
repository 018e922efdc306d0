"""Curves in a terminal, drawn with Braille's dots: two by four of them in each cell."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.text import Text

from titan_ext.launcher.text import bytes_text, number_text

AXES = {"step": "steps", "time": "seconds", "tokens": "tokens", "bytes_sent": "bytes sent"}
"""What a loss can be drawn over: key of the curve to its name."""

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_LEFT = 9  # cells for the numbers beside the curves
_SMOOTHED = 80  # points of a smoothed curve


def loss_plot(
    sites: Sequence[Mapping[str, Any]], axis: str, width: int, height: int, colors: Mapping[str, str]
) -> Text:
    """The losses of all sites over one axis, ``width`` by ``height`` cells with their scales."""
    curves = {site["name"]: _points(site["curve"], axis) for site in sites}
    every = [each for points in curves.values() for each in points]
    if not every:
        return Text(f"no loss by {AXES[axis]} yet", "dim")
    start = min(x for x, _ in every) if axis == "time" else 0.0
    right = max(max(x for x, _ in every) - start, 1e-9)
    low, high = min(y for _, y in every), max(y for _, y in every)
    high = high if high > low else low + 1.0
    canvas = _Canvas(width - _LEFT, height - 2)
    for name, points in curves.items():
        canvas.draw([((x - start) / right, (y - low) / (high - low)) for x, y in points], colors[name])
    lines = canvas.lines()
    for row, line in enumerate(lines):
        value = high - (high - low) * row / max(1, len(lines) - 1)
        label = f"{value:>{_LEFT - 2}.3f} ┤" if row in (0, len(lines) // 2, len(lines) - 1) else " " * (_LEFT - 1) + "│"
        lines[row] = Text.assemble((label, "dim"), line)
    end = bytes_text(right) if axis == "bytes_sent" else number_text(right, ",.0f") + (" s" if axis == "time" else "")
    lines.append(Text(f"{'':<{_LEFT}}0{end:>{max(1, width - _LEFT - 1)}}", "dim"))
    lines.append(Text.assemble(" " * _LEFT, *((f"━ {name}   ", colors[name]) for name in curves)))
    return Text("\n").join(lines)


def _points(curve: Mapping[str, Sequence[Any]], axis: str) -> list[tuple[float, float]]:
    """Of the curve, each the median of its neighbours where there are many."""
    pairs = [(x, y) for x, y in zip(curve[axis], curve["loss"], strict=True) if x is not None and y is not None]
    around = len(pairs) // _SMOOTHED
    return [
        (x, median(y for _, y in pairs[max(0, place - around) : place + around + 1]))
        for place, (x, _) in enumerate(pairs)
    ]


class _Canvas:
    """Cells of dots, each in the color of the curve that drew on it last."""

    def __init__(self, width: int, height: int) -> None:
        self._width, self._height = max(1, width), max(1, height)
        self._cells = [[0] * self._width for _ in range(self._height)]
        self._colors = [[""] * self._width for _ in range(self._height)]

    def draw(self, points: Sequence[tuple[float, float]], color: str) -> None:
        """Join points, both coordinates from 0 to 1, by straight lines."""
        dots = [(round(x * (2 * self._width - 1)), round((1 - y) * (4 * self._height - 1))) for x, y in points]
        for (left, up), (right, down) in zip(dots, dots[1:] or dots, strict=False):
            steps = max(abs(right - left), abs(down - up), 1)
            for each in range(steps + 1):
                self._dot(left + (right - left) * each // steps, up + (down - up) * each // steps, color)

    def lines(self) -> list[Text]:
        """The rows from the top."""
        return [
            Text.assemble(*((chr(0x2800 + cell), color) for cell, color in zip(cells, colors, strict=True)))
            for cells, colors in zip(self._cells, self._colors, strict=True)
        ]

    def _dot(self, x: int, y: int, color: str) -> None:
        self._cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
        self._colors[y // 4][x // 2] = color
