"""Lays the layer graph out as a picture: forward passes down the left, updates on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grapefx.analysis.dag import NO_LAYER
from grapefx.report.records import LayerGraph, LayerNode
from grapefx.report.render import units

WIDTH = 396
LEFT, FORWARD_WIDTH = 28, 192
RIGHT, UPDATE_WIDTH = 248, 112
BUS = 384


@dataclass(frozen=True)
class Frame:
    """A rectangle, and the points that arrows start and end at."""

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


@dataclass(frozen=True)
class Edge:
    """An arrow as the ``d`` of an SVG path."""

    path: str
    critical: bool


@dataclass(frozen=True)
class LayerBox:
    """A drawn box: its frame, the bar of ``fill`` units in it, and its two texts."""

    frame: Frame
    fill: float
    css: str
    tip: str
    name: str
    time: str


@dataclass(frozen=True)
class LayerPicture:
    """The picture in SVG units; edges lie behind boxes, critical edges above the others."""

    width: int
    height: int
    left: int
    right: int
    small: bool
    edges: tuple[Edge, ...]
    boxes: tuple[LayerBox, ...]


def layer_picture(graph: LayerGraph) -> LayerPicture:
    """The picture of a graph; rows are layers in topological order, arrows what waits for what.

    What only collects the layers' results (a layer-less update) is left out.
    """
    graph = _without_collectors(graph)
    rows = _rows(graph)
    count = max(rows.values(), default=0) + 1
    pitch, height = (36, 26) if count <= 18 else (27, 21) if count <= 48 else (20, 17)
    frames = [_box(n, rows[i], pitch, height) for i, n in enumerate(graph.nodes)]
    longest = max((n.seconds for n in graph.nodes), default=0.0)
    return LayerPicture(
        WIDTH,
        count * pitch + 34,
        LEFT,
        RIGHT,
        height < 20,
        tuple(_edges(graph, frames, pitch)),
        tuple(_drawn(n, b, longest) for n, b in zip(graph.nodes, frames, strict=True)),
    )


def _without_collectors(graph: LayerGraph) -> LayerGraph:
    kept = [i for i, n in enumerate(graph.nodes) if (n.layer, n.stage) != (NO_LAYER, "update")]
    place = {old: new for new, old in enumerate(kept)}

    def edges(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return tuple((place[a], place[b]) for a, b in pairs if a in place and b in place)

    nodes = tuple(graph.nodes[i] for i in kept)
    return LayerGraph(nodes, edges(graph.edges), edges(graph.critical_edges))


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


def _box(n: LayerNode, row: int, pitch: int, height: int) -> Frame:
    y = 26 + row * pitch
    if n.stage == "update":
        return Frame(RIGHT, y, UPDATE_WIDTH, height)
    return Frame(LEFT, y, FORWARD_WIDTH, height)


def _drawn(n: LayerNode, frame: Frame, longest: float) -> LayerBox:
    tip = f"{n.layer} · {n.stage}|{units.flops(n.flops)}, {units.seconds(n.seconds)}" + (
        "|on the critical path" if n.critical else ""
    )
    bar = max(2.0, (frame.width - 2) * n.seconds / longest) if longest and n.seconds > 0 else 0
    return LayerBox(
        frame,
        bar,
        f"box s-{n.stage}" + (" crit" if n.critical else ""),
        tip,
        "update" if n.stage == "update" else units.elide(_name(n), 19),
        units.seconds(n.seconds),
    )


def _name(n: LayerNode) -> str:
    if n.stage == "error":
        return "output error"
    return n.layer if n.stage == "forward" else f"{n.layer} {n.stage}"


def _edges(graph: LayerGraph, frames: list[Frame], pitch: int) -> Iterator[Edge]:
    critical = set(graph.critical_edges)
    # critical ones last, on top
    for a, b in [*(e for e in graph.edges if e not in critical), *graph.critical_edges]:
        path = _path(graph.nodes[a], graph.nodes[b], frames[a], frames[b], pitch)
        yield Edge(path, (a, b) in critical)


def _path(a: LayerNode, b: LayerNode, p: Frame, q: Frame, pitch: int) -> str:
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


def _column(p: Frame, q: Frame, pitch: int) -> str:
    """Between rows of one column: straight to the next row, else an arc around the others."""
    if abs(q.y - p.y) <= pitch:
        start, end = (p.bottom, q.y) if q.y > p.y else (p.y, q.bottom)
        return f"M{p.mid_x} {start}V{end}"
    out = min(30.0, 10 + abs(q.y - p.y) / 12)
    if p.x == LEFT:
        return f"M{p.x} {p.mid_y}C{p.x - out} {p.mid_y} {q.x - out} {q.mid_y} {q.x} {q.mid_y}"
    out = min(out, 24.0)
    return f"M{p.x} {p.mid_y}C{p.x - out} {p.mid_y} {q.x - out} {q.mid_y} {q.x} {q.mid_y}"
