"""The sections of the HTML page; those of one method carry ``data-if-method``."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from grapefx.report import units
from grapefx.report.colours import css_class, label
from grapefx.report.gantt import gantt_svg, hidden_rows
from grapefx.report.model import MethodReport, PathStep, Report, StepReport, worker_key
from grapefx.report.plan_panel import plan_section
from grapefx.report.svg import elide, layer_graph_svg


def cards(r: Report, m: MethodReport, shown: str, hidden: bool) -> str:
    """The summary: one figure a card."""
    bp = r.methods[0]
    out = [
        _card(
            "Critical path",
            units.ratio(m.span_ratio),
            "shorter" if m.span_ratio >= 1 else "of BP's",
            f"{units.flops(m.span_flops)} on the longest path, BP {units.flops(bp.span_flops)}. "
            f"With a whole layer as one task: {units.ratio(m.layer_span_ratio)}.",
            m.span_ratio,
        ),
        _card(
            "Total work",
            units.ratio(_inverse(m.work_ratio)),
            "BP's",
            f"{units.flops(m.work_flops)} a step, BP {units.flops(bp.work_flops)}; weight "
            "gradients included.",
            m.work_ratio,
        ),
    ]
    for p in r.workers:
        key = worker_key(p)
        lanes = "1 worker" if p == 1 else f"{units.workers(p)} workers"
        out.append(
            _card(
                f"Step on {lanes}",
                units.ratio(m.time_ratio[key]),
                "BP's speed",
                f"{units.seconds(m.seconds[key])} predicted, BP {units.seconds(bp.seconds[key])}.",
                m.time_ratio[key],
                f'data-if-workers="{key}"' + (" hidden" if key != shown else ""),
            )
        )
    out.append(_updates(m, bp))
    if m.arithmetic_ratio is not None:
        out.append(
            _card(
                "Paper's arithmetic bound",
                units.ratio(m.arithmetic_ratio),
                "",
                f"(1 + beta) / (1 + alpha) with alpha {m.alpha:.2f}, beta {m.beta:.2f}; it leaves "
                "the method's weight gradients out.",
            )
        )
    if m.feedback:
        share = ""
        if r.parameters:
            part = m.feedback_bytes / (4 * r.parameters)
            share = f", {units.percent(part) if part < 1 else units.ratio(part)} of the weights"
        out.append(
            _card(
                "Feedback maps",
                units.size(m.feedback_bytes),
                "",
                f"{len(m.feedback)} maps{share} (in float32).",
            )
        )
    if m.calibration:
        out.append(_calibration(m))
    return f'<div class="cards" {_if(m, hidden)}>{"".join(out)}</div>'


def _updates(m: MethodReport, bp: MethodReport) -> str:
    depth, base = m.shown.update_depth, bp.shown.update_depth
    if m.independent:
        return _card(
            "Updates",
            "independent",
            "",
            f"No layer's update waits for another's; BP's form a chain of {base}.",
            2.0,
        )
    waits = len({w for s in m.steps for w in s.update_waits})
    return _card(
        "Updates",
        f"{depth} in a row",
        "",
        f"{waits} layer updates wait for another layer's; BP's form a chain of {base}.",
        0.5 if m is not bp else None,
    )


def _calibration(m: MethodReport) -> str:
    c = m.calibration
    assert c is not None
    every = "epoch" if c.every == 1 else f"{c.every:g} epochs"
    if c.overhead is None:
        return _card(
            "Calibration",
            units.flops(c.backward_flops),
            "",
            f"One BP step every {every}; --steps-per-epoch gives its share.",
        )
    return _card(
        "Calibration",
        f"+{units.percent(c.overhead)}",
        "work",
        f"One BP step every {every} of {c.steps_per_epoch} steps (001 eq. 21).",
    )


def _card(k: str, v: str, unit: str, s: str, ratio: float | None = None, extra: str = "") -> str:
    tone = "" if ratio is None or 0.98 <= ratio <= 1.02 else " good" if ratio > 1 else " bad"
    small = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<div class="card" {extra}><div class="k">{escape(k)}</div>'
        f'<div class="v{tone}">{escape(v)}{small}</div><div class="s">{escape(s)}</div></div>'
    )


def warnings(r: Report) -> str:
    """Everything that the reader should distrust."""
    if not r.warnings:
        return ""
    items = "".join(f"<li>{escape(w)}</li>" for w in r.warnings)
    return f'<section class="warn"><h2>Warnings</h2><ul>{items}</ul></section>'


def comparison(r: Report) -> str:
    """All methods, one row each."""
    heads = [
        "Method",
        "Work",
        "Span",
        "Span by layer",
        "Parallelism",
        *(f"P = {units.workers(p)}" for p in r.workers),
    ]
    rows = []
    for m in r.methods:
        cells = [
            f'<td class="name">{escape(m.method)}</td>',
            _with_ratio(units.flops(m.work_flops), m.work_ratio),
            _with_ratio(units.flops(m.span_flops), m.span_ratio),
            _with_ratio(units.flops(m.layer_span_flops), m.layer_span_ratio),
            f"<td>{m.work_flops / m.span_flops if m.span_flops else 1:.2f}</td>",
            *(
                _with_ratio(units.seconds(m.seconds[worker_key(p)]), m.time_ratio[worker_key(p)])
                for p in r.workers
            ),
        ]
        rows.append(f'<tr data-method="{escape(m.method, quote=True)}">{"".join(cells)}</tr>')
    return (
        "<section><h2>All methods</h2><p class='lead'>FLOPs of one step, and its predicted time on "
        "P workers. The small figure is BP's value over the method's: above 1 is better than BP."
        f"</p>{_table(heads, rows)}</section>"
    )


def _with_ratio(text: str, ratio: float) -> str:
    tone = "" if 0.98 <= ratio <= 1.02 else " good" if ratio > 1 else " bad"
    return f'<td>{escape(text)}<span class="r{tone}">{units.ratio(ratio)}</span></td>'


def chain_and_fan(r: Report, m: MethodReport, hidden: bool) -> str:
    """The layer graphs of BP and of the method, side by side."""
    bp = r.methods[0]
    return (
        f"<section {_if(m, hidden)}><h2>What waits for what</h2>"
        '<p class="lead">One row a layer: its forward on the left, its update on the right. An '
        "arrow means &ldquo;must be finished first&rdquo;; waits that follow from others are left "
        "out. The bar in a box is its time, the "
        '<span style="color:var(--crit)">coloured path</span> the critical one.</p>'
        f'<div class="pair">{_graph(bp)}{_graph(m) if m is not bp else ""}</div></section>'
    )


def _graph(m: MethodReport) -> str:
    s = m.shown
    depth = s.update_depth
    fact = (
        "updates do not wait for each other"
        if depth <= 1
        else f"the longest chain of updates is {depth}"
    )
    kind = f" ({s.kind} step)" if len(m.steps) > 1 else ""
    svg = layer_graph_svg(s.graph, f"Layer graph of {m.method}: {fact}")
    return (
        f"<figure><figcaption>{escape(m.method)}{kind} <span>· {fact}</span></figcaption>"
        f'<div class="graphbox">{svg}</div></figure>'
    )


def schedules(r: Report, methods: Sequence[MethodReport], shown: str, workers: str) -> str:
    """Gantt charts of BP and the method on the chosen number of workers, to one time scale."""
    parts = []
    phases: dict[str, None] = {}
    for i, p in enumerate(r.workers):
        key = worker_key(p)
        rows = {m.method: m.shown.schedules[i] for m in r.methods}
        scale = max((row.seconds for row in rows.values()), default=0.0)
        charts = []
        for m in r.methods:
            row = rows[m.method]
            phases |= dict.fromkeys(b.phase for b in row.bars)
            attrs = "" if m is r.methods[0] else _if(m, m.method != shown)
            more = hidden_rows(row)
            extra = f", {more} more workers not drawn" if more else ""
            title = f"{m.method} on {units.workers(p)} workers"
            charts.append(
                f"<figure {attrs}><figcaption>{escape(m.method)} <span>· "
                f"{units.seconds(row.seconds)} on {row.used} worker{'s' * (row.used != 1)} "
                f"(no schedule is under {units.seconds(row.lower_bound)}; Brent's bound "
                f"{units.seconds(row.brent_bound)}){extra}</span></figcaption>"
                f'<div class="scroll">{gantt_svg(row, scale, title)}</div></figure>'
            )
        off = " hidden" if key != workers else ""
        parts.append(f'<div data-if-workers="{key}"{off}>{"".join(charts)}</div>')
    keys = "".join(f'<li><b class="{css_class(p)}"></b>{escape(label(p))}</li>' for p in phases)
    keys += '<li><b class="line" style="background:var(--crit)"></b>critical path</li>'
    return (
        "<section><h2>Schedule</h2><p class='lead'>List scheduling by upward rank; one row a "
        f"worker ({escape(r.device.worker)}). Point at a bar for details.</p>"
        f'{"".join(parts)}<ul class="key">{keys}</ul></section>'
    )


def critical_path(r: Report, m: MethodReport, hidden: bool) -> str:
    """What the critical path consists of, by phase, and its steps."""
    bp = r.methods[0]
    longest = max(bp.shown.span_seconds, m.shown.span_seconds)
    rows = "".join(_stack(x, longest) for x in ([bp] if m is bp else [bp, m]))
    return (
        f"<section {_if(m, hidden)}><h2>Where the critical path is</h2>"
        '<p class="lead">With unlimited workers a step takes as long as this path.</p>'
        f'<div class="stack">{rows}</div>{_steps(m)}</section>'
    )


def _stack(m: MethodReport, longest: float) -> str:
    totals: dict[str, float] = {}
    for p in m.shown.critical_path:
        totals[p.phase] = totals.get(p.phase, 0.0) + p.seconds
    parts = "".join(
        f'<i class="{css_class(phase)}" style="width:{100 * t / longest if longest else 0:.2f}%" '
        f'data-tip="{escape(label(phase), quote=True)}|{units.seconds(t)} of '
        f'{units.seconds(m.shown.span_seconds)}"></i>'
        for phase, t in totals.items()
        if t > 0
    )
    return (
        f'<b>{escape(m.method)}</b><div class="track">{parts}</div>'
        f'<span class="t">{units.seconds(m.shown.span_seconds)}</span>'
    )


def _steps(m: MethodReport) -> str:
    steps = [p for p in m.shown.critical_path if p.seconds > 0]
    rows = [_path_row(p) for p in steps]
    nodes = sum(len(p.nodes) for p in steps)
    table = _table(["Layer", "Phase", "Nodes", "FLOPs", "Time"], rows, tall=True)
    return (
        f"<details><summary>{len(steps)} stretches, {nodes} nodes, in order</summary>"
        f"{table}</details>"
    )


def _path_row(p: PathStep) -> str:
    names = ", ".join(p.nodes[:12]) + (" …" if len(p.nodes) > 12 else "")
    return (
        f'<tr data-tip="{escape(p.layer + " · " + label(p.phase), quote=True)}|'
        f'{escape(names, quote=True)}"><td>{escape(elide(p.layer, 40))}</td>'
        f"<td>{escape(label(p.phase))}</td><td>{len(p.nodes)}</td>"
        f"<td>{units.flops(p.flops)}</td><td>{units.seconds(p.seconds)}</td></tr>"
    )


def layer_table(r: Report, m: MethodReport, hidden: bool) -> str:
    """One row a layer: FLOPs by phase, and the update's time beside BP's."""
    s, bp = m.shown, r.methods[0].shown
    phases = [p.phase for p in s.phases if any(x.flops.get(p.phase) for x in s.layers)]
    before = {x.layer: x for x in bp.layers}
    peak = max([x.update_seconds for x in (*s.layers, *bp.layers)], default=0.0)
    rows = []
    for x in s.layers:
        base = before.get(x.layer)
        cells = "".join(f"<td>{_flops(x.flops.get(p, 0))}</td>" for p in phases)
        mark = ' <span style="color:var(--crit)">●</span>' if x.critical else ""
        size = f"<td>{units.count(x.parameters) if x.parameters else ''}</td>"
        rows.append(
            f'<tr><td title="{escape(x.layer, quote=True)}">{escape(elide(x.layer, 36))}{mark}</td>'
            f"{size}{cells}{_meter(x.update_seconds, base.update_seconds if base else 0.0, peak)}"
            "</tr>"
        )
    heads = [
        "Layer",
        "Parameters",
        *(label(p).capitalize() for p in phases),
        "Update time (BP's below)",
    ]
    rows.append(_total_row(s, phases))
    return (
        f"<section {_if(m, hidden)}><h2>Layers</h2><p class='lead'>FLOPs by phase. "
        '<span style="color:var(--crit)">●</span> this layer\'s update is on the critical path.'
        f"</p>{_table(heads, rows, tall=len(rows) > 16)}</section>"
    )


def _total_row(s: StepReport, phases: Sequence[str]) -> str:
    total = {p.phase: p.flops for p in s.phases}
    cells = "".join(f"<td><b>{_flops(total[p])}</b></td>" for p in phases)
    params = sum(x.parameters for x in s.layers)
    return (
        f"<tr><td><b>all</b></td><td><b>{units.count(params) if params else ''}</b></td>"
        f"{cells}<td></td></tr>"
    )


def _flops(value: int) -> str:
    return units.count(value) if value else "&middot;"


def _meter(value: float, base: float, peak: float) -> str:
    def bar(v: float, css: str) -> str:
        return f'<i class="{css}" style="width:{100 * v / peak if peak else 0:.1f}%"></i>'

    tip = f"update {units.seconds(value)}|BP {units.seconds(base)}"
    return (
        f'<td class="meter" data-tip="{escape(tip, quote=True)}">{units.seconds(value)}'
        f"{bar(value, '')}{bar(base, 'base')}</td>"
    )


def phases(m: MethodReport, hidden: bool) -> str:
    """One row a phase: FLOPs, and bytes with and without fusion."""
    rows = [
        f'<tr><td><b class="dot {css_class(p.phase)}"></b>{escape(label(p.phase))}</td>'
        f"<td>{p.nodes}</td><td>{units.flops(p.flops)}</td><td>{units.size(p.bytes)}</td>"
        f"<td>{units.size(p.moved)}</td><td>{units.seconds(p.seconds)}</td></tr>"
        for p in m.shown.phases
    ]
    heads = ["Phase", "Nodes", "FLOPs", "Bytes op by op", "Bytes fused", "Time on one worker"]
    return (
        f"<section {_if(m, hidden)}><h2>Phases</h2><p class='lead'>Fused: pointwise ops are "
        "computed inside their consumers of the same layer and phase; times assume this.</p>"
        f"{_table(heads, rows)}</section>"
    )


def plan(m: MethodReport, hidden: bool) -> str:
    """Feedback points and their maps, what runs when, the proof of independence."""
    return plan_section(m, _if(m, hidden))


def _table(heads: Sequence[str], rows: Sequence[str], *, tall: bool = False) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    return (
        f'<div class="scroll{" tall" if tall else ""}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _if(m: MethodReport, hidden: bool) -> str:
    return f'data-if-method="{escape(m.method, quote=True)}"' + (" hidden" if hidden else "")


def _inverse(value: float) -> float:
    return 1 / value if value else 1.0
