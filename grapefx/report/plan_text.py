"""The compiler's plan as text: feedback points, maps, what runs when, the proof of independence."""

from __future__ import annotations

import textwrap

from grapefx.report import units
from grapefx.report.model import MethodReport, PlanReport, SegmentRow


def proof(p: PlanReport) -> str:
    """What the graph shows about who waits for whom, in a sentence."""
    if p.sequential:
        return "sequential: a layer's update waits for the layer above, by the method's definition"
    if p.proved is None:
        return "not examined: no graph without a full backward was built"
    exact = f"; {_gradients(p.exact)} (the head) no feedback reaches" if p.exact else ""
    return (
        f"proved on the graph: {_gradients(p.proved)} depend on the feedback of their own layer "
        f"alone{exact}"
    )


def derived(p: PlanReport) -> str:
    """Operators whose tangent torch derives, in a sentence."""
    if not p.derived:
        return "every operator on the tangents' way has a rule of grapefx"
    return "derived by torch's forward AD: " + ", ".join(p.derived)


def error_tap(p: PlanReport) -> str:
    """Where the output error is read and how the batch size stands in the graph."""
    batch = "any batch size" if p.symbolic_batch else "this batch size only"
    return f"gradient at {p.tap or 'the output'}; the graphs hold for {batch}"


def exact_part(p: PlanReport) -> str:
    """Where the part begins whose gradients are true, in words; empty where there is none."""
    shown = [*p.exact_from[:3], *(["..."] if len(p.exact_from) > 3 else [])]
    return f"true gradients from {', '.join(shown)} on" if shown else ""


def parameters(row: SegmentRow) -> str:
    """A segment's parameters: the first one's name, how many more, how many numbers."""
    if not row.parameters:
        return "none"
    more = f" +{len(row.parameters) - 1}" if len(row.parameters) > 1 else ""
    return f"{_short(row.parameters[0], 26)}{more}"


def shape(values: tuple[int, ...]) -> str:
    """A shape with multiplication signs."""
    return "\u00d7".join(map(str, values)) if values else "-"


def plan_lines(m: MethodReport, same_as: str | None, most: int, width: int) -> list[str]:
    """The plan's part of a method's text; ``same_as`` names a method with the same rows."""
    p = m.plan
    if p is None:
        return []
    from grapefx.report.text import table

    lines = ["", "  plan"]
    if m.method == "bp":
        pass
    elif same_as:
        lines.append(f"    feedback points and maps as {same_as}'s")
    else:
        rows = list(p.rows)
        shown = rows if len(rows) <= most else rows[: most // 2] + rows[-(most - most // 2) :]
        cells = [
            [
                _short(r.layer, 24),
                _short(r.value or "true error", 14),
                shape(r.shape),
                f"{parameters(r)} ({units.count(r.parameter_count)})",
                r.map_kind or "-",
                units.size(r.map_bytes) if r.map_kind else "-",
            ]
            for r in shown
        ]
        head = ["layer", "cut behind", "a sample", "parameters", "map", "memory"]
        lines.append(table(head, cells, indent="    "))
        if len(shown) < len(rows):
            lines.append(f"    ... {len(rows) - len(shown)} layers in the middle left out")
    facts = [*p.runs, ("error", error_tap(p))]
    if m.method != "bp":
        facts += [("exact", exact)] if (exact := exact_part(p)) else []
        facts += [("updates", proof(p))]
        if any(kind == "align" for kind, _ in p.runs):
            facts += [("tangents", derived(p))]
    pad = max(len(k) for k, _ in facts)
    for key, text in facts:
        lines.append(
            textwrap.fill(
                text,
                width,
                initial_indent=f"    {key.ljust(pad)}  ",
                subsequent_indent=" " * (pad + 6),
            )
        )
    return lines


def _gradients(n: int) -> str:
    return "1 parameter gradient" if n == 1 else f"{n} parameter gradients"


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else "\u2026" + name[1 - most :]
