"""Renders a report as plain text for a terminal, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TypeVar

from grapefx.report.records import MethodReport, ReportData, SegmentRow, StepReport
from grapefx.report.render import units
from grapefx.report.render.sentences import PAPER, epochs, notes, plan_facts

T = TypeVar("T")

WIDTH = 100
MAX_LAYERS = 24
MAX_PATH = 16


def render_text(report: ReportData) -> str:
    """The whole report, at most 100 columns wide."""
    parts = [_head(report), _summary(report), _times(report)]
    points: dict[object, str] = {}
    for m in report.methods:
        same = None
        if m.plan and m.feedback:
            first = points.setdefault(m.plan.rows, m.method)
            same = first if first != m.method else None
        parts.append("\n".join([_method(m), *_plan(m, same)]))
    if report.chosen:
        parts.append("Chosen\n" + _wrap(report.chosen))
    if report.passes:
        parts.append(_passes(report))
    if report.warnings:
        parts.append("Warnings\n" + "\n".join(_wrap("! " + w) for w in report.warnings))
    parts.append(_notes(report))
    return "\n\n".join(p for p in parts if p) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = (c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))
        return (indent + "  ".join([first, *rest])).rstrip()

    rule = indent + "  ".join("-" * w for w in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def _head(r: ReportData) -> str:
    batch = f", batch {r.batch}" if r.batch is not None else ""
    parameters = f", {units.count(r.parameters)} parameters" if r.parameters else ""
    d = r.device
    device = f"device model {d.name}: {d.description or 'custom'}; one worker is {d.worker}"
    return f"{r.model}{batch}{parameters}\n{_wrap(device)}"


def _summary(r: ReportData) -> str:
    rows = [
        [
            m.method,
            units.flops(m.work_flops),
            units.flops(m.span_flops),
            units.flops(m.layer_span_flops),
            units.ratio(m.work_ratio),
            units.ratio(m.span_ratio),
            units.ratio(m.layer_span_ratio),
            units.ratio(m.arithmetic_ratio),
            str(m.shown.update_depth),
        ]
        for m in r.methods
    ]
    header = [
        "method",
        "work",
        "span",
        "by layer",
        "work",
        "span",
        "by layer",
        "arithmetic",
        "chain",
    ]
    text = table(header, rows)
    top = "".ljust(text.index("by layer") + len("by layer")) + "  | BP's value over the method's"
    return f"Work and span of one step\n{top}\n{text}"


def _times(r: ReportData) -> str:
    header = ["method", *(f"P = {units.workers(p)}" for p in r.workers)]
    rows = [
        [
            m.method,
            *(f"{units.seconds(s)} ({units.ratio(m.time_ratio[k])})" for k, s in m.seconds.items()),
        ]
        for m in r.methods
    ]
    return "Predicted step time on P workers (and BP's time over it)\n" + table(header, rows)


def _passes(r: ReportData) -> str:
    rows = [
        [f"{p.step} {p.name}", str(p.nodes_before), str(p.nodes_after), units.seconds(p.seconds)]
        for p in r.passes
    ]
    return "Compiler passes\n" + table(["pass", "nodes before", "after", "time"], rows)


def _method(m: MethodReport) -> str:
    lines = [f"{m.method}"]
    if len(m.steps) > 1:
        kinds = ", ".join(f"{units.percent(s.share)} {s.kind}" for s in m.steps)
        lines.append(f"  steps: {kinds}; below: {m.shown.kind}")
    if m.calibration:
        c = m.calibration
        if c.overhead is None:
            lines.append(
                f"  calibration: one BP step ({units.flops(c.backward_flops)}) every "
                f"{epochs(c.every)}; give the steps an epoch for its share ({PAPER} eq. 21)"
            )
        else:
            lines.append(
                f"  calibration: one BP step every {epochs(c.every)} of "
                f"{c.steps_per_epoch} steps adds {units.percent(c.overhead)} "
                f"({PAPER} eq. 21)"
            )
    if m.feedback:
        lines.append(f"  feedback maps: {units.size(m.feedback_bytes)} in {len(m.feedback)} layers")
    return "\n".join([*lines, _phases(m.shown), _layers(m.shown), _path(m.shown)])


def _phases(s: StepReport) -> str:
    rows = [
        [
            p.phase,
            str(p.nodes),
            units.flops(p.flops),
            units.size(p.bytes),
            units.size(p.moved),
            units.seconds(p.seconds),
        ]
        for p in s.phases
    ]
    return table(["phase", "nodes", "FLOPs", "bytes op by op", "bytes fused", "time"], rows)


def _layers(s: StepReport) -> str:
    phases = [p.phase for p in s.phases if any(r.flops.get(p.phase) for r in s.layers)]
    short = {
        "weight_grad": "w-grad",
        "input_grad": "x-grad",
        "alignment": "align",
        "projection": "project",
    }
    rows = [
        [
            units.elide(r.layer, 28),
            *(units.flops(r.flops.get(p, 0)).replace("FLOP", "") for p in phases),
            units.seconds(r.update_seconds),
            "*" if r.critical else "",
        ]
        for r in _ends(list(s.layers), MAX_LAYERS)
        if r is not None
    ]
    hidden = len(s.layers) - len(rows)
    text = table(["layer", *(short.get(p, p) for p in phases), "update", "path"], rows)
    return "\n" + text + (f"\n  ... {hidden} layers in the middle left out" if hidden > 0 else "")


def _path(s: StepReport) -> str:
    steps = [p for p in s.critical_path if p.seconds > 0]
    shown = _ends(steps, MAX_PATH)
    lines = [
        f"\n  critical path: {units.seconds(s.span_seconds)}, "
        f"{_nodes(sum(len(p.nodes) for p in steps))}, "
        f"average parallelism {s.parallelism:.2f}"
    ]
    for p in shown:
        lines.append(
            f"    {p.layer:<28.28} {p.phase:<12} {_nodes(len(p.nodes)):>10}  "
            f"{units.seconds(p.seconds):>8}"
        )
    if len(shown) < len(steps):
        lines.insert(1 + MAX_PATH // 2, f"    ... {len(steps) - len(shown)} more")
    return "\n".join(lines)


def _plan(m: MethodReport, same_as: str | None) -> list[str]:
    """The plan's lines; ``same_as`` names a method with the same feedback points and maps."""
    if m.plan is None:
        return []
    lines = ["", "  plan"]
    if same_as:
        lines.append(f"    feedback points and maps as {same_as}'s")
    elif m.method != "bp":
        lines += _feedback_points(m.plan.rows)
    facts = plan_facts(m, tap="error")
    pad = max(len(subject) for subject, _ in facts)
    for subject, text in facts:
        first = f"    {subject.ljust(pad)}  "
        rest = " " * (pad + 6)
        lines.append(textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=rest))
    return lines


def _feedback_points(rows: Sequence[SegmentRow]) -> list[str]:
    shown = _ends(list(rows), MAX_LAYERS)
    cells = [
        [
            units.elide(r.layer, 24),
            units.elide(r.value or "true error", 14),
            units.shape(r.shape),
            f"{_parameters(r)} ({units.count(r.parameter_count)})",
            r.map_kind or "-",
            units.size(r.map_bytes) if r.map_kind else "-",
        ]
        for r in shown
    ]
    head = ["layer", "cut behind", "a sample", "parameters", "map", "memory"]
    lines = [table(head, cells, indent="    ")]
    if len(shown) < len(rows):
        lines.append(f"    ... {len(rows) - len(shown)} layers in the middle left out")
    return lines


def _parameters(row: SegmentRow) -> str:
    """A segment's parameters: the first one's name, and how many more."""
    if not row.parameters:
        return "none"
    more = f" +{len(row.parameters) - 1}" if len(row.parameters) > 1 else ""
    return f"{units.elide(row.parameters[0], 26)}{more}"


def _nodes(n: int) -> str:
    return "1 node" if n == 1 else f"{n} nodes"


def _ends(rows: list[T], most: int) -> list[T]:
    """The first and the last of many rows."""
    return rows if len(rows) <= most else rows[: most // 2] + rows[-(most - most // 2) :]


def _notes(r: ReportData) -> str:
    return "\n".join(_wrap(n) for n in notes(r))


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ")
