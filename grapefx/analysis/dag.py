"""The dependency DAG of a step: what waits for what, and the longest path through it.

A task is one node of the ATen graph; an edge is a tensor that the one computes and the other
reads. Edges come from the graph alone, never from what a method declares. Nodes that compute
sizes are no tasks, and an op that reads only its argument's shape (``zeros_like``) does not wait
for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
from torch.fx import Graph, GraphModule, Node

from grapefx.analysis.cost import GraphCost, OpCost, graph_cost
from grapefx.analysis.device import DeviceModel, load_device
from grapefx.analysis.fusion import fused
from grapefx.analysis.op_tables import FACTORIES, RANDOM
from grapefx.passes.graph import meta
from grapefx.passes.graph.operators import qualified_name

OTHER = "other"
NO_LAYER = "-"

# bernoulli(p), normal(mean) and the like read their argument's values; these do not
_SHAPE_RANDOM = frozenset(n for n in RANDOM if n.startswith("rand"))

# Which part of a layer's work a phase belongs to: the boxes of the layer graph.
STAGES = {
    "forward": "forward",
    "buffer": "forward",
    "tangent": "forward",
    "error": "error",
    "alignment": "update",
    "exact_rows": "exact rows",
    "late_rows": "late rows",
    "mean_field": "mean field",
    "projection": "update",
    "refit": "update",
    "weight_grad": "update",
    "input_grad": "update",
    "update": "update",  # a group that is a whole stage already
    "optimizer": "optimizer",
    "metric": "update",
}

# what may be for the next step alone: phases, and their stages
_NEXT = {name for phase in ("exact_rows", "late_rows") for name in (phase, STAGES[phase])}


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work: a node, or a group of nodes.

    ``flops``, ``matmul_flops`` and ``bytes`` count each op alone; ``moved`` are the bytes and
    ``seconds`` the roofline time on one worker after pointwise fusion. ``nodes`` are the graph's
    node names. ``weight_flops`` is what an input-gradient op spends on parameter gradients, see
    ``OpCost``.
    """

    name: str
    op: str
    phase: str
    layer: str
    flops: int
    matmul_flops: int
    bytes: int
    seconds: float
    known: bool
    nodes: tuple[str, ...]
    weight_flops: int = 0
    moved: int = 0

    def flops_by_phase(self) -> dict[str, int]:
        """FLOPs of this task by phase: an op that makes both gradients counts in both."""
        if self.weight_flops and self.phase == "input_grad":
            own = self.flops - self.weight_flops
            return {"input_grad": own, "weight_grad": self.weight_flops}
        return {self.phase: self.flops}

    @property
    def stage(self) -> str:
        """The part of the layer's work that the phase belongs to."""
        return STAGES.get(self.phase, OTHER)


# The user's loss, where it is not in the graph: it costs nothing here, but the error waits for it.
LOSS = Task("(loss)", "loss", "error", NO_LAYER, 0, 0, 0, 0.0, True, ("(loss)",))


@dataclass(frozen=True)
class Loss:
    """Where the user's loss stands: outputs that it reads, graph inputs that hold its gradient."""

    outputs: tuple[Node, ...]
    errors: tuple[Node, ...]


@dataclass(frozen=True)
class Path:
    """A dependency path: its total weight and its tasks' indices, first to last."""

    length: float
    tasks: tuple[int, ...]


@dataclass(frozen=True)
class Dag:
    """Tasks in topological order; ``preds[i]`` are the indices that task i waits for, all < i."""

    tasks: tuple[Task, ...]
    preds: tuple[tuple[int, ...], ...]

    @cached_property
    def succs(self) -> tuple[tuple[int, ...], ...]:
        """The tasks that wait for each task."""
        out: list[list[int]] = [[] for _ in self.tasks]
        for i, preds in enumerate(self.preds):
            for p in preds:
                out[p].append(i)
        return tuple(map(tuple, out))

    @cached_property
    def awaited(self) -> tuple[bool, ...]:
        """Whether this step waits for a task: all but exact rows that only the next one reads."""
        out = [t.phase not in _NEXT for t in self.tasks]
        for i in reversed(range(len(out))):
            out[i] = out[i] or any(out[s] for s in self.succs[i])
        return tuple(out)

    def weights(self, what: str) -> list[float]:
        """One field of every task: "flops", "matmul_flops", "bytes", "moved" or "seconds"."""
        return [getattr(t, what) for t in self.tasks]

    def work(self, what: str = "flops") -> float:
        """The total of one field over all tasks."""
        return sum(self.weights(what))

    def critical_path(self, what: str = "flops") -> Path:
        """The longest path by one field: the span, which no number of workers can beat.

        What is made for the next step alone (late exact rows) is no part of it.
        """
        own = zip(self.weights(what), self.awaited, strict=True)
        return longest_path([w if awaited else 0 for w, awaited in own], self.preds)

    def span(self, what: str = "flops") -> float:
        """The length of the longest path."""
        return self.critical_path(what).length

    def parallelism(self, what: str = "flops") -> float:
        """Average parallelism: work / span (1 for an empty graph)."""
        span = self.span(what)
        return self.work(what) / span if span else 1.0

    def group(self, key: Callable[[Task], tuple[str, str]]) -> Dag:
        """The DAG of groups of tasks with equal ``key`` = (layer, phase or stage).

        Where groups wait for each other in a circle (a layer that is left and entered again), they
        are split by depth, so the result is acyclic; the parts are called ``layer/phase#2`` ...
        """
        member, order = group_members([key(t) for t in self.tasks], self.preds)
        return _merge(self, member, order)

    def by_layer(self) -> Dag:
        """Groups of (layer, phase)."""
        return self.group(lambda t: (t.layer, t.phase))

    def by_stage(self) -> Dag:
        """Groups of (layer, stage): a layer's forward is one task, its whole update another."""
        return self.group(lambda t: (t.layer, t.stage))

    def to_networkx(self) -> nx.DiGraph[str]:
        """A DiGraph keyed by task name, with every field of :class:`Task` as node attributes."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        for t in self.tasks:
            graph.add_node(
                t.name,
                op=t.op,
                phase=t.phase,
                stage=t.stage,
                layer=t.layer,
                flops=t.flops,
                matmul_flops=t.matmul_flops,
                bytes=t.bytes,
                moved=t.moved,
                seconds=t.seconds,
                known=t.known,
                nodes=t.nodes,
            )
        names = [t.name for t in self.tasks]
        for i, preds in enumerate(self.preds):
            for p in preds:
                graph.add_edge(names[p], names[i])
        return graph


def build_dag(
    graph: GraphModule | Graph | GraphCost,
    *,
    device: DeviceModel | str = "cpu-2core",
    batch: int | None = None,
    loss: Loss | None = None,
) -> Dag:
    """The DAG of a step graph, one task a node.

    Reads the phase and the layer of every node (``passes/graph/meta.py``); a node without a phase
    is "other", one without a layer "-". ``loss`` adds the wait that a graph with the error as an
    input cannot hold: the error is there only when the outputs are.
    """
    costs = graph if isinstance(graph, GraphCost) else graph_cost(graph, batch=batch)
    model = load_device(device) if isinstance(device, str) else device
    index: dict[Node, int] = {}
    through: dict[Node, tuple[int, ...]] = {}
    preds: list[tuple[int, ...]] = []
    order: list[Node | None] = []
    for node in _order(costs.graph, loss):
        if node is None and loss:
            waits = tuple(dict.fromkeys(index[n] for n in loss.outputs if n in index))
            through |= dict.fromkeys(loss.errors, (len(order),))
        elif node is not None:
            waits = _waits(node, index, through)
            if node not in costs.nodes:
                # a size computed from data (item()) still makes its reader wait
                through.setdefault(node, waits)
                continue
            index[node] = len(order)
        order.append(node)
        preds.append(waits)
    nodes = [n for n in order if n is not None]
    times = dict(zip(nodes, _times(nodes, costs, model), strict=True))
    tasks = (_task(n, costs.nodes[n], *times[n]) if n is not None else LOSS for n in order)
    return Dag(tuple(tasks), tuple(preds))


def _times(nodes: Sequence[Node], costs: GraphCost, device: DeviceModel) -> list[tuple[float, int]]:
    return fused(nodes, costs.nodes, costs.sizes, device, _group_key)


def _order(graph: Graph, loss: Loss | None) -> list[Node | None]:
    """The graph's nodes, with None where the loss is: before everything that needs its gradient."""
    if loss is None:
        return list(graph.nodes)
    behind = set(loss.errors)
    before: list[Node | None] = []
    after: list[Node | None] = []
    for node in graph.nodes:
        if node in behind or any(p in behind for p in node.all_input_nodes):
            behind.add(node)
            after.append(node)
        else:
            before.append(node)
    return [*before, None, *after]


def _waits(
    node: Node, index: dict[Node, int], through: dict[Node, tuple[int, ...]]
) -> tuple[int, ...]:
    if node.op != "call_function" or _reads_shape_only(node.target):
        return ()
    found: dict[int, None] = {}
    for p in node.all_input_nodes:
        if p in index:
            found.setdefault(index[p])
        else:
            for i in through.get(p, ()):
                found.setdefault(i)
    return tuple(found)


def _reads_shape_only(target: Any) -> bool:
    name = qualified_name(target).rpartition("::")[2]
    return name in FACTORIES or name in _SHAPE_RANDOM or name.startswith("sym_")


def _group_key(node: Node) -> tuple[str, str]:
    return (_layer(node), _phase(node))


def _phase(node: Node) -> str:
    return str(meta.phase(node) or OTHER)


def _layer(node: Node) -> str:
    return str(meta.layer(node) or NO_LAYER)


def _task(node: Node, cost: OpCost, seconds: float, moved: int) -> Task:
    return Task(
        node.name,
        cost.op,
        _phase(node),
        _layer(node),
        cost.flops,
        cost.matmul_flops,
        cost.bytes,
        seconds,
        cost.known,
        (node.name,),
        cost.weight_flops,
        moved,
    )


def longest_path(weights: Sequence[float], preds: Sequence[Sequence[int]]) -> Path:
    """The heaviest path of a DAG in topological order, by dynamic programming."""
    best: list[float] = [0] * len(weights)
    came: list[int] = [-1] * len(weights)
    end = -1
    for i, w in enumerate(weights):
        top: float = 0
        for p in preds[i]:
            if came[i] < 0 or best[p] > top:
                top, came[i] = best[p], p
        best[i] = top + w
        if end < 0 or best[i] > best[end]:
            end = i
    path = []
    i = end
    while i >= 0:
        path.append(i)
        i = came[i]
    return Path(best[end] if end >= 0 else 0, tuple(reversed(path)))


def group_members(
    keys: Sequence[tuple[str, str]], preds: Sequence[Sequence[int]]
) -> tuple[list[Hashable], list[Hashable]]:
    """Each task's group, and the groups in topological order.

    A group is its key; in a circle of groups, (key, depth): see :meth:`Dag.group`.
    """
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_nodes_from(keys)
    for i, ps in enumerate(preds):
        graph.add_edges_from((keys[p], keys[i]) for p in ps if keys[p] != keys[i])
    circle = {
        k: n
        for n, part in enumerate(nx.strongly_connected_components(graph))
        for k in part
        if len(part) > 1
    }
    member: list[Hashable] = []
    depth: list[int] = []
    for i, k in enumerate(keys):
        # inside one circle every edge between different groups goes one level down
        depth.append(
            max(
                (
                    depth[p] + (keys[p] != k)
                    for p in preds[i]
                    if k in circle and circle.get(keys[p]) == circle[k]
                ),
                default=0,
            )
        )
        member.append((k, depth[i]) if k in circle else k)
    if circle:
        graph = nx.DiGraph()
        graph.add_nodes_from(member)
        for i, ps in enumerate(preds):
            graph.add_edges_from((member[p], member[i]) for p in ps if member[p] != member[i])
    first = {m: i for i, m in reversed(list(enumerate(member)))}
    return member, list(nx.lexicographical_topological_sort(graph, key=lambda m: first[m]))


def _merge(dag: Dag, member: Sequence[Hashable], order: Sequence[Hashable]) -> Dag:
    place = {m: i for i, m in enumerate(order)}
    inside: list[list[int]] = [[] for _ in order]
    waits: list[set[int]] = [set() for _ in order]
    for i, m in enumerate(member):
        g = place[m]
        inside[g].append(i)
        waits[g].update(place[member[p]] for p in dag.preds[i])
        waits[g].discard(g)
    tasks = tuple(
        _merged(name, [dag.tasks[i] for i in part])
        for name, part in zip(_names(order), inside, strict=True)
    )
    return Dag(tasks, tuple(tuple(sorted(w)) for w in waits))


def _names(order: Sequence[Any]) -> Iterator[str]:
    seen: dict[tuple[str, str], int] = {}
    for m in order:
        key = m[0] if isinstance(m[0], tuple) else m
        seen[key] = n = seen.get(key, 0) + 1
        yield f"{key[0]}/{key[1]}" + (f"#{n}" if n > 1 else "")


def _merged(name: str, tasks: Sequence[Task]) -> Task:
    phase = name.rpartition("/")[2].partition("#")[0]
    return Task(
        name,
        "group",
        phase,
        tasks[0].layer,
        sum(t.flops for t in tasks),
        sum(t.matmul_flops for t in tasks),
        sum(t.bytes for t in tasks),
        sum(t.seconds for t in tasks),
        all(t.known for t in tasks),
        tuple(n for t in tasks for n in t.nodes),
        sum(t.weight_flops for t in tasks),
        sum(t.moved for t in tasks),
    )
