"""Small graph utilities: topological order, dead code, what leads where."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Graph, Node


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
        if node.op == "call_function" and not node.users and not _writes(node):
            graph.erase_node(node)
            count += 1
    return count


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def ancestors(ends: Iterable[Node]) -> set[Node]:
    """All nodes that lead to one of ``ends``, and these."""
    seen = set(ends)
    stack = list(seen)
    while stack:
        for a in stack.pop().all_input_nodes:
            if a not in seen:
                seen.add(a)
                stack.append(a)
    return seen


def descendants(starts: Iterable[Node]) -> set[Node]:
    """All nodes that depend on one of ``starts``, and these."""
    seen = set(starts)
    stack = list(seen)
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return seen
