"""Horizontal batching: the same operator of several layers' updates becomes one batched operator.

In: an update graph (behind the split). Out: another one with the same inputs and outputs, in which
operators that isomorphic layers have in common run once, on stacked operands. Backpropagation
cannot do this: its layers wait for each other. This is a form of execution only: reports and
``verify.independence`` read the step graph, which stays as it is.

``families.py`` finds what may run together. Operators are batched by ``torch.vmap``; one that it
has no rule for runs layer by layer, as it did.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from grapefx.passes.divide.families import Family, find_families, operands, places_of
from grapefx.passes.graph.layout import strides
from grapefx.passes.graph.operators import op_name
from grapefx.passes.graph.order import dead_code
from grapefx.torch_compat import retrace, vmap_rules_only

aten = torch.ops.aten

# Bytes worth stacking (a copy) to save one operator call of one layer. On a CPU 32 KiB lose
# (docs/performance.md). For CUDA reckoned, not measured: a small kernel takes 2 to 4 us, in which
# memory moves some MiB.
WORTH = {"cpu": 12 * 2**10, "cuda": 2 * 2**20}

# Attention's gradients hold the batch in front: layers go there. vmap has no rule for them.
_FOLDED = ("grad_out", "grad_out_", "query", "key", "value", "out", "logsumexp")
_MASKS = ("attn_mask", "attn_bias")
_COMMON = ("philox_seed", "philox_offset", "cum_seq_q", "cum_seq_k")


def batch_layers(
    update: GraphModule, *, decompose: bool, worth: int | None = None
) -> tuple[GraphModule, tuple[tuple[str, ...], ...]]:
    """Batch the updates of layers that are alike; returns the graph and the groups of layers.

    ``decompose``: also apply Inductor's decompositions (what batching makes is not decomposed yet).
    ``worth`` replaces ``WORTH`` of the graph's device. Without a group the graph comes back itself,
    and so does one with a symbolic batch size: some of vmap's rules would fix it.
    """
    placeholders = [n for n in update.graph.nodes if n.op == "placeholder"]
    example = [n.meta["val"] for n in placeholders]
    if any(_symbolic(v) for v in example):
        return update, ()
    families = find_families(update, _worth(update) if worth is None else worth)
    rewrite = _Rewrite(update, families)
    order = rewrite.order()
    if not families or order is None:
        return update, ()
    out = retrace(lambda *inputs: rewrite.run(inputs, order), example, decompose=decompose)
    node = out.graph.output_node()
    node.args = (tuple(node.args[0]),)  # type: ignore[arg-type]
    dead_code(out.graph)
    out.recompile()
    # a group is named once, by the widest families that hold products
    groups = {tuple(f.nodes) for f in families if f.value is not None and not f.common}
    widest = [g for g in groups if not any(set(g) < set(other) for other in groups)]
    return out, tuple(sorted(widest))


def _symbolic(val: Any) -> bool:
    sizes = (*val.shape, *strides(val)) if isinstance(val, Tensor) else (val,)
    return any(isinstance(s, torch.SymInt) for s in sizes)


def _worth(update: GraphModule) -> int:
    vals = (n.meta.get("val") for n in update.graph.nodes)
    device = next((v.device.type for v in vals if isinstance(v, Tensor)), "cpu")
    return WORTH.get(device, WORTH["cuda"])


class _Rewrite:
    """Runs the graph with families batched; under a tracer this makes the new graph."""

    def __init__(self, update: GraphModule, families: Sequence[Family]) -> None:
        self.graph = update.graph
        self.family_of = {n: f for f in families for n in f.nodes.values()}
        self.layer_of = {n: layer for f in families for layer, n in f.nodes.items()}
        self.env: dict[Node, Any] = {}
        self.stacked: dict[tuple[Node, ...], Tensor] = {}

    def order(self) -> list[Node | Family] | None:
        """Nodes and families, each behind what it reads; None if families wait for each other."""
        done: dict[Any, bool] = {}
        out: list[Node | Family] = []
        for root in self.graph.nodes:
            stack: list[Any] = [self.family_of.get(root, root)]
            while stack:
                unit = stack[-1]
                if done.get(unit):
                    stack.pop()
                    continue
                nodes = list(unit.nodes.values()) if isinstance(unit, Family) else [unit]
                waits = dict.fromkeys(
                    self.family_of.get(a, a) for n in nodes for a in n.all_input_nodes
                )
                pending = [w for w in waits if not done.get(w)]
                if not pending:
                    done[unit] = True
                    out.append(stack.pop())
                elif unit in done:
                    return None
                else:
                    done[unit] = False
                    stack += pending
        return out

    def run(self, inputs: Sequence[Any], order: Sequence[Node | Family]) -> list[Any]:
        """All outputs."""
        self.env, self.stacked = {}, {}
        values = iter(inputs)
        with vmap_rules_only():
            for unit in order:
                if isinstance(unit, Family):
                    self.family(unit)
                elif unit.op == "placeholder":
                    self.env[unit] = next(values)
                elif unit.op == "call_function":
                    self.env[unit] = self.call(unit)
                else:
                    return [
                        _like(self.value(o), o.meta.get("val")) if isinstance(o, Node) else o
                        for o in unit.args[0]  # type: ignore[union-attr]
                    ]
        raise AssertionError("a graph without an output")

    def call(self, node: Node) -> Any:
        """One operator of one layer, or of none."""
        args, kwargs = map_arg((node.args, dict(node.kwargs)), self.value)
        return _loose(node.target)(*args, **kwargs)

    def value(self, node: Node) -> Any:
        """A node's own value: where it was batched, its layer's part."""
        if node not in self.env:
            family, layer = self.family_of[node], self.layer_of[node]
            if family.common:
                self.env[node] = family.value
            else:
                place = family.place(layer)
                self.env[node] = _each(family.value, lambda v: v.select(0, place))
        return self.env[node]

    def family(self, family: Family) -> None:
        """One operator of several layers at once; layer by layer where that fails."""
        node = next(iter(family.nodes.values()))
        val = node.meta.get("val")
        try:
            if not isinstance(val, (Tensor, tuple, list)):  # a size: the same for all
                family.value, family.common = self.call(node), True
            elif node.target is operator.getitem:
                self.part(family, node)
            elif op_name(node).startswith("_scaled_dot_product"):
                self.attention(family, node)
            else:
                self.batched(family, node)
        except (NotImplementedError, RuntimeError):  # no batching rule, or not for these shapes
            family.value = None
            for n in family.nodes.values():
                del self.family_of[n]
                self.env[n] = self.call(n)

    def part(self, family: Family, node: Node) -> None:
        """One result of an operator with several."""
        source = self.family_of.get(node.args[0])  # type: ignore[arg-type]
        if source is None or list(source.nodes) != list(family.nodes):
            raise NotImplementedError("parts of results that were not batched together")
        family.value, family.common = source.value[node.args[1]], source.common

    def batched(self, family: Family, node: Node) -> None:
        given = [self.operand(family, o) for o in operands(family)]
        kept: list[int] = []
        size = 0

        def call(*values: Any) -> Any:
            nonlocal size
            feed = iter(values)
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda _: next(feed))
            made = _loose(node.target)(*args, **kwargs)
            if isinstance(made, Tensor):
                return made
            size = len(made)  # a gradient that nobody asked for is None
            kept[:] = [i for i, m in enumerate(made) if isinstance(m, Tensor)]
            return tuple(made[i] for i in kept)

        values = [v for v, _ in given]
        if not any(stacked for _, stacked in given):
            family.value, family.common = self.call(node), True
            return
        dims = tuple(0 if stacked else None for _, stacked in given)
        made = torch.vmap(call, in_dims=dims)(*values)
        if not isinstance(made, Tensor):
            whole: list[Any] = [None] * size
            for i, m in zip(kept, made, strict=True):
                whole[i] = m
            made = tuple(whole)
        family.value = made

    def attention(self, family: Family, node: Node) -> None:
        """The gradient of attention: layers are samples."""
        schema = node.target._schema  # type: ignore[union-attr]
        named = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
        named |= dict(node.kwargs)
        if named.get("dropout_p", 0.0) != 0.0:
            raise NotImplementedError("each layer has its own mask")
        feed = iter(operands(family))
        count = len(family.nodes)

        def folded(name: str, arg: Any) -> Any:
            if not isinstance(arg, Node):
                return arg
            nodes = next(feed)
            if name in _FOLDED:
                value, stacked = self.operand(family, nodes)
                value = value if stacked else value.expand(count, *value.shape)
                return value.flatten(0, 1)
            if name in _COMMON or not isinstance(nodes[0].meta.get("val"), Tensor):
                return self.value(nodes[0])
            if name not in _MASKS:
                raise NotImplementedError(f"{name} of several layers")
            mask, stacked = self.operand(family, nodes)
            if not stacked and (mask.ndim < 4 or mask.shape[0] == 1):
                return mask
            mask = mask if stacked else mask.unsqueeze(0)
            while mask.ndim < 5:
                mask = mask.unsqueeze(1)
            batch = named["query"].meta["val"].shape[0]
            return mask.expand(count, batch, -1, -1, -1).flatten(0, 1)

        args = [folded(a.name, x) for a, x in zip(schema.arguments, node.args, strict=False)]
        kwargs = {k: folded(k, x) for k, x in node.kwargs.items()}
        made = node.target(*args, **kwargs)  # type: ignore[operator]
        family.value = _each(made, lambda v: v.unflatten(0, (count, -1)))

    def operand(self, family: Family, nodes: tuple[Node, ...]) -> tuple[Any, bool]:
        """One operand of all layers, and whether it has the layers in front."""
        first = nodes[0]
        source = self.family_of.get(first)
        if (
            source is not None
            and source.common
            and all(self.family_of.get(n) is source for n in nodes)
        ):
            return source.value, False
        if len(set(nodes)) == 1 or not isinstance(first.meta.get("val"), Tensor):
            return self.value(first), False
        if source is not None and all(self.family_of.get(n) is source for n in nodes):
            places = places_of(source, family)
            if places == list(range(len(source.nodes))):
                return source.value, True
            if places == list(range(places[0], places[0] + len(places))):
                return source.value.narrow(0, places[0], len(places)), True
        if nodes not in self.stacked:
            self.stacked[nodes] = torch.stack([self.value(n) for n in nodes])
        return self.stacked[nodes], True


def _loose(target: Any) -> Callable[..., Any]:
    """A view as a reshape: batched values may lie in memory in another order."""
    return aten.reshape.default if target is aten.view.default else target  # type: ignore[no-any-return]


def _each(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    return tuple(fn(v) if isinstance(v, Tensor) else v for v in value)


def _like(value: Any, val: Any) -> Any:
    """An output in the strides that it had."""
    if not isinstance(value, Tensor) or strides(value) == strides(val):
        return value
    for layout in (torch.contiguous_format, torch.channels_last):
        if (layout is torch.contiguous_format or val.ndim == 4) and val.is_contiguous(
            memory_format=layout
        ):
            return value.contiguous(memory_format=layout)
    return value
