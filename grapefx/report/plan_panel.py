"""The plan's section of the HTML page: feedback points, maps, what runs when, the proof."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from grapefx.report import units
from grapefx.report.model import MethodReport, PlanReport, SegmentRow
from grapefx.report.plan_text import derived, error_tap, exact_part, proof, shape
from grapefx.report.svg import elide


def plan_section(m: MethodReport, attrs: str) -> str:
    """The compiler's plan; without one, the feedback maps alone."""
    said = _facts(m, m.plan) if m.plan else ()
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in said)
    rows = m.plan.rows if m.plan else _maps(m)
    table = _table(rows, m.feedback_bytes) if m.feedback else ""
    if not table and not facts:
        return ""
    title = "Plan and feedback maps" if m.feedback else "Plan"
    return (
        f"<section {attrs}><h2>{title}</h2><p class='lead'>Where the gradient is cut, and what "
        f"turns the output error into a layer's cotangent there.</p><dl>{facts}</dl>{table}"
        "</section>"
    )


def _facts(m: MethodReport, p: PlanReport) -> Iterator[tuple[str, str]]:
    yield from p.runs
    yield "output error", error_tap(p)
    if m.method != "bp":
        if exact := exact_part(p):
            yield "exact", exact
        yield "updates", proof(p)
    if any(kind == "align" for kind, _ in p.runs):
        yield "tangents", derived(p)


def _maps(m: MethodReport) -> tuple[SegmentRow, ...]:
    return tuple(
        SegmentRow(f.layer, "", (), (), 0, "", f.kind, f.shape, f.bytes) for f in m.feedback
    )


def _table(rows: tuple[SegmentRow, ...], total: int) -> str:
    peak = max((r.map_bytes for r in rows), default=0)
    body = "".join(_row(r, peak) for r in rows)
    body += (
        f"<tr><td><b>all</b></td><td></td><td></td><td></td><td></td><td></td>"
        f"<td><b>{units.size(total)}</b></td></tr>"
    )
    heads = ("Layer", "Cut behind", "A sample", "Parameters", "Map", "Shape", "Memory")
    head = "".join(f"<th>{h}</th>" for h in heads)
    tall = " tall" if len(rows) > 15 else ""
    return (
        f'<div class="scroll{tall}"><table><thead><tr>{head}</tr></thead><tbody>{body}'
        "</tbody></table></div>"
    )


def _row(r: SegmentRow, peak: int) -> str:
    names = ", ".join(r.parameters)
    tip = f'data-tip="{escape(r.layer, quote=True)}|{escape(names, quote=True)}"' if names else ""
    bar = f'<i style="width:{100 * r.map_bytes / peak if peak else 0:.1f}%"></i>'
    memory = f"{units.size(r.map_bytes)}{bar}" if r.map_kind else ""
    source = f' title="{escape(r.source, quote=True)}"' if r.source else ""
    return (
        f"<tr {tip}><td{source}>{escape(elide(r.layer, 36))}</td>"
        f"<td>{escape(elide(r.value, 20)) or 'true error'}</td><td>{shape(r.shape)}</td>"
        f"<td>{units.count(r.parameter_count) if r.parameter_count else ''}</td>"
        f"<td>{escape(r.map_kind or '')}</td><td>{shape(r.map_shape) if r.map_shape else ''}</td>"
        f'<td class="meter">{memory}</td></tr>'
    )
