"""The sweep: which operators with weights belong together, and where each such segment may end.

In: the captured forward graph. Out: segments, each with the value that closes it.

A *segment* is opened by an operator with weights and closed by a cut behind it, so that no path
joins two segments' weights without crossing a cut:

1. An operator with a weight matrix (linear, convolution, embedding, recurrent) is *heavy*; other
   operators with parameters (norms, scales) are *light*. A heavy operator closes the heavy
   segments among its inputs and absorbs light ones (pre-norm).
2. add, sub, where and attention-like products merge the segments that they join; anything else
   that joins two of them (cat, gating) closes all. A skip over a closed segment is no path.
3. A value that fans out closes, unless its branches meet again before the next weight
   (``x * sigmoid(x)``, q-k-v from one projection, rotary embeddings).
4. To close is to cut at the narrowest value after the segment's last parameter and last merge,
   the latest of equals. Where no value can be cut (a tuple, a value without the batch), each value
   behind takes the segment's parameters over: both states of an LSTM cell become points.
5. The segment that reaches the error tap unclosed is the head: it gets the true error. So does one
   that was closed, if no trainable parameter lies between its cut and the tap (``placement``): code
   without parameters behind the output layer is exact, whatever it returns.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from grapefx.errors import PlacementError
from grapefx.ir import Captured
from grapefx.passes.graph.custom_functions import FUNCTION
from grapefx.passes.graph.folds import Fold, batch_folds
from grapefx.passes.graph.operators import HEAVY, MERGE, op_name
from grapefx.passes.graph.order import ancestors
from grapefx.passes.graph.source import source_of
from grapefx.torch_compat import size_hint

aten = torch.ops.aten

_REGION_LIMIT = 400


class UncuttableError(PlacementError):
    """No value keeps the batch where a point or the tap belongs: backpropagation needs neither."""


@dataclass(eq=False)
class Segment:
    heavy: bool
    params: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)
    candidates: list[Node] = field(default_factory=list)
    first: Node | None = None
    closed: Node | None = None
    merged: Segment | None = None
    stuck: bool = False  # it could not be closed: its parameters went over to what reads it
    name: str = ""  # given by the user's choice

    def root(self) -> Segment:
        seg = self
        while seg.merged is not None:
            seg = seg.merged
        return seg


def value(node: Any) -> Any:
    """A node's fake value; of a tuple, nothing."""
    return node.meta.get("val") if isinstance(node, Node) else None


def is_float(node: Any) -> bool:
    """Whether a node is a floating-point tensor (what a gradient can flow through)."""
    val = value(node)
    return isinstance(val, torch.Tensor) and (val.is_floating_point() or val.is_complex())


def is_complex(node: Node) -> bool:
    """Whether a node is a complex tensor."""
    val = value(node)
    return isinstance(val, torch.Tensor) and val.is_complex()


class Sweep:
    def __init__(self, cap: Captured, trainable: set[str], batch_size: int) -> None:
        self.cap = cap
        folds = batch_folds(cap.gm.graph, cap.batch, batch_size)
        # of what can be cut or tapped: feedback is real
        self.folds = {n: fold for n, fold in folds.items() if not is_complex(n)}
        self.nodes = list(cap.gm.graph.nodes)
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.output = self.nodes[-1]
        self.param_of: dict[Node, set[str]] = {}
        self.frozen: set[Node] = set()
        self.data: set[Node] = set()
        self.seg: dict[Node, Segment] = {}
        self.interior: set[Node] = set()
        self.closed: list[Segment] = []
        self.stuck: list[str] = []  # why segments could not be closed
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        for node, slot in zip(placeholders, cap.inputs, strict=True):
            if slot.role == "parameter":
                if slot.name in trainable and is_float(node):
                    self.param_of[node] = {slot.name}
                else:
                    self.frozen.add(node)
            elif slot.role == "input":
                self.data.add(node)
        returned = [n for n in self.output.args[0] if isinstance(n, Node)]  # type: ignore[union-attr]
        self.user_outputs = returned[len(cap.mutated) :]
        self.live = self._live()
        self._fold_parameters()

    def _live(self) -> set[Node]:
        """Nodes on a differentiable path to a user output."""
        live: set[Node] = set()
        stack = [n for n in self.user_outputs if is_float(n)]
        while stack:
            n = stack.pop()
            if n in live:
                continue
            live.add(n)
            if n.op == "call_function" and n.target is aten.detach.default:
                continue
            stack.extend(
                a for a in n.all_input_nodes if is_float(a) or isinstance(value(a), (tuple, list))
            )
        return live

    def trained(self) -> set[Node]:
        """Nodes that a gradient leads from to a trainable parameter."""
        found = set(self.param_of)
        for n in self.nodes:
            if n.op != "call_function" or n.target is aten.detach.default:
                continue
            if is_float(n) or isinstance(value(n), (tuple, list)):
                found.update([n] if any(a in found for a in n.all_input_nodes) else [])
        return found

    @staticmethod
    def ancestors(nodes: Iterable[Node]) -> set[Node]:
        """Everything that leads to one of ``nodes``."""
        return ancestors(a for n in nodes for a in n.all_input_nodes)

    def before_weights(self, ends: Iterable[Node]) -> set[Node]:
        """Nodes with a trainable parameter on a differentiable path from them to one of ``ends``.

        Behind the others, and at them, nothing is left to train: what they lead to is a tail.
        """
        toward = ancestors(ends)
        found: set[Node] = set()
        for n in reversed(self.nodes):
            if n not in toward or n not in self.live or n in self.param_of:
                continue
            if n.op != "call_function" or n.target is aten.detach.default:
                continue
            if n in found or self.params_in(n):
                found.update(n.all_input_nodes)
        return found

    def all_params(self) -> set[str]:
        return {p for names in self.param_of.values() for p in names}

    def consumers(self, node: Node) -> list[Node]:
        return [u for u in node.users if u in self.live and u is not self.output]

    def run(self) -> None:
        for node in self.nodes:
            if node.op == "call_function":
                self._visit(node)

    def _fold_parameters(self) -> None:
        """A function of parameters only (a cast, a weight norm) is one; the rest is data."""
        for node in self.nodes:
            if node.op != "call_function":
                continue
            inputs = node.all_input_nodes
            if node.target is aten.detach.default:
                if any(a in self.data for a in inputs):
                    self.data.add(node)
            elif self._data_in(node) or isinstance(value(node), torch.SymInt):
                self.data.add(node)
            elif params := self.params_in(node):
                self.param_of[node] = params
            elif any(a in self.frozen for a in inputs):
                self.frozen.add(node)

    def _data_in(self, node: Node) -> list[Node]:
        return [
            a
            for a in node.all_input_nodes
            if a in self.data and not isinstance(value(a), torch.SymInt)
        ]

    def params_in(self, node: Node) -> set[str]:
        """The trainable parameters among a node's arguments."""
        found = [self.param_of.get(a, set()) for a in node.all_input_nodes if a not in self.data]
        return set().union(*found)

    def _visit(self, node: Node) -> None:
        if node not in self.data or node not in self.live or node.target is aten.detach.default:
            return
        if not is_float(node) and not isinstance(value(node), (tuple, list)):
            return
        params = self.params_in(node)
        data_in = self._data_in(node)
        opens = self._open_inputs(data_in, node)
        name = op_name(node)
        heavy = self.is_heavy(node)
        if heavy:
            seg = self._heavy(node, params, opens)
        elif params:
            seg = self._light(node, params, opens, name)
        else:
            seg = self._plain(node, opens, name, data_in)
        if seg is None:
            return
        self.seg[node] = seg
        if node in self.interior:
            return
        if isinstance(value(node), torch.Tensor):
            seg.candidates.append(node)
        users = self.consumers(node)
        if node in self.user_outputs and users:
            self._close(seg)
        elif len(users) > 1:
            self._fan_out(node, seg, users)

    def _open_inputs(self, data_in: Iterable[Node], node: Node) -> list[Segment]:
        """The open segments in front of a node; what could not be closed opens one anew."""
        found: list[Segment] = []
        stuck: list[Segment] = []
        for a in data_in:
            seg = self.seg.get(a)
            if seg is None:
                continue
            seg = seg.root()
            if seg.stuck:
                stuck.append(seg)
            elif seg.closed is None and seg not in found:
                found.append(seg)
        if stuck:
            found.append(self._inherit(stuck, node))
        return found

    def _inherit(self, segments: list[Segment], node: Node) -> Segment:
        """A segment that begins at ``node`` and holds the parameters of others, left uncut."""
        params = set().union(*(s.params for s in segments))
        own = set().union(*(s.own for s in segments))
        heavy = any(s.heavy for s in segments)
        starts = [s.first for s in segments if s.first is not None]
        first = min(starts, key=self.order.__getitem__, default=node)
        return Segment(heavy, params, own, first=first)

    def _close_all(self, opens: list[Segment], node: Node) -> Segment | None:
        """Close segments; what could not be closed goes on in one that begins at ``node``."""
        stuck = [seg for seg in opens if not self._close(seg)]
        return self._inherit(stuck, node) if stuck else None

    def _heavy(self, node: Node, params: set[str], opens: list[Segment]) -> Segment | None:
        absorbed: set[str] = set()
        for seg in opens:
            if not (seg.heavy and self._close(seg)):
                absorbed |= seg.params
        if not params | absorbed:
            return None  # frozen weights end a chain and start none
        return Segment(True, params | absorbed, set(params), first=node)

    def _light(
        self, node: Node, params: set[str], opens: list[Segment], name: str
    ) -> Segment | None:
        if not opens:
            return Segment(False, set(params), set(params), first=node)
        if len(opens) > 1 and name not in MERGE:
            more = self._close_all(opens, node)
            if more is not None:
                more.params |= params
                return more
            return Segment(False, set(params), set(params), first=node)
        seg = self._merge(opens)
        seg.params |= params
        seg.candidates.clear()
        return seg

    def _plain(
        self, node: Node, opens: list[Segment], name: str, data_in: list[Node]
    ) -> Segment | None:
        if not opens:
            return None
        if node in self.interior:
            if len(opens) == 1:
                return opens[0]
            seg = self._merge(opens)  # with weights that the fan-out had not seen
            seg.candidates.clear()
            return seg
        if len(opens) == 1:
            values = [a for a in data_in if is_float(a)]
            gate = name in ("mul", "div") and len(values) > 1
            if gate and any(self._foreign(a, opens[0]) for a in values):
                return self._close_all(opens, node)
            return opens[0]
        if name in MERGE:
            seg = self._merge(opens)
            seg.candidates.clear()
            return seg
        return self._close_all(opens, node)

    def _foreign(self, node: Node, seg: Segment) -> bool:
        """A value of another, closed segment (not an input, a mask or a constant)."""
        other = self.seg.get(node)
        return other is not None and other.root() is not seg

    def _merge(self, opens: list[Segment]) -> Segment:
        first, *rest = opens
        for seg in rest:
            seg.merged = first
            first.params |= seg.params
            first.heavy = first.heavy or seg.heavy
            if seg.first is not None and (
                first.first is None or self.order[seg.first] < self.order[first.first]
            ):
                first.first = seg.first
        return first

    def _fan_out(self, node: Node, seg: Segment, users: list[Node]) -> None:
        if not seg.heavy and all(self.is_heavy(u) for u in users):
            return  # a norm that feeds q, k and v belongs to each of them
        region = self._reconverge(node, seg)
        if region is None:
            self._close(seg)
        else:
            self.interior |= region

    def is_heavy(self, node: Node) -> bool:
        weights = [a for a in node.all_input_nodes if a in self.param_of or a in self.frozen]
        if node.target is FUNCTION:  # custom code: a matrix among its arguments is a weight
            return any(is_float(a) and value(a).ndim > 1 for a in weights)
        return op_name(node) in HEAVY and bool(weights)

    def _reconverge(self, start: Node, seg: Segment) -> set[Node] | None:
        """The nodes between a fan-out and the value where all its branches have met again."""
        region = {start}
        heap: list[tuple[int, Node]] = []
        queued: set[Node] = set()

        def push(n: Node) -> None:
            for u in self.consumers(n):
                if u not in queued:
                    queued.add(u)
                    heapq.heappush(heap, (self.order[u], u))

        push(start)
        while heap and len(region) < _REGION_LIMIT:
            _, n = heapq.heappop(heap)
            if self.is_heavy(n):
                return None
            for a in n.all_input_nodes:
                if a in region:
                    continue
                other = self.seg.get(a)
                if other is not None and other.root().closed is None and other.root() is not seg:
                    return None
            region.add(n)
            if n in self.user_outputs:
                return None
            push(n)
            if self._all_inside(region, n) and isinstance(value(n), torch.Tensor):
                return region - {start, n}
        return None

    def _all_inside(self, region: set[Node], last: Node) -> bool:
        return all(u in region for m in region if m is not last for u in self.consumers(m))

    def _close(self, seg: Segment) -> bool:
        """Cut behind a segment; False where none of its values can be cut."""
        seg = seg.root()
        if seg.closed is not None or seg.stuck:
            return not seg.stuck
        found = [c for c in seg.candidates if c in self.folds]
        usable = [c for c in found if self.folds[c].plain] or found
        if not usable:
            seg.stuck = True
            names = ", ".join(sorted(seg.params)) or "no parameter"
            at = source_of(seg.first) if seg.first is not None else ""
            self.stuck.append(names + (f" ({at})" if at else ""))
            return False
        sizes = [math.prod(sample_shape(c, self.folds[c])) for c in usable]
        narrowest = min(sizes)
        seg.closed = max(
            (c for c, s in zip(usable, sizes, strict=True) if s == narrowest),
            key=lambda c: self.order[c],
        )
        self.closed.append(seg)
        return True


def sample_shape(node: Node, fold: Fold) -> tuple[int, ...]:
    """The shape of one sample's part of a value; a symbolic size by the one it was traced with."""
    shape = [size_hint(s) for d, s in enumerate(value(node).shape) if d != fold.dim]
    extra = fold.outer * fold.inner
    return tuple(shape) if extra == 1 else (extra, *shape)
