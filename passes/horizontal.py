"""Horizontal batching: the same operator of several layers' updates becomes one batched operator.

In: an update graph (behind the split). Out: another one with the same inputs and outputs, in which
operators that isomorphic layers have in common run once, on stacked operands. Backpropagation
cannot do this: its layers wait for each other. This is a form of execution only: reports and
``verify.independence`` read the step graph, which stays as it is.

Two operators of different layers are batched when everything behind them within their layers is the
same (operator, constants, shapes), found by a hash from the inputs on; a layer that differs at its
end shares the beginning. What layers read in common (the error, a mask) is not stacked. Operators
are batched by ``torch.vmap``; one that it has no rule for runs layer by layer, as it did.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from grapefx.passes.annotate import HEAD
from grapefx.passes.order import dead_code
from grapefx.torch_compat import retrace, size_hint, vmap_rules_only

aten = torch.ops.aten

# Bytes worth stacking (a copy) to save one operator call of one layer. On a CPU 32 KiB lose
# (docs/performance.md). For CUDA reckoned, not measured: a small kernel takes 2 to 4 us, in which
# memory moves some MiB.
WORTH = {"cpu": 12 * 2**10, "cuda": 2 * 2**20}

_UPDATE = ("alignment", "projection", "refit", "weight_grad", "input_grad", "metric")

# Attention's gradients hold the batch in front: layers go there. vmap has no rule for them.
_FOLDED = ("grad_out", "grad_out_", "query", "key", "value", "out", "logsumexp")
_MASKS = ("attn_mask", "attn_bias")
_COMMON = ("philox_seed", "philox_offset", "cum_seq_q", "cum_seq_k")


@dataclass(eq=False)
class Family:
    """One operator in several layers: its node in each, by layer name in a fixed order."""

    nodes: dict[str, Node]
    value: Any = None  # after the rewrite: tensors with the layers in front, unless ``common``
    common: bool = False
    rows: dict[str, Any] = field(default_factory=dict)

    def place(self, layer: str) -> int:
        """The layer's index in the stacked value."""
        return list(self.nodes).index(layer)


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
    node = next(n for n in reversed(out.graph.nodes) if n.op == "output")
    node.args = (tuple(node.args[0]),)  # type: ignore[arg-type]
    dead_code(out.graph)
    out.recompile()
    # a group is named once, by the widest families that hold products
    groups = {tuple(f.nodes) for f in families if f.value is not None and not f.common}
    widest = [g for g in groups if not any(set(g) < set(other) for other in groups)]
    return out, tuple(sorted(widest))


def _symbolic(val: Any) -> bool:
    sizes = (*val.shape, *val.stride()) if isinstance(val, Tensor) else (val,)
    return any(isinstance(s, torch.SymInt) for s in sizes)


def _worth(update: GraphModule) -> int:
    vals = (n.meta.get("val") for n in update.graph.nodes)
    device = next((v.device.type for v in vals if isinstance(v, Tensor)), "cpu")
    return WORTH.get(device, WORTH["cuda"])


# which operators belong together


def find_families(update: GraphModule, worth: int) -> list[Family]:
    """Operators that at least two layers have alike, where batching pays."""
    own, free = layers_alone(update)
    for node in list(own):  # in topological order: what follows a random operator goes as well
        if not _plain(node) or any(a not in own and a not in free for a in node.all_input_nodes):
            del own[node]
    keys: dict[Node, int] = {}
    numbers: dict[Any, int] = {}
    count: dict[Any, int] = {}
    found: dict[Any, dict[str, Node]] = {}
    for node in update.graph.nodes:
        if node not in own:
            continue
        number = numbers.setdefault(_key(node, keys), len(numbers))
        keys[node] = number
        layer = own[node]
        # the same operator twice in one layer: the first with the first, the second with the second
        nth = count[number, layer] = count.get((number, layer), -1) + 1
        found.setdefault((number, nth), {})[layer] = node
    # layers that have more in common stand side by side: a part of them is then a slice
    text: dict[str, list[int]] = {}
    for node, layer in own.items():
        text.setdefault(layer, []).append(keys[node])
    rank = {layer: i for i, layer in enumerate(sorted(text, key=text.__getitem__))}
    families: list[Family] = []
    family_of: dict[Node, Family] = {}
    stacked: set[tuple[Node, ...]] = set()
    for nodes in found.values():  # in topological order
        if len(nodes) < 2:
            continue
        family = Family({layer: nodes[layer] for layer in sorted(nodes, key=rank.__getitem__)})
        if not _fits(family, family_of):
            continue
        stacks = list(_stacks(family, family_of))
        new = [s for s in dict.fromkeys(stacks) if s not in stacked]
        if sum(_bytes(n) for s in new for n in s) > worth * (len(nodes) - 1):
            continue
        stacked.update(new)
        families.append(family)
        family_of |= dict.fromkeys(nodes.values(), family)
    # views alone save nothing
    return families if any(_works(f) for f in families) else []


def _colours(update: GraphModule) -> dict[Node, str | None]:
    """Each node's layer, None for what several layers (or the head) use.

    From its users first: a value that several layers share was emitted by one of them.
    """
    out: dict[Node, str | None] = {}
    for node in reversed(update.graph.nodes):
        if node.op != "call_function":
            continue
        users = {out[u] for u in node.users if out.get(u) is not None}
        if users:
            out[node] = users.pop() if len(users) == 1 else None
        else:
            layer = node.meta.get("grapefx_layer")
            named = node.meta.get("grapefx_phase") in _UPDATE and layer != HEAD
            out[node] = layer if named else None
    return out


def layers_alone(update: GraphModule) -> tuple[dict[Node, str], set[Node]]:
    """The layer of each operator that reads nothing of another layer; and what reads no layer.

    Found by following the graph: names only say which layer a result belongs to.
    """
    colours = _colours(update)
    own: dict[Node, str] = {}
    free: set[Node] = set()
    for node in update.graph.nodes:
        if node.op == "placeholder":
            free.add(node)
        elif node.op == "call_function":
            layer = colours[node]
            args = node.all_input_nodes
            if layer is None:
                if all(a in free for a in args):
                    free.add(node)
            elif all(a in free or own.get(a) == layer for a in args):
                own[node] = layer
    return own, free


def _plain(node: Node) -> bool:
    """Whether an operator may run once for several layers."""
    if node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload):
        return True
    tags = node.target.tags
    return not (
        node.target._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in tags
        or node.target is aten.as_strided.default
    )


def _key(node: Node, keys: dict[Node, int]) -> Any:
    """What two operators must have in common: everything down to what comes from outside."""

    def part(a: Node) -> Any:
        own = a in keys
        return _Text(f"own {keys[a]}" if own else f"outside {_signature(a.meta.get('val'))}")

    args = map_arg((node.args, dict(node.kwargs)), part)
    return (node.target, repr(args), _signature(node.meta.get("val")))


class _Text:
    """Stands for a node in the text of a call."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"<{self.text}>"


def _signature(val: Any) -> str:
    if isinstance(val, Tensor):
        return f"{val.dtype} {tuple(val.shape)} {val.device}"
    if isinstance(val, (tuple, list)):
        return str([_signature(v) for v in val])
    return f"{type(val).__name__} {val}"


def _operands(family: Family) -> list[tuple[Node, ...]]:
    """The operands of all layers, one tuple an argument."""
    return list(zip(*(_inputs(n) for n in family.nodes.values()), strict=True))


def _inputs(node: Node) -> list[Node]:
    """Every node among the arguments, in order, repeated where it is."""
    found: list[Node] = []
    map_arg((node.args, dict(node.kwargs)), found.append)
    return found


def _fits(family: Family, family_of: dict[Node, Family]) -> bool:
    """What has several results stays a family only as a whole."""
    for operands in _operands(family):
        if isinstance(operands[0].meta.get("val"), (tuple, list)):
            source = family_of.get(operands[0])
            if source is None or tuple(source.nodes.values()) != operands:
                return False
    return True


def _stacks(family: Family, family_of: dict[Node, Family]) -> Iterator[tuple[Node, ...]]:
    """The operands that must be copied together."""
    for operands in _operands(family):
        first = family_of.get(operands[0])
        if len(set(operands)) == 1 or not isinstance(operands[0].meta.get("val"), Tensor):
            continue
        if first is not None and all(family_of.get(o) is first for o in operands):
            places = _places(first, family)
            if places == list(range(places[0], places[0] + len(places))):
                continue
        yield operands


def _places(source: Family, family: Family) -> list[int]:
    """Where the layers of ``family`` are in the value of ``source``."""
    order = {layer: i for i, layer in enumerate(source.nodes)}
    return [order.get(layer, -len(order) - 1) for layer in family.nodes]


def _bytes(node: Node) -> int:
    val = node.meta["val"]
    size = 1
    for s in val.shape:
        size *= size_hint(s)
    return size * int(val.element_size())


def _works(family: Family) -> bool:
    node = next(iter(family.nodes.values()))
    return not _is_view(node) and isinstance(node.meta.get("val"), (Tensor, tuple, list))


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)


# the rewrite


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
            elif _name(node).startswith("_scaled_dot_product"):
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
        operands = [self.operand(family, o) for o in _operands(family)]
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

        values = [v for v, _ in operands]
        if not any(stacked for _, stacked in operands):
            family.value, family.common = self.call(node), True
            return
        dims = tuple(0 if stacked else None for _, stacked in operands)
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
        feed = iter(_operands(family))
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
            places = _places(source, family)
            if places == list(range(len(source.nodes))):
                return source.value, True
            if places == list(range(places[0], places[0] + len(places))):
                return source.value.narrow(0, places[0], len(places)), True
        if nodes not in self.stacked:
            self.stacked[nodes] = torch.stack([self.value(n) for n in nodes])
        return self.stacked[nodes], True


def _name(node: Node) -> str:
    return str(getattr(node.target, "_schema", None) and node.target._schema.name.split("::")[-1])  # type: ignore[union-attr]


def _loose(target: Any) -> Callable[..., Any]:
    """A view as a reshape: batched values may lie in memory in another order."""
    return aten.reshape.default if target is aten.view.default else target  # type: ignore[no-any-return]


def _each(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    return tuple(fn(v) if isinstance(v, Tensor) else v for v in value)


def _like(value: Any, val: Any) -> Any:
    """An output in the strides that it had."""
    if not isinstance(value, Tensor) or value.stride() == val.stride():
        return value
    for layout in (torch.contiguous_format, torch.channels_last):
        if (layout is torch.contiguous_format or val.ndim == 4) and val.is_contiguous(
            memory_format=layout
        ):
            return value.contiguous(memory_format=layout)
    return value


__all__ = ["WORTH", "Family", "batch_layers", "find_families"]
