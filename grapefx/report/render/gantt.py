"""Lays a schedule out as a Gantt chart: one row a worker, time to the right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor, log10

from grapefx.report.records import Bar, ScheduleRow
from grapefx.report.render import units
from grapefx.report.render.colours import css_class, label

WIDTH = 1000
LEFT, RIGHT = 34, 14
MAX_ROWS = 24


@dataclass(frozen=True)
class Tick:
    """A mark on the time axis: its place, its text, and how the text is anchored."""

    x: float
    text: str
    anchor: str


@dataclass(frozen=True)
class GanttBar:
    """A drawn bar; ``name`` is empty where the layer's name does not fit in."""

    css: str
    tip: str
    x: float
    y: float
    width: float
    height: float
    critical: bool
    name: str


@dataclass(frozen=True)
class Gantt:
    """A chart in SVG units. ``bottom`` is where the rows end, ``end`` where the step ends.

    ``hidden`` counts the workers that the chart has no room for.
    """

    width: int
    height: int
    bottom: int
    ticks: tuple[Tick, ...]
    workers: tuple[tuple[float, float], ...]
    bars: tuple[GanttBar, ...]
    end: float
    hidden: int


def gantt(row: ScheduleRow, scale: float) -> Gantt:
    """The chart of a schedule; ``scale`` (seconds) is the length of the time axis."""
    rows = max(1, min(row.used, MAX_ROWS))
    pitch = 28 if rows <= 4 else 20 if rows <= 10 else 13
    unit = (WIDTH - LEFT - RIGHT) / scale if scale else 0.0
    return Gantt(
        WIDTH,
        rows * pitch + 26,
        rows * pitch,
        tuple(_ticks(scale, unit)),
        tuple((LEFT - 8, w * pitch + pitch / 2 + 4) for w in range(rows)),
        tuple(_bar(b, unit, pitch) for b in row.bars if b.worker < rows),
        LEFT + row.seconds * unit,
        max(0, row.used - MAX_ROWS),
    )


def _bar(b: Bar, unit: float, pitch: int) -> GanttBar:
    width = max(0.6, (b.end - b.start) * unit)
    tip = (
        f"{b.layer} · {label(b.phase)}|{units.seconds(b.end - b.start)}, from "
        f"{units.seconds(b.start)} to {units.seconds(b.end)}|"
        f"{b.nodes} node{'s' if b.nodes > 1 else ''}"
        + (", on the critical path" if b.critical else "")
    )
    room = int((width - 8) / 6.6)
    fits = room >= min(6, len(b.layer)) and pitch >= 20
    return GanttBar(
        css_class(b.phase),
        tip,
        LEFT + b.start * unit,
        b.worker * pitch + 2,
        width - (0.6 if width > 3 else 0),
        pitch - 4,
        b.critical,
        units.elide(b.layer, room) if fits else "",
    )


def _ticks(scale: float, unit: float) -> Iterator[Tick]:
    if scale <= 0:
        return
    step = _nice(scale / 7)
    t = 0.0
    while t <= scale * 1.0001:
        x = LEFT + t * unit
        yield Tick(x, units.seconds(t), "end" if x > WIDTH - 40 else "middle")
        t += step


def _nice(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** floor(log10(value))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power >= value * 0.999))
