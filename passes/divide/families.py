"""Which operators of an update graph several layers have in common.

Two operators of different layers belong to one family when everything behind them within their
layers is the same (operator, constants, shapes), found by a hash from the inputs on; a layer that
differs at its end shares the beginning. What layers read in common (the error, a mask) is not
stacked.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from grapefx.passes.graph import meta
from grapefx.passes.graph.annotate import HEAD
from grapefx.passes.graph.order import aliases
from grapefx.torch_compat import size_hint

aten = torch.ops.aten

_UPDATE = ("alignment", "projection", "refit", "weight_grad", "input_grad", "metric")


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
        new = [s for s in dict.fromkeys(stacks(family, family_of)) if s not in stacked]
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
            layer = meta.layer(node)
            named = meta.phase(node) in _UPDATE and layer != HEAD
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


def operands(family: Family) -> list[tuple[Node, ...]]:
    """The operands of all layers, one tuple an argument."""
    return list(zip(*(_inputs(n) for n in family.nodes.values()), strict=True))


def _inputs(node: Node) -> list[Node]:
    """Every node among the arguments, in order, repeated where it is."""
    found: list[Node] = []
    map_arg((node.args, dict(node.kwargs)), found.append)
    return found


def _fits(family: Family, family_of: dict[Node, Family]) -> bool:
    """What has several results stays a family only as a whole."""
    for nodes in operands(family):
        if isinstance(nodes[0].meta.get("val"), (tuple, list)):
            source = family_of.get(nodes[0])
            if source is None or tuple(source.nodes.values()) != nodes:
                return False
    return True


def stacks(family: Family, family_of: dict[Node, Family]) -> Iterator[tuple[Node, ...]]:
    """The operands that must be copied together."""
    for nodes in operands(family):
        first = family_of.get(nodes[0])
        if len(set(nodes)) == 1 or not isinstance(nodes[0].meta.get("val"), Tensor):
            continue
        if first is not None and all(family_of.get(o) is first for o in nodes):
            places = places_of(first, family)
            if places == list(range(places[0], places[0] + len(places))):
                continue
        yield nodes


def places_of(source: Family, family: Family) -> list[int]:
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
    return not hasattr(node.target, "_schema") or aliases(node)
