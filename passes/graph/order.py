"""Small graph utilities: topological order, dead code, what leads where."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter

from torch.fx import Graph, Node

from grapefx.ir import StepGraph


def topological(graph: Graph) -> None:
    """Reorder nodes so that each comes after its inputs; otherwise the order stays.

    Placeholders stay in front, the output stays last.
    """
    nodes = list(graph.nodes)
    placed: set[Node] = set()
    cursor = graph._root
    stack: list[tuple[Node, bool]] = []

    def put(node: Node) -> None:
        nonlocal cursor
        if cursor.next is not node:
            cursor.append(node)
        cursor = node
        placed.add(node)

    for node in nodes:
        if node.op == "placeholder":
            put(node)
    for node in nodes:
        if node in placed or node.op == "output":
            continue
        stack.append((node, False))
        while stack:
            n, ready = stack.pop()
            if n in placed:
                continue
            if ready:
                put(n)
                continue
            stack.append((n, True))
            stack.extend((a, False) for a in reversed(n.all_input_nodes) if a not in placed)
    graph.lint()


def dead_code(graph: Graph) -> int:
    """Erase nodes that nothing uses (all operators here are pure); returns how many."""
    count = 0
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not writes(node):
            graph.erase_node(node)
            count += 1
    return count


def writes(node: Node) -> bool:
    """Whether an operator writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def aliases(node: Node) -> bool:
    """Whether an operator's result may be one of its arguments, or a view of it, by its schema."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def ancestors(ends: Iterable[Node]) -> set[Node]:
    """All nodes that lead to one of ``ends``, and these."""
    return _reached(ends, attrgetter("all_input_nodes"))


def descendants(starts: Iterable[Node]) -> set[Node]:
    """All nodes that depend on one of ``starts``, and these."""
    return _reached(starts, attrgetter("users"))


def without_data(step: StepGraph) -> set[Node]:
    """Values that no data reaches: parameters, buffers and what is computed from them."""
    inputs = zip(step.inputs, step.placeholders(), strict=True)
    fixed = {n for s, n in inputs if s.role in ("parameter", "buffer", "constant")}
    for node in step.gm.graph.nodes:
        sources = node.all_input_nodes
        if node.op == "call_function" and sources and fixed.issuperset(sources):
            fixed.add(node)
    return fixed


def _reached(starts: Iterable[Node], next_to: Callable[[Node], Iterable[Node]]) -> set[Node]:
    seen = set(starts)
    stack = list(seen)
    while stack:
        for n in next_to(stack.pop()):
            if n not in seen:
                seen.add(n)
                stack.append(n)
    return seen
