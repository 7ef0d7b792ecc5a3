"""A schedule as inline SVG: one row a worker, time to the right."""

from __future__ import annotations

from html import escape
from math import floor, log10

from grapefx.report import units
from grapefx.report.colours import css_class, label
from grapefx.report.model import Bar, ScheduleRow
from grapefx.report.svg import elide

WIDTH = 1000
LEFT, RIGHT = 34, 14
MAX_ROWS = 24


def gantt_svg(row: ScheduleRow, scale: float, title: str) -> str:
    """The chart; ``scale`` (seconds) is the length of the time axis."""
    rows = max(1, min(row.used, MAX_ROWS))
    pitch = 28 if rows <= 4 else 20 if rows <= 10 else 13
    height = rows * pitch + 26
    unit = (WIDTH - LEFT - RIGHT) / scale if scale else 0.0
    parts = [_axis(scale, unit, rows * pitch)]
    for w in range(rows):
        parts.append(
            f'<text class="num" x="{LEFT - 8}" y="{w * pitch + pitch / 2 + 4}">{w + 1}</text>'
        )
    parts += [_bar(b, unit, pitch) for b in row.bars if b.worker < rows]
    end = LEFT + row.seconds * unit
    parts.append(f'<path class="end" d="M{end:.1f} 0V{rows * pitch}"/>')
    return (
        f'<svg class="gantt" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title, quote=True)}">' + "".join(parts) + "</svg>"
    )


def hidden_rows(row: ScheduleRow) -> int:
    """Workers that the chart has no room for."""
    return max(0, row.used - MAX_ROWS)


def _bar(b: Bar, unit: float, pitch: int) -> str:
    x, y = LEFT + b.start * unit, b.worker * pitch + 2
    width, height = max(0.6, (b.end - b.start) * unit), pitch - 4
    tip = (
        f"{b.layer} · {label(b.phase)}|{units.seconds(b.end - b.start)}, from "
        f"{units.seconds(b.start)} to {units.seconds(b.end)}|"
        f"{b.nodes} node{'s' if b.nodes > 1 else ''}"
        + (", on the critical path" if b.critical else "")
    )
    gap = 0.6 if width > 3 else 0
    out = (
        f'<g class="bar {css_class(b.phase)}" data-tip="{escape(tip, quote=True)}">'
        f'<rect x="{x:.1f}" y="{y}" width="{width - gap:.1f}" height="{height}" rx="2"/>'
    )
    if b.critical:
        out += (
            f'<rect class="critline" x="{x:.1f}" y="{y + height - 2.5}" '
            f'width="{width - gap:.1f}" height="2.5"/>'
        )
    room = int((width - 8) / 6.6)
    if room >= min(6, len(b.layer)) and pitch >= 20:
        name = escape(elide(b.layer, room))
        out += f'<text x="{x + 5:.1f}" y="{y + height / 2 + 3.5}">{name}</text>'
    return out + "</g>"


def _axis(scale: float, unit: float, bottom: float) -> str:
    if scale <= 0:
        return ""
    step = _nice(scale / 7)
    parts = []
    t = 0.0
    while t <= scale * 1.0001:
        x = LEFT + t * unit
        parts.append(f'<path class="grid" d="M{x:.1f} 0V{bottom + 4}"/>')
        anchor = "end" if x > WIDTH - 40 else "middle"
        parts.append(
            f'<text class="tick" text-anchor="{anchor}" x="{x:.1f}" '
            f'y="{bottom + 18}">{units.seconds(t)}</text>'
        )
        t += step
    return "".join(parts)


def _nice(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** floor(log10(value))
    return float(next(m * power for m in (1, 2, 5, 10) if m * power >= value * 0.999))
