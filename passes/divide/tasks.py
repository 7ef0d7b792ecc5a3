"""Tasks: an update graph cut into what all layers share, one part a layer, and the rest.

In: an update graph (behind the split). Out: graphs that, run in any order that ``preds`` allows,
compute what the one does, bit for bit. Layers' parts do not wait for each other.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from grapefx.passes.divide.families import layers_alone
from grapefx.passes.graph.order import ancestors
from grapefx.torch_compat import graph_module

# Where a value comes from: (index of a task, index among its outputs); task -1: the graph's inputs.
Ref = tuple[int, int]

SHARED, REST = "(shared)", "(rest)"


@dataclass(frozen=True)
class Task:
    """A part of the update. ``preds`` are the tasks that it waits for, all in front of it."""

    name: str
    gm: GraphModule
    reads: tuple[Ref, ...]
    preds: tuple[int, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Tasks:
    """All parts, and where each output of the update is."""

    tasks: tuple[Task, ...]
    results: tuple[Ref | None, ...]


def take(ref: Ref, made: Sequence[Any], inputs: Sequence[Any]) -> Any:
    """The value that a reference stands for."""
    task, index = ref
    return inputs[index] if task < 0 else made[task][index]


def split_tasks(update: GraphModule) -> Tasks:
    """Cut ``update``, which is not changed."""
    own, free = layers_alone(update)
    inside = [n for n in update.graph.nodes if n.op == "call_function"]
    group = {n: SHARED if n in free else own.get(n, REST) for n in inside}
    layers = dict.fromkeys(own.values())
    names = [g for g in (SHARED, *layers, REST) if g in set(group.values())]
    return _cut(update, names, group)


def split_by_results(update: GraphModule, names: Sequence[str], parts: Sequence[str]) -> Tasks:
    """Cut ``update``, which is not changed, by what its nodes lead to.

    ``parts``: for each output the name of the part that computes it. ``names``: the parts in order;
    what several need belongs to the first of them. Parts without nodes of their own are left out.
    """
    output = update.graph.output_node()
    group: dict[Node, str] = {}
    for name in names:
        own = [r for r, p in zip(output.args[0], parts, strict=True) if p == name]  # type: ignore[arg-type]
        for n in ancestors(r for r in own if isinstance(r, Node)):
            if n.op == "call_function":
                group.setdefault(n, name)
    for n in update.graph.nodes:  # a part of a result goes where the whole is
        if n.target is operator.getitem and n.args[0] in group:
            group[n] = group[n.args[0]]
    used = set(group.values())
    return _cut(update, [n for n in names if n in used], group)


def _cut(update: GraphModule, names: Sequence[str], group: dict[Node, str]) -> Tasks:
    inside = [n for n in update.graph.nodes if n in group]
    output = update.graph.output_node()
    refs: dict[Node, Ref] = {
        n: (-1, i) for i, n in enumerate(n for n in update.graph.nodes if n.op == "placeholder")
    }
    tasks = []
    for index, name in enumerate(names):
        members = [n for n in inside if group[n] == name]
        mine = set(members)
        needed = list(dict.fromkeys(a for n in members for a in n.all_input_nodes if a not in mine))
        given = [n for n in members if any(u not in mine for u in n.users)]
        reads = tuple(refs[a] for a in needed)
        preds = tuple(sorted({task for task, _ in reads if task >= 0}))
        gm = _graph(update, members, needed, given)
        tasks.append(Task(name, gm, reads, preds, tuple(n.name for n in members)))
        refs |= {n: (index, i) for i, n in enumerate(given)}
    results = tuple(refs[r] if isinstance(r, Node) else None for r in output.args[0])  # type: ignore[union-attr, arg-type]
    return Tasks(tuple(tasks), results)


def _graph(
    update: GraphModule, members: Sequence[Node], needed: Sequence[Node], given: Sequence[Node]
) -> GraphModule:
    """A part as a graph of its own; equal parts get equal names, so that one compilation serves."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for i, node in enumerate(needed):
        copies[node] = graph.placeholder(f"arg{i}")
        copies[node].meta["val"] = node.meta["val"]
    for node in members:
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda a: copies[a])
        new = copies[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        new.meta = dict(node.meta)
    out = graph.output(tuple(copies[n] for n in given))
    out.meta = {}
    return graph_module(update, graph)
