"""Renders a report as one HTML page that needs no network and no libraries.

The markup is in ``templates/*.html.j2``, which jinja2 fills with HTML escaping on; what a template
shows is worked out by :mod:`.cards`, :mod:`.panels`, :mod:`.svg` and :mod:`.gantt`, which know
nothing of markup.
"""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import escape

from grapefx.report.records import ReportData, worker_key
from grapefx.report.render import panels, units
from grapefx.report.render.cards import cards
from grapefx.report.render.colours import PHASES, css_class, css_variables, label
from grapefx.report.render.gantt import gantt
from grapefx.report.render.sentences import notes, plan_facts
from grapefx.report.render.svg import layer_picture


def render_html(report: ReportData) -> str:
    """A whole HTML document, readable from 320 px up, light and dark by the reader's setting."""
    methods = report.methods[1:] or report.methods
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            report=report,
            bp=report.methods[0],
            methods=methods,
            shown_method=methods[-1].method,
            shown_workers=worker_key(_first_workers(report)),
            notes=notes(report),
        )
    )


def render_notebook(report: ReportData) -> str:
    """The page inside a frame, so that its styles stay its own."""
    return framed(render_html(report))


def framed(page: str) -> str:
    """A page inside a frame, for notebooks."""
    return (
        f'<iframe srcdoc="{escape(page)}" style="width:100%;height:900px;'
        'border:1px solid #8884;border-radius:8px" title="grapefx report"></iframe>'
    )


def _first_workers(report: ReportData) -> int | None:
    """The number of workers shown first: 8 or the largest finite one below it."""
    finite = [p for p in report.workers if p is not None]
    return max((p for p in finite if p <= 8), default=finite[0] if finite else None)


@functools.cache
def templates() -> Environment:
    """The templates, with what they call: units and names as filters, panels as functions."""
    env = Environment(
        loader=PackageLoader("grapefx.report.render"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "count": units.count,
        "css_class": css_class,
        "elide": units.elide,
        "flops": units.flops,
        "label": label,
        "percent_of": _percent_of,
        "pixels": lambda x: f"{x:.1f}",
        "ratio": units.ratio,
        "seconds": units.seconds,
        "shape": units.shape,
        "size": units.size,
        "tone": panels.tone,
        "workers": units.workers,
    }
    env.filters.update(filters)
    shared: dict[str, Any] = {
        "cards": cards,
        "css_variables": css_variables,
        "phase_colours": tuple(PHASES),
        "gantt": gantt,
        "layer_columns": panels.layer_columns,
        "layer_picture": layer_picture,
        "map_rows": panels.map_rows,
        "path_by_phase": panels.path_by_phase,
        "plan_facts": plan_facts,
        "schedules": panels.schedules,
        "worker_key": worker_key,
    }
    env.globals.update(shared)
    return env


def _percent_of(part: float, whole: float, digits: int = 1) -> str:
    """A CSS length: ``part`` in percent of ``whole``."""
    return f"{100 * part / whole if whole else 0:.{digits}f}%"
