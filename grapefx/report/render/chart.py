"""Lays a chart of curves out in SVG units: axes, ticks, and a path for each curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 30
MOST = 240  # points of a curve; more are averaged
# dark blue (first layer) to yellow (last layer): order shows without reading the legend
RAMP = ("#3b3b98", "#2f6db5", "#1f9aa8", "#2fb47c", "#86c440", "#e0b520", "#e8722a")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve: the ``d`` of its path, its colour, its name, its last value."""

    path: str
    colour: str
    name: str
    last: float


@dataclass(frozen=True)
class Chart:
    """What the template draws; ``x_ticks`` and ``y_ticks`` pair a place with a text."""

    width: int
    height: int
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def chart(curves: Sequence[tuple[str, Points]]) -> Chart:
    """Curves of values from -1 to 1 over steps, on common axes; a single point is a dash."""
    steps = [x for _, points in curves for x, _ in points]
    values = [y for _, points in curves for _, y in points]
    first, last = min(steps), max(steps)
    low = min(0.0, math.floor(5 * min(values)) / 5)
    high = max(0.2, min(1.0, math.ceil(5 * max(values)) / 5))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / max(1, last - first)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    lines = []
    for i, (name, points) in enumerate(curves):
        at = [f"{x(s):.1f} {y(v):.1f}" for s, v in thinned(points)]
        path = "M" + "L".join(at) if len(at) > 1 else f"M{at[0]}h8"
        lines.append(Line(path, ramp(i, len(curves)), name, points[-1][1]))
    ticks = sorted({round(first + k * (last - first) / 5) for k in range(6)})
    count = round((high - low) / 0.2)
    return Chart(
        WIDTH,
        HEIGHT,
        tuple(lines),
        tuple((x(s), f"{s:,}") for s in ticks),
        tuple((y(low + 0.2 * k), f"{low + 0.2 * k:.1f}") for k in range(count + 1)),
    )


def thinned(points: Points) -> Points:
    """At most ``MOST`` points: means of as many neighbours as that takes."""
    size = math.ceil(len(points) / MOST)
    groups = [points[k : k + size] for k in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def ramp(index: int, count: int) -> str:
    """The colour of a curve, by its place among ``count``."""
    return RAMP[round(index * (len(RAMP) - 1) / max(1, count - 1))]
