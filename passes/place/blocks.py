"""Granularities "block" and "sublayer": which of the feedback points end one.

In: the segments of a sweep (see ``sweep.py``). Out: the ones to keep.
"""

from __future__ import annotations

from torch.fx import Node

from grapefx.passes.graph.order import ancestors
from grapefx.passes.graph.source import module_path
from grapefx.passes.place.sweep import Segment, Sweep


def blocks(segments: list[Segment], sweep: Sweep, taps: list[Node]) -> list[Segment]:
    """One feedback point a block: the last dominator of each repeated module, else dominators."""
    chosen = sublayers(segments, sweep, taps)
    repeated = _repeated_modules(sweep)
    if not repeated:
        return chosen
    rank = {id(s): i for i, s in enumerate(segments)}
    blocks: dict[str, Segment] = {}
    for path in repeated:
        inside = [s for s in segments if any(p.startswith(path + ".") for p in s.params)]
        ends = [s for s in chosen if any(p.startswith(path + ".") for p in s.params)]
        covered = {p for s in inside for p in s.params}
        own = {p for p in sweep.all_params() if p.startswith(path + ".")}
        if ends and ends[-1] is inside[-1] and own <= covered:
            blocks[path] = ends[-1]
    return sorted(set(blocks.values()), key=lambda s: rank[id(s)]) or chosen


def sublayers(segments: list[Segment], sweep: Sweep, taps: list[Node]) -> list[Segment]:
    """The points that every path crosses: behind each residual sum, or each layer of a chain."""
    dominators = _dominators(sweep, taps)
    return [s for s in segments if s.closed in dominators]


def _repeated_modules(sweep: Sweep) -> set[str]:
    """Paths of the outermost modules that occur several times, each with at least two weights."""
    heavy_in: dict[str, int] = {}
    kind: dict[str, tuple[str, str]] = {}
    for node in sweep.nodes:
        if node.op != "call_function" or not sweep.is_heavy(node):
            continue
        for path, cls in module_path(node):
            heavy_in[path] = heavy_in.get(path, 0) + 1
            kind[path] = (path.rpartition(".")[0], cls)
    groups: dict[tuple[str, str], list[str]] = {}
    for path, key in kind.items():
        if heavy_in[path] >= 2 and key[1] not in ("Sequential", "ModuleList"):
            groups.setdefault(key, []).append(path)
    repeated = {p for paths in groups.values() if len(paths) > 1 for p in paths}
    return {p for p in repeated if not any(p.startswith(q + ".") for q in repeated)}


def _dominators(sweep: Sweep, taps: list[Node]) -> set[Node]:
    """Values that every differentiable path from an input to a tap crosses."""
    upstream = ancestors(taps)
    path = [n for n in sweep.nodes if n in upstream and n in sweep.data and n in sweep.live]
    found: set[Node] = set()
    ends: dict[Node, int] = {}
    inside = set(path)
    for n in path:
        users = [sweep.order[u] for u in n.users if u in inside]
        ends[n] = max(users, default=sweep.order[n])
    reach = -1
    for n in path:
        if reach <= sweep.order[n]:
            found.add(n)
        reach = max(reach, ends[n])
    return found
