"""Adding nodes to an existing graph, each with its fake value computed on the spot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Unpack

import torch
from torch.fx import Graph, Node

from grapefx.passes.graph.meta import Labels, entries
from grapefx.passes.graph.trace_key import call_key, trace_key
from grapefx.torch_compat import FakeTensorMode, fake_mode_of, make_fx, python_dispatcher, pytree

aten = torch.ops.aten


def graph_mode(graph: Graph) -> FakeTensorMode:
    """The fake mode of a graph's values."""
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            return fake_mode_of(val)
    raise ValueError("the graph has no fake tensor")


class Emitter:
    """Emits nodes before a given node.

    ``notes`` (entries of ``Node.meta``), phase and layer are put on every node made.
    """

    def __init__(
        self, graph: Graph, notes: Mapping[str, Any] | None = None, **labels: Unpack[Labels]
    ) -> None:
        self.graph = graph
        self.mode = graph_mode(graph)
        self.meta = {**(notes or {}), **entries(labels)}
        self._traced: dict[Any, tuple[Graph, Any]] = {}
        self._called: dict[Any, Any] = {}

    @contextlib.contextmanager
    def before(
        self, node: Node, notes: Mapping[str, Any] | None = None, **labels: Unpack[Labels]
    ) -> Iterator[None]:
        """Insert in front of ``node`` while the context lasts."""
        saved = self.meta
        self.meta = {**saved, **(notes or {}), **entries(labels)}
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self.meta = saved

    @contextlib.contextmanager
    def after(self, node: Node, **labels: Unpack[Labels]) -> Iterator[None]:
        """Insert behind ``node`` (and behind what is emitted meanwhile)."""
        follower = node.next
        with self.before(follower, **labels):
            yield

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        """One call; arguments are nodes or plain values."""
        key = call_key(op, args, kwargs)
        if key is None or key not in self._called:
            with self.mode, python_dispatcher(), torch.no_grad():
                val = op(*values(args), **values(kwargs))  # first: a call that fails leaves no node
            if key is not None:
                self._called[key] = val
        else:
            val = self._called[key]
        node = self.graph.call_function(op, args, kwargs)
        node.meta.update(self.meta)
        node.meta["val"] = val
        return node

    def get(self, node: Node, index: int) -> Node:
        """``node[index]`` for an operator that returns a tuple."""
        import operator

        return self.call(operator.getitem, node, index)

    def trace(self, fn: Callable[..., Any], *args: Any, reuse: Node | None = None) -> Any:
        """A Python function of tensors, traced to ATen nodes and spliced in.

        Arguments may be nested lists and tuples of nodes; plain values are constants. Returns
        nodes in the structure that ``fn`` returns tensors. Where ``fn`` repeats the call of
        ``reuse``, its value in the graph is taken instead.
        """
        flat, spec = pytree.tree_flatten(args)
        nodes = list(dict.fromkeys(a for a in flat if isinstance(a, Node)))
        key = trace_key(fn, spec, flat, nodes)
        if key is None or key not in self._traced:
            made = self._trace(fn, flat, spec, nodes)
            if key is not None:
                self._traced[key] = made
        else:
            made = self._traced[key]
        inner, out_spec = made
        mapping: dict[Node, Any] = {}
        placeholders = [n for n in inner.nodes if n.op == "placeholder"]
        mapping.update(zip(placeholders, nodes, strict=True))
        outs: list[Any] = []
        for n in inner.nodes:
            if n.op == "placeholder":
                continue
            if n.op == "output":
                flat_out, _ = pytree.tree_flatten(n.args[0])
                outs = [mapping[o] if isinstance(o, Node) else o for o in flat_out]
                continue
            if n.op == "get_attr":
                raise NotImplementedError("a traced rule made a tensor constant")
            if n.target in (aten.alias.default, aten.detach.default):
                mapping[n] = mapping[n.args[0]]
                continue
            known = self._known(n, mapping, reuse)
            if known is not None:
                mapping[n] = known
                continue
            new = self.graph.node_copy(n, lambda m: mapping[m])
            new.meta = {"val": n.meta.get("val"), **self.meta}
            mapping[n] = new
        return pytree.tree_unflatten(outs, out_spec)

    def _trace(
        self, fn: Callable[..., Any], flat: list[Any], spec: Any, nodes: list[Node]
    ) -> tuple[Graph, Any]:
        """The graph of ``fn`` on the values of ``nodes``, and the structure of what it returns."""
        slots = {n: i for i, n in enumerate(nodes)}
        result: list[Any] = []

        def wrapped(tensors: list[Any]) -> list[Any]:
            leaves = [tensors[slots[a]] if isinstance(a, Node) else a for a in flat]
            out, out_spec = pytree.tree_flatten(fn(*pytree.tree_unflatten(leaves, spec)))
            result[:] = [out_spec]
            return out

        with self.mode, python_dispatcher():
            inner = make_fx(wrapped, tracing_mode="real")(distinct([n.meta["val"] for n in nodes]))
        inner.graph.eliminate_dead_code()
        return inner.graph, result[0]

    def _known(self, inner: Node, mapping: dict[Node, Any], reuse: Node | None) -> Any:
        """The node of the graph whose call ``inner`` repeats."""
        if reuse is None or inner.target is not reuse.target:
            return None
        if not isinstance(reuse.meta.get("val"), torch.Tensor):
            return None
        call = torch.fx.node.map_arg((inner.args, dict(inner.kwargs)), lambda m: mapping[m])
        same = call == self.operand((reuse.args, dict(reuse.kwargs)))
        return self.operand(reuse) if same else None

    def operand(self, tree: Any) -> Any:
        """What stands for a node of the graph as an operand (see the tangent pass)."""
        return tree


def distinct(vals: list[Any]) -> list[Any]:
    """The tracer knows inputs by identity: two nodes that share a fake value get one each."""
    seen: set[int] = set()
    out = []
    for v in vals:
        if id(v) in seen and isinstance(v, torch.Tensor):
            v = v.detach()
        seen.add(id(v))
        out.append(v)
    return out


def values(tree: Any) -> Any:
    """Nodes replaced by their fake values."""
    return torch.fx.node.map_arg(tree, lambda n: n.meta["val"])
