"""FLOPs and bytes of every node of a functional ATen graph.

Source of the matrix formulas: ``torch.utils.flop_counter`` (2 FLOPs a multiply-add); grouped
``convolution_backward`` is counted exactly, where that module counts the weight gradient
``groups`` times. Everything else: :mod:`grapefx.analysis.op_tables`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from grapefx.analysis.rules import Call, Price, price, tensors
from grapefx.analysis.sizes import (
    Meta,
    Size,
    SizeReader,
    batch_values,
    expression_sum,
    is_size,
)
from grapefx.passes.graph.operators import qualified_name


@dataclass(frozen=True, slots=True)
class OpCost:
    """The cost of one node, each op taken alone (before any fusion).

    ``matmul_flops`` run on matrix units, ``vector_flops`` do not; ``read_bytes`` and
    ``written_bytes`` count each argument and result once. Plain ints at the graph's batch size, or
    sympy expressions of it (``GraphCost.symbolic``). ``known`` is False for an op without a rule:
    its ``vector_flops`` are then one an element, a guess. ``weight_flops`` is the part of an op
    that computes both gradients at once (``convolution_backward``) which makes the parameters'.
    """

    op: str
    kind: str
    matmul_flops: Size
    vector_flops: Size
    read_bytes: Size
    written_bytes: Size
    dtype: torch.dtype
    known: bool = True
    weight_flops: Size = 0

    @property
    def flops(self) -> Size:
        """All FLOPs."""
        return self.matmul_flops + self.vector_flops

    @property
    def bytes(self) -> Size:
        """Bytes read plus bytes written."""
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True)
class GraphCost:
    """The costs of a graph's nodes, by node; size computations and the output have none.

    ``sizes`` are the bytes of every node's value, graph inputs included.
    """

    graph: Graph
    nodes: Mapping[Node, OpCost]
    sizes: Mapping[Node, int]
    values: Mapping[str, int]

    def total(self, what: str = "flops") -> int:
        """The sum of one field of :class:`OpCost` over the nodes."""
        return sum(getattr(c, what) for c in self.nodes.values())

    def by(self, key: Callable[[Node], str], what: str = "flops") -> dict[str, int]:
        """Sums of one field, grouped by ``key(node)``."""
        out: dict[str, int] = {}
        for node, cost in self.nodes.items():
            name = key(node)
            out[name] = out.get(name, 0) + getattr(cost, what)
        return out

    def unknown_ops(self) -> dict[str, int]:
        """Ops without a rule, and how many nodes have each."""
        return dict(Counter(c.op for c in self.nodes.values() if not c.known))

    def symbolic(self, what: str = "flops", key: Callable[[Node], str] | None = None) -> Any:
        """The sum of one field as a sympy expression of the size symbols.

        With ``key``, a dict of expressions grouped by ``key(node)``.
        """
        costs, _ = _price_nodes(self.graph, SizeReader(symbolic=True))
        counts: dict[str, Counter[Any]] = {}
        for node, cost in costs.items():
            group = key(node) if key else ""
            counts.setdefault(group, Counter())[getattr(cost, what)] += 1
        sums = {g: expression_sum(c) for g, c in counts.items()}
        return sums if key else sums.get("", expression_sum({}))


def graph_cost(
    graph: GraphModule | Graph,
    *,
    batch: int | None = None,
    values: Mapping[str, int] | None = None,
) -> GraphCost:
    """The cost of every node of a graph whose nodes carry ``meta["val"]``.

    Args:
        graph: a functional ATen graph with fake tensors in ``meta["val"]``.
        batch: evaluate at this batch size; the default is the size that the graph was captured
            with.
        values: the same for graphs with several size symbols, by symbol name.

    Raises:
        InputError: ``batch`` was given but the graph has no size symbol, or several.
    """
    if isinstance(graph, GraphModule):
        graph = graph.graph
    chosen = dict(values or {}) or batch_values(graph, batch)
    costs, sizes = _price_nodes(graph, SizeReader(chosen))
    return GraphCost(graph, costs, sizes, chosen)


def _price_nodes(graph: Graph, reader: SizeReader) -> tuple[dict[Node, OpCost], dict[Node, Size]]:
    metas: dict[Node, Any] = {}
    memo: dict[Any, OpCost] = {}
    out: dict[Node, OpCost] = {}
    for node in graph.nodes:
        metas[node] = reader.read(node.meta.get("val"))
        if node.op != "call_function" or is_size(node):
            continue
        out[node] = _node_cost(node, metas, memo)
    return out, {n: _bytes(m) for n, m in metas.items()}


def _bytes(value: Any) -> Size:
    return value.bytes if isinstance(value, Meta) else sum(m.bytes for m in tensors(value))


def _node_cost(node: Node, metas: dict[Node, Any], memo: dict[Any, OpCost]) -> OpCost:
    args = tuple(_substitute(a, metas) for a in node.args)
    kwargs = {k: _substitute(v, metas) for k, v in node.kwargs.items()}
    inputs = [metas[n] for n in node.all_input_nodes]
    key = _key(node.target, args, kwargs, metas[node], inputs)
    if key is not None and key in memo:
        return memo[key]
    call = Call(node.target, qualified_name(node.target), args, kwargs, metas[node])
    cost = _op_cost(call, price(call), inputs)
    if key is not None:
        memo[key] = cost
    return cost


def _key(target: Any, args: Any, kwargs: Any, out: Any, inputs: Any) -> Any:
    key = (target, args, tuple(kwargs.items()), out, tuple(inputs))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _substitute(arg: Any, metas: dict[Node, Any]) -> Any:
    if isinstance(arg, Node):
        return metas[arg]
    if isinstance(arg, (tuple, list)):
        return tuple(_substitute(a, metas) for a in arg)
    return arg


def _op_cost(call: Call, found: Price, inputs: list[Any]) -> OpCost:
    read, written = found.read, found.written
    if read is None:
        read = sum(m.bytes for i in inputs for m in tensors(i))
    if written is None:
        written = sum(m.bytes for m in tensors(call.out))
    return OpCost(
        call.name,
        found.kind,
        found.matmul,
        found.vector,
        read,
        written,
        _compute_dtype(call),
        found.known,
        found.weight,
    )


def _compute_dtype(call: Call) -> torch.dtype:
    """The dtype that decides the peak rate: the first floating result, else argument."""
    every: list[Meta] = [*tensors(call.out), *call.inputs()]
    floating = (m.dtype for m in every if m.dtype.is_floating_point or m.dtype.is_complex)
    return next(floating, every[0].dtype if every else torch.float32)
