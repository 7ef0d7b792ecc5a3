"""The backward between the error taps and the cuts, taken out of a joint graph as plain products.

In: a joint graph. Out: a graph of its own (``Section``), in Inductor's small operators, in which
every node that depends on a tap's cotangent is linear in it. What does not decompose into such
operators, or would read more saved values than it needs, is written out here (``_OWN``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.emit import distinct
from grapefx.passes.graph.operators import ATTENTION_BACKWARD, draws
from grapefx.passes.graph.order import descendants
from grapefx.torch_compat import batch_symbol, retrace

aten = torch.ops.aten


# operators that read of a tensor only its shape -> what they fill it with, or where that stands
_FILLS: dict[Any, Callable[[Node], Any]] = {
    **dict.fromkeys((aten.zeros_like, aten.new_zeros, aten.zeros), lambda n: 0),
    **dict.fromkeys((aten.empty_like, aten.new_empty, aten.empty), lambda n: 0),
    **dict.fromkeys((aten.ones_like, aten.new_ones, aten.ones), lambda n: 1),
    **dict.fromkeys((aten.full_like, aten.full), lambda n: n.args[1]),
    aten.new_full: lambda n: n.args[2],
}


@dataclass(frozen=True)
class Section:
    """``graph``: from the values of ``sources``, nodes of the joint graph, to the cotangent that
    arrives at each of ``cuts``.
    """

    graph: Graph
    sources: tuple[Node, ...]
    cuts: tuple[int, ...]


def backward_section(graph: Graph, batch: Any, fixed: set[Node]) -> Section:
    """The section of a joint graph.

    ``fixed``: values that no data reaches; those whose size depends on the ``batch`` are inside.
    """
    taps = set(markers.find(graph, markers.TAP_BACKWARD).values())
    cuts = markers.find(graph, markers.CUT_BACKWARD)
    ends = {i: n.args[0] for i, n in cuts.items()}
    behind = descendants(taps) - taps
    stack, inside, outside = list(ends.values()), set(), set()
    while stack:
        node: Any = stack.pop()
        if node in inside or node in outside:
            continue
        sized = is_size(node) or (node in fixed and depends(node.meta["val"], batch))
        own = node in behind or sized
        if node.op == "call_function" and node not in taps and own:
            inside.add(node)
            stack += node.all_input_nodes
        else:
            outside.add(node)
    sources = tuple(n for n in graph.nodes if n in outside)
    part, twin = Graph(), {}
    for k, node in enumerate(sources):
        twin[node] = part.placeholder(f"source_{k}")
    for node in graph.nodes:
        if node in inside:
            twin[node] = part.node_copy(node, lambda n: twin[n])
    part.output([twin[n] for n in ends.values()])  # type: ignore[index]
    made = _small(GraphModule({}, part), [n.meta["val"] for n in sources])
    return Section(made, sources, tuple(ends))


def is_size(node: Node) -> bool:
    """Whether a node is a number."""
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def depends(val: Any, batch: Any) -> bool:
    """Whether the shape of a value depends on the batch's."""
    exprs = [batch_symbol(s) for s in val.shape]
    return any(e is not None and batch in e.free_symbols for e in exprs)


def fills(node: Node) -> bool:
    """Whether a node is a tensor of one number, ``filled``."""
    return _packet(node) in _FILLS


def filled(node: Node) -> Any:
    """The number that a tensor is filled with."""
    return _FILLS[_packet(node)](node)


def fixed_values(graph: Graph) -> set[Node]:
    """Values that no data reaches: parameters, buffers, constants, and what is computed of them."""
    fixed: set[Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and not draws(node):
            tensors = [a for a in node.all_input_nodes if not is_size(a)]
            if fills(node) or fixed.issuperset(tensors):
                fixed.add(node)
        elif meta.role(node) in ("parameter", "buffer", "constant"):
            fixed.add(node)
    return fixed


def _small(gm: GraphModule, example: list[Any]) -> Graph:
    """The graph with decompositions, each node with the line of code that it comes from."""

    class Run(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            with fx_traceback.set_current_meta(n):
                if n.target in markers.ALL:
                    return self.fetch_args_kwargs_from_env(n)[0][0]
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                own = _OWN.get(_packet(n))
                if own is None or n.target is aten.scatter.value:
                    return super().run_node(n)
                return own(n.target, args, kwargs)

    def run(*inputs: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            return list(Run(gm).run(*inputs))

    graph: Graph = retrace(run, distinct(example), decompose=True).graph
    graph.eliminate_dead_code()
    return graph


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _empty(x: Tensor) -> Tensor:
    """In place of a value of which an operator reads the shape alone."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _of_input(op: Any, args: Any, kwargs: Any) -> Any:
    """A convolution's backward, for its input alone."""
    g, x, weight, _, *rest = args
    return op(g, _empty(x), weight, None, *rest[:-1], [True, False, False])


def _of_shape(op: Any, args: Any, kwargs: Any) -> Any:
    """The backward of a mean over windows."""
    g, x, *rest = args
    return op(g, _empty(x), *rest, **kwargs)


def _max_pool(op: Any, args: Any, kwargs: Any) -> Any:
    """Every entry of a window gets the window's gradient times whether it is the largest."""
    g, x, kernel, stride, padding, dilation, _, indices = args
    kernel, stride, padding, dilation = (
        list(p) * (2 // len(p)) for p in (kernel, stride or kernel, padding, dilation)
    )
    (h, w), channels = x.shape[-2:], x.shape[-3]
    # numbers of the entries in each window; those of the padding are 0
    places = torch.arange(1, h * w + 1, dtype=torch.float64, device=g.device).view(1, 1, h, w)
    places = aten.im2col(places, kernel, dilation, padding, stride)[0].long() - 1
    wide = (-1, channels, 1, places.shape[-1])
    largest = indices.reshape(wide) == places
    spread = (g.reshape(wide) * largest).flatten(1, 2)
    folded = aten.col2im(spread, [h, w], kernel, dilation, padding, stride)
    return folded.reshape(x.shape)


def _adaptive_max_pool(op: Any, args: Any, kwargs: Any) -> Any:
    """The same where windows differ in size."""
    g, x, indices = args
    flat = torch.zeros(x.flatten(-2).shape, dtype=g.dtype, device=g.device)
    return _scatter(op, (flat, -1, indices.flatten(-2), g.flatten(-2)), {}).view(x.shape)


def _scatter(op: Any, args: Any, kwargs: Any) -> Any:
    """Each entry times whether it goes to a position (``scatter`` of a backward is onto zeros)."""
    to, dim, index, source = args
    places = torch.arange(to.shape[dim], device=to.device)
    goes = index.movedim(dim, -1).unsqueeze(-1) == places
    moved = (source.movedim(dim, -1).unsqueeze(-1) * goes).sum(-2).movedim(-1, dim)
    return to + moved


def _view(op: Any, args: Any, kwargs: Any) -> Any:
    """A view, or a copy where what is written out here lies otherwise in memory."""
    return args[0].reshape(args[1])


def _attention(op: Any, args: Any, kwargs: Any) -> Any:
    """The derivative of softmax(q k^T) v; dropout of weights is 1 in the mean."""
    names = [a.name for a in op._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    g, q, k, v = args[:4]
    scale = given.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-1, -2) * scale
    bias = given.get("attn_mask", given.get("attn_bias"))
    if bias is not None:
        scores = (
            scores.masked_fill(~bias, -torch.inf) if bias.dtype is torch.bool else scores + bias
        )
    if given.get("is_causal"):
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    p = scores.softmax(-1)
    dp = g @ v.transpose(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    found = (ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g)
    return (*found, *[None] * (len(op._schema.returns) - 3))


_Rule = Callable[[Any, Any, Any], Any]
_OWN: dict[Any, _Rule] = {
    aten.convolution_backward: _of_input,
    aten.avg_pool2d_backward: _of_shape,
    aten.avg_pool3d_backward: _of_shape,
    aten._adaptive_avg_pool2d_backward: _of_shape,
    aten._adaptive_avg_pool3d_backward: _of_shape,
    aten.max_pool2d_with_indices_backward: _max_pool,
    aten.adaptive_max_pool2d_backward: _adaptive_max_pool,
    aten.scatter: _scatter,
    aten.scatter_add: _scatter,
    aten.view: _view,
    aten._unsafe_view: _view,
    **{getattr(aten, name): _attention for name in ATTENTION_BACKWARD if hasattr(aten, name)},
}
