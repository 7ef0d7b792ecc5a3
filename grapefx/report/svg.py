"""The layer graph as inline SVG: forward passes down the left, updates on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from grapefx.analysis.dag import NO_LAYER
from grapefx.report import units
from grapefx.report.model import LayerGraph, LayerNode

WIDTH = 396
LEFT, FORWARD_WIDTH = 28, 192
RIGHT, UPDATE_WIDTH = 248, 112
BUS = 384


def _marker(name: str, css: str, size: int) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7.4" refY="4" markerWidth="{size}" '
        f'markerHeight="{size}" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 .6 7.4 4 0 7.4z" class="{css}"/></marker>'
    )


# arrow heads for the page: SVGs refer to them by id
MARKERS = (
    '<svg class="defs" width="0" height="0" aria-hidden="true"><defs>'
    f"{_marker('arrow', 'head', 7)}{_marker('arrow-crit', 'head crit', 9)}</defs></svg>"
)


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float

    @property
    def mid_x(self) -> float:
        return self.x + self.width / 2

    @property
    def mid_y(self) -> float:
        return self.y + self.height / 2

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height


def layer_graph_svg(graph: LayerGraph, title: str) -> str:
    """An SVG of the graph; rows are layers in topological order, arrows what waits for what.

    What only collects the layers' results (a layer-less update) is left out.
    """
    graph = _without_collectors(graph)
    rows = _rows(graph)
    count = max(rows.values(), default=0) + 1
    pitch, height = (36, 26) if count <= 18 else (27, 21) if count <= 48 else (20, 17)
    boxes = [_box(n, rows[i], pitch, height) for i, n in enumerate(graph.nodes)]
    peak = max((n.seconds for n in graph.nodes), default=0.0)
    body = [*_edges(graph, boxes, pitch)]
    body += [_draw(n, b, peak) for n, b in zip(graph.nodes, boxes, strict=True)]
    total = count * pitch + 34
    small = " small" if height < 20 else ""
    return (
        f'<svg class="layers{small}" viewBox="0 0 {WIDTH} {total}" role="img" '
        f'aria-label="{escape(title, quote=True)}">'
        f'<text class="col" x="{LEFT}" y="16">forward ↓</text>'
        f'<text class="col" x="{RIGHT}" y="16">update</text>' + "".join(body) + "</svg>"
    )


def _without_collectors(graph: LayerGraph) -> LayerGraph:
    kept = [i for i, n in enumerate(graph.nodes) if (n.layer, n.stage) != (NO_LAYER, "update")]
    place = {old: new for new, old in enumerate(kept)}

    def edges(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return tuple((place[a], place[b]) for a, b in pairs if a in place and b in place)

    nodes = tuple(graph.nodes[i] for i in kept)
    return LayerGraph(nodes, edges(graph.edges), edges(graph.critical_edges))


def elide(name: str, most: int) -> str:
    """The end of a long name: that is where layers differ."""
    return name if len(name) <= most else "…" + name[1 - most :]


def _rows(graph: LayerGraph) -> dict[int, int]:
    """Row of each node: a layer's forward and update share one; parts of a split one do not."""
    place: dict[tuple[str, str, int], int] = {}
    rows: dict[int, int] = {}
    seen: dict[tuple[str, str], int] = {}
    following = 0
    for i, n in enumerate(graph.nodes):
        nth = seen[n.layer, n.stage] = seen.get((n.layer, n.stage), -1) + 1
        pair = "layer" if n.stage in ("forward", "update") else n.stage
        key = (n.layer, pair, nth)
        if key not in place:
            place[key] = following
            following += 1
        rows[i] = place[key]
    return rows


def _box(n: LayerNode, row: int, pitch: int, height: int) -> _Box:
    y = 26 + row * pitch
    if n.stage == "update":
        return _Box(RIGHT, y, UPDATE_WIDTH, height)
    return _Box(LEFT, y, FORWARD_WIDTH, height)


def _draw(n: LayerNode, b: _Box, peak: float) -> str:
    name = n.layer if n.stage == "forward" else f"{n.layer} {n.stage}"
    if n.stage == "error":
        name = "output error"
    fill = max(2.0, (b.width - 2) * n.seconds / peak) if peak and n.seconds > 0 else 0
    css = f"box s-{n.stage}" + (" crit" if n.critical else "")
    tip = f"{n.layer} · {n.stage}|{units.flops(n.flops)}, {units.seconds(n.seconds)}" + (
        "|on the critical path" if n.critical else ""
    )
    left = "update" if n.stage == "update" else elide(name, 19)
    return (
        f'<g class="{css}" data-tip="{escape(tip, quote=True)}">'
        f'<rect class="frame" x="{b.x}" y="{b.y}" width="{b.width}" height="{b.height}" rx="5"/>'
        f'<rect class="fill" x="{b.x + 1}" y="{b.bottom - 4}" width="{fill:.1f}" height="3" '
        'rx="1.5"/>'
        f'<text x="{b.x + 8}" y="{b.mid_y + 3:.1f}">{escape(left)}</text>'
        f'<text class="num" x="{b.right - 8}" y="{b.mid_y + 3:.1f}">{units.seconds(n.seconds)}'
        "</text></g>"
    )


def _edges(graph: LayerGraph, boxes: list[_Box], pitch: int) -> Iterator[str]:
    critical = set(graph.critical_edges)
    # critical ones last, on top
    every = [*(e for e in graph.edges if e not in critical), *graph.critical_edges]
    for a, b in every:
        d = _path(graph.nodes[a], graph.nodes[b], boxes[a], boxes[b], pitch)
        crit = (a, b) in critical
        head = "arrow-crit" if crit else "arrow"
        css = "edge crit" if crit else "edge"
        yield f'<path class="{css}" d="{d}" marker-end="url(#{head})"/>'


def _path(a: LayerNode, b: LayerNode, p: _Box, q: _Box, pitch: int) -> str:
    if p.x == q.x:
        return _column(p, q, pitch)
    if b.stage != "update":
        return f"M{p.x} {p.mid_y}L{q.right} {q.mid_y}"
    if a.stage == "error":
        # all that wait for the error alone hang on one bus
        turn = 8 if q.mid_y < p.mid_y else -8
        return (
            f"M{p.right} {p.mid_y}H{BUS - 8}q8 0 8 {-turn}V{q.mid_y + turn}"
            f"q0 {-turn} -8 {-turn}H{q.right}"
        )
    middle = (p.right + q.x) / 2
    return f"M{p.right} {p.mid_y}C{middle} {p.mid_y} {middle} {q.mid_y} {q.x} {q.mid_y}"


def _column(p: _Box, q: _Box, pitch: int) -> str:
    """Between rows of one column: straight to the next row, else an arc around the others."""
    if abs(q.y - p.y) <= pitch:
        start, end = (p.bottom, q.y) if q.y > p.y else (p.y, q.bottom)
        return f"M{p.mid_x} {start}V{end}"
    out = min(30.0, 10 + abs(q.y - p.y) / 12)
    if p.x == LEFT:
        return f"M{p.x} {p.mid_y}C{p.x - out} {p.mid_y} {q.x - out} {q.mid_y} {q.x} {q.mid_y}"
    out = min(out, 24.0)
    return f"M{p.x} {p.mid_y}C{p.x - out} {p.mid_y} {q.x - out} {q.mid_y} {q.x} {q.mid_y}"
