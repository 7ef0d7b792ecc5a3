"""Draws a step's graph by graphviz: its source always, a picture where ``dot`` is installed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import graphviz

from grapefx.analysis.dag import NO_LAYER, Dag, Task
from grapefx.errors import GrapefxError
from grapefx.report.render import units
from grapefx.report.render.colours import CRITICAL, colour

# Above this many nodes a node-level drawing cannot be read: layers and phases are drawn instead.
MAX_NODES = 300
FORMATS = ("dot", "svg", "png")
INSTALL = (
    "install it (Debian/Ubuntu: apt install graphviz; macOS: brew install graphviz; "
    "conda: conda install graphviz)"
)


class DotMissingError(GrapefxError):
    """The ``dot`` program is not installed; the source was written all the same."""


def dot_source(dag: Dag, title: str, *, collapse: bool | None = None) -> graphviz.Digraph:
    """The graph: a cluster a layer, a colour a phase, the critical path bold.

    ``collapse`` draws one box a layer and phase; by default beyond 300 nodes.
    """
    path = [dag.tasks[i].name for i in dag.critical_path("seconds").tasks]
    if len(dag.tasks) > MAX_NODES if collapse is None else collapse:
        dag = dag.by_layer()
        owner = {node: t.name for t in dag.tasks for node in t.nodes}
        path = [owner[name] for name in path]
    critical = set(path)
    steps = set(pairwise(path))
    graph = graphviz.Digraph(
        graph_attr={
            "label": title,
            "labelloc": "t",
            "fontname": "Helvetica",
            "rankdir": "TB",
            "nodesep": "0.15",
            "ranksep": "0.3",
        },
        node_attr={
            "shape": "box",
            "style": "filled,rounded",
            "fontname": "Helvetica",
            "fontsize": "10",
            "fontcolor": "white",
            "height": "0.3",
            "margin": "0.08,0.04",
            "penwidth": "0",
        },
        edge_attr={"color": "#7a8694", "arrowsize": "0.6"},
    )
    layers: dict[str, list[Task]] = {}
    for t in dag.tasks:
        layers.setdefault(t.layer, []).append(t)
    for n, (layer, tasks) in enumerate(layers.items()):
        if layer == NO_LAYER:
            _nodes(graph, tasks, critical)
            continue
        with graph.subgraph(name=f"cluster_{n}") as cluster:
            cluster.attr(label=layer, color="#c5ced8", style="rounded", fontsize="11")
            _nodes(cluster, tasks, critical)
    for i, preds in enumerate(dag.preds):
        for p in preds:
            ends = (dag.tasks[p].name, dag.tasks[i].name)
            bold = {"color": CRITICAL[0], "penwidth": "2.5"} if ends in steps else {}
            graph.edge(_id(ends[0]), _id(ends[1]), **bold)
    return graph


def write_graph(graph: graphviz.Digraph, path: str | Path, form: str) -> Path:
    """Write the graph as "dot", "svg" or "png"; returns the file.

    Raises:
        DotMissingError: svg and png need the ``dot`` program. The source is then beside ``path``
            with the ending ``.dot``.
    """
    path = Path(path)
    if form == "dot":
        path.write_text(graph.source, encoding="utf-8")
        return path
    try:
        path.write_bytes(graph.pipe(format=form, quiet=True))
    except graphviz.ExecutableNotFound:
        source = path.with_suffix(".dot")
        source.write_text(graph.source, encoding="utf-8")
        raise DotMissingError(
            f"the `dot` program of graphviz is not installed, so the source went to {source}\n"
            f"  {INSTALL}, then: dot -T{form} {source} -o {path}"
        ) from None
    return path


def drawn(graph: graphviz.Digraph, form: str) -> str:
    """The graph as text: its source, or an SVG.

    Raises:
        DotMissingError: svg needs the ``dot`` program.
    """
    if form == "dot":
        return str(graph.source)
    try:
        return str(graph.pipe(format=form, encoding="utf-8", quiet=True))
    except graphviz.ExecutableNotFound:
        raise DotMissingError(
            f"the `dot` program of graphviz is not installed\n  {INSTALL}\n"
            "  or: --format dot, or -o FILE.svg, which leaves FILE.dot"
        ) from None


def _nodes(graph: graphviz.Digraph, tasks: list[Task], critical: set[str]) -> None:
    for t in tasks:
        name = t.name if len(t.nodes) == 1 else t.phase.replace("_", " ")
        cost = f"{units.flops(t.flops)}, {units.seconds(t.seconds)}" if t.seconds else ""
        bold = {"penwidth": "3", "color": CRITICAL[0]} if t.name in critical else {}
        graph.node(
            _id(t.name),
            f"{graphviz.escape(name)}\\n{cost}" if cost else graphviz.escape(name),
            fillcolor=colour(t.phase),
            tooltip=graphviz.escape(t.op),
            **bold,
        )


def _id(name: str) -> str:
    # a colon would name a port
    return name.replace(":", "_")
