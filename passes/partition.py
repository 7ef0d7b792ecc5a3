"""Where the cuts go: feedback points by a topological sweep, and the error tap.

In: the captured forward graph. Out: a ``Placement`` (nothing is rewritten here).

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
5. The segment that reaches the error tap unclosed is the head: it gets the true error.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from grapefx.errors import OptionError, PlacementError, nearest
from grapefx.ir import Captured, Layer
from grapefx.passes.batch import Fold, batch_folds, op_name
from grapefx.passes.blocks import blocks, sublayers
from grapefx.passes.functions import FUNCTION
from grapefx.passes.points import select

aten = torch.ops.aten

GRANULARITIES = ("layer", "sublayer", "block")

HEAVY = {
    "linear", "addmm", "mm", "bmm", "baddbmm", "matmul", "einsum", "bilinear", "addmv", "mv",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "convolution", "embedding", "embedding_bag", "_embedding_bag",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell",
}  # fmt: skip
_MERGE = {
    "add", "sub", "rsub", "where", "bmm", "matmul", "baddbmm", "einsum", "maximum", "minimum",
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention", "mm",
}  # fmt: skip
_REGION_LIMIT = 400
# An output of so many entries a position, more than its layer reads, is tapped before that layer.
_WIDE = 1024
_CHANNELS_FIRST = ("conv", "batch_norm", "group_norm", "instance_norm", "pool")
_CHANNELS_LAST = ("linear", "addmm", "layer_norm", "rms_norm", "embedding", "lstm", "gru", "rnn")
_MOVES = {"permute", "transpose", "view", "reshape", "flatten", "unflatten", "_unsafe_view", "t"}


@dataclass(frozen=True)
class CutPoint:
    """A feedback point: the node to cut, and the segment that it closes."""

    node: Node
    layer: Layer


@dataclass(frozen=True)
class Placement:
    """The feedback points in forward order, and the nodes whose true gradient is the error."""

    cuts: tuple[CutPoint, ...]
    taps: tuple[Node, ...]
    head: tuple[str, ...]
    note: str = ""  # what was decided for the user
    refusal: str = ""  # why there is no cut at all


class UncuttableError(PlacementError):
    """No value keeps the batch where a point or the tap belongs: backpropagation needs neither."""


@dataclass(eq=False)
class _Segment:
    heavy: bool
    params: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)
    candidates: list[Node] = field(default_factory=list)
    first: Node | None = None
    closed: Node | None = None
    merged: _Segment | None = None
    stuck: bool = False  # it could not be closed: its parameters went over to what reads it
    name: str = ""  # given by the user's choice

    def root(self) -> _Segment:
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


class _Sweep:
    def __init__(self, cap: Captured, trainable: set[str], batch_size: int) -> None:
        self.cap = cap
        self.folds = batch_folds(cap.gm.graph, cap.batch, batch_size)
        self.nodes = list(cap.gm.graph.nodes)
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.output = self.nodes[-1]
        self.param_of: dict[Node, set[str]] = {}
        self.frozen: set[Node] = set()
        self.data: set[Node] = set()
        self.seg: dict[Node, _Segment] = {}
        self.interior: set[Node] = set()
        self.closed: list[_Segment] = []
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

    @staticmethod
    def ancestors(nodes: Iterable[Node]) -> set[Node]:
        """Everything that leads to one of ``nodes``."""
        seen: set[Node] = set()
        stack = [a for n in nodes for a in n.all_input_nodes]
        while stack:
            n = stack.pop()
            if n not in seen:
                seen.add(n)
                stack.extend(n.all_input_nodes)
        return seen

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
            elif params := self._params_in(node):
                self.param_of[node] = params
            elif any(a in self.frozen for a in inputs):
                self.frozen.add(node)

    def _data_in(self, node: Node) -> list[Node]:
        return [
            a
            for a in node.all_input_nodes
            if a in self.data and not isinstance(value(a), torch.SymInt)
        ]

    def _params_in(self, node: Node) -> set[str]:
        found = [self.param_of.get(a, set()) for a in node.all_input_nodes if a not in self.data]
        return set().union(*found)

    def _visit(self, node: Node) -> None:
        if node not in self.data or node not in self.live or node.target is aten.detach.default:
            return
        if not is_float(node) and not isinstance(value(node), (tuple, list)):
            return
        params = self._params_in(node)
        data_in = self._data_in(node)
        opens = self._open_inputs(data_in, node)
        name = op_name(node)
        heavy = self._is_heavy(node)
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

    def _open_inputs(self, data_in: Iterable[Node], node: Node) -> list[_Segment]:
        """The open segments in front of a node; what could not be closed opens one anew."""
        found: list[_Segment] = []
        stuck: list[_Segment] = []
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

    def _inherit(self, segments: list[_Segment], node: Node) -> _Segment:
        """A segment that begins at ``node`` and holds the parameters of others, left uncut."""
        params = set().union(*(s.params for s in segments))
        own = set().union(*(s.own for s in segments))
        heavy = any(s.heavy for s in segments)
        starts = [s.first for s in segments if s.first is not None]
        first = min(starts, key=self.order.__getitem__, default=node)
        return _Segment(heavy, params, own, first=first)

    def _close_all(self, opens: list[_Segment], node: Node) -> _Segment | None:
        """Close segments; what could not be closed goes on in one that begins at ``node``."""
        stuck = [seg for seg in opens if not self._close(seg)]
        return self._inherit(stuck, node) if stuck else None

    def _heavy(self, node: Node, params: set[str], opens: list[_Segment]) -> _Segment | None:
        absorbed: set[str] = set()
        for seg in opens:
            if not (seg.heavy and self._close(seg)):
                absorbed |= seg.params
        if not params | absorbed:
            return None  # frozen weights end a chain and start none
        return _Segment(True, params | absorbed, set(params), first=node)

    def _light(
        self, node: Node, params: set[str], opens: list[_Segment], name: str
    ) -> _Segment | None:
        if not opens:
            return _Segment(False, set(params), set(params), first=node)
        if len(opens) > 1 and name not in _MERGE:
            more = self._close_all(opens, node)
            if more is not None:
                more.params |= params
                return more
            return _Segment(False, set(params), set(params), first=node)
        seg = self._merge(opens)
        seg.params |= params
        seg.candidates.clear()
        return seg

    def _plain(
        self, node: Node, opens: list[_Segment], name: str, data_in: list[Node]
    ) -> _Segment | None:
        if not opens:
            return None
        if node in self.interior:
            return opens[0] if len(opens) == 1 else self._merge(opens)
        if len(opens) == 1:
            values = [a for a in data_in if is_float(a)]
            gate = name in ("mul", "div") and len(values) > 1
            if gate and any(self._foreign(a, opens[0]) for a in values):
                return self._close_all(opens, node)
            return opens[0]
        if name in _MERGE:
            seg = self._merge(opens)
            seg.candidates.clear()
            return seg
        return self._close_all(opens, node)

    def _foreign(self, node: Node, seg: _Segment) -> bool:
        """A value of another, closed segment (not an input, a mask or a constant)."""
        other = self.seg.get(node)
        return other is not None and other.root() is not seg

    def _merge(self, opens: list[_Segment]) -> _Segment:
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

    def _fan_out(self, node: Node, seg: _Segment, users: list[Node]) -> None:
        if not seg.heavy and all(self._is_heavy(u) for u in users):
            return  # a norm that feeds q, k and v belongs to each of them
        region = self._reconverge(node, seg)
        if region is None:
            self._close(seg)
        else:
            self.interior |= region

    def _is_heavy(self, node: Node) -> bool:
        weights = [a for a in node.all_input_nodes if a in self.param_of or a in self.frozen]
        if node.target is FUNCTION:  # custom code: a matrix among its arguments is a weight
            return any(is_float(a) and value(a).ndim > 1 for a in weights)
        return op_name(node) in HEAVY and bool(weights)

    def _reconverge(self, start: Node, seg: _Segment) -> set[Node] | None:
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
            if self._is_heavy(n):
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

    def _close(self, seg: _Segment) -> bool:
        """Cut behind a segment; False where none of its values can be cut."""
        seg = seg.root()
        if seg.closed is not None or seg.stuck:
            return not seg.stuck
        found = [c for c in seg.candidates if c in self.folds]
        usable = [c for c in found if self.folds[c].plain] or found
        if not usable:
            seg.stuck = True
            names = ", ".join(sorted(seg.params)) or "no parameter"
            at = _source(seg.first) if seg.first is not None else ""
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
    """The shape of one sample's part of a value."""
    shape = [int(s) for d, s in enumerate(value(node).shape) if d != fold.dim]
    extra = fold.outer * fold.inner
    return tuple(shape) if extra == 1 else (extra, *shape)


def place(
    cap: Captured,
    *,
    trainable: set[str],
    granularity: str = "layer",
    batch_size: int,
    points: Any = None,
    error_at: Any = None,
) -> Placement:
    """Choose feedback points and the error tap on a captured graph.

    ``points`` and ``error_at`` are choices of the user (see ``passes.points``); ``error_at`` may
    be "output", for the outputs themselves whatever their width. Raises ``PlacementError`` when
    there is no trainable parameter, no differentiable output with a batch dim, or no feedback point
    at all (a single layer: use ``method="bp"``).
    """
    if granularity not in GRANULARITIES:
        raise OptionError(
            f"unknown granularity {granularity!r}.{nearest(granularity, GRANULARITIES)}"
        )
    sweep = _Sweep(cap, trainable, batch_size)
    if not sweep.param_of:
        raise PlacementError(
            "the model has no trainable parameter on the path to its output; "
            "set requires_grad=True on what should learn"
        )
    sweep.run()
    note = ""
    if error_at is not None and error_at != "output":
        taps = list(select(sweep, "error_at", error_at))
        taps = [t for t in taps if t not in sweep.ancestors(taps)]
    else:
        taps = _taps(sweep)
        if error_at is None:
            taps, note = _before_wide_head(taps, sweep)
    cut_segments = sorted(sweep.closed, key=lambda s: sweep.order[s.closed])  # type: ignore[index]
    if points is not None:
        chosen = select(sweep, "points", points)
        cut_segments = [_Segment(True, closed=n, name=name) for n, name in chosen.items()]
    before_tap = sweep.ancestors(taps)
    cut_segments = [
        s for s in cut_segments if s.closed in before_tap and (s.params or points is not None)
    ]
    if points is None and granularity == "block":
        cut_segments = blocks(cut_segments, sweep, taps)
    elif points is None and granularity == "sublayer":
        cut_segments = sublayers(cut_segments, sweep, taps)
    # the segment in front of the tap may have been closed at the tap itself: that is the head
    cut_segments = [s for s in cut_segments if s.closed not in taps]
    if points is not None or granularity != "layer" or sweep.stuck:
        _absorb(cut_segments, sweep)
        cut_segments = [s for s in cut_segments if s.params]
    cuts = _name_layers(cut_segments, sweep)
    covered = {p for c in cuts for p in c.layer.parameters}
    head = tuple(sorted(sweep.all_params() - covered))
    return Placement(cuts, tuple(taps), head, note, "" if cuts else _refusal(sweep))


def _refusal(sweep: _Sweep) -> str:
    """Why a sweep found no feedback point, where values that cannot be cut are the reason."""
    if not sweep.stuck:
        return ""
    return (
        f"no feedback point can be placed behind {sweep.stuck[0]}: none of its values keeps the "
        "batch as one dimension\n  remedy: pass batch_dim= or reshape the value so that the batch "
        "is a dimension of its own; method='bp' needs no feedback point"
    )


def _before_wide_head(taps: list[Node], sweep: _Sweep) -> tuple[list[Node], str]:
    """The hidden state in front of a wide output layer (a vocabulary), as Launay et al. 2020."""
    if len(taps) != 1:
        return taps, ""
    node = taps[0]
    while not sweep._is_heavy(node):
        data = [a for a in node.all_input_nodes if a in sweep.data and is_float(a)]
        if len(data) != 1 or node in sweep.param_of:
            return taps, ""
        node = data[0]
    if op_name(node) not in ("linear", "addmm", "mm", "matmul"):
        return taps, ""
    data = [a for a in node.all_input_nodes if a in sweep.folds and a in sweep.live]
    data = [a for a in data if a in sweep.data]
    if len(data) != 1 or data[0].op == "placeholder":
        return taps, ""
    wide, narrow = int(value(node).shape[-1]), int(value(data[0]).shape[-1])
    if wide < _WIDE or wide <= narrow or not sweep.ancestors(data) & set(sweep.param_of):
        return taps, ""
    note = (
        f"the error is taken in front of the output layer ({narrow} wide, its output {wide}); "
        "error_at='output' takes it behind"
    )
    return data, note


def _channel(node: Node) -> int | None:
    """The sample's dim that holds channels: first behind a convolution, last behind a linear."""
    seen = node
    for _ in range(64):
        name = op_name(seen) if seen.op == "call_function" else ""
        if any(k in name for k in _CHANNELS_FIRST):
            return 0
        if any(k in name for k in _CHANNELS_LAST):
            return -1
        inputs = seen.all_input_nodes
        data = [a for a in inputs if is_float(a) or isinstance(value(a), (tuple, list))]
        if not data or name in _MOVES:
            return None
        seen = data[0]
    return None


def _absorb(segments: list[_Segment], sweep: _Sweep) -> None:
    """Where segments were dropped, the next ones hold their parameters: all that reach the cut."""
    closing = {s.closed: s for s in segments}
    reach: dict[Node, set[str]] = {}
    for node in sweep.nodes:
        if node in sweep.param_of:
            reach[node] = sweep.param_of[node]
        elif node in sweep.live and node.target is not aten.detach.default:
            found = set().union(*(reach.get(a, set()) for a in node.all_input_nodes))
            if node in closing:
                closing[node].params = found
            else:
                reach[node] = found


def _taps(sweep: _Sweep) -> list[Node]:
    """The last differentiable outputs; for one without a batch dim, the values before it."""
    outputs = list(dict.fromkeys(n for n in sweep.user_outputs if is_float(n) and n in sweep.live))
    outputs = [n for n in outputs if n in sweep.data]
    if not outputs:
        raise PlacementError("the model returns no floating-point tensor that depends on its input")
    inner = sweep.ancestors(outputs)
    last = [n for n in outputs if n not in inner]
    taps = {n: [n] for n in last if n in sweep.folds}
    reduced = [n for n in last if n not in sweep.folds]
    moved = set(reduced)
    while moved:  # a tap of one output may lead to those of another: it moves on
        for n in moved:
            others = [t for m in taps if m is not n for t in taps[m]]
            taps[n] = _before_reduction(n, others, sweep)
        every = sweep.ancestors([t for found in taps.values() for t in found])
        moved = {n for n in reduced if any(t in every for t in taps[n])}
    found = {t for ts in taps.values() for t in ts}
    return sorted(found, key=lambda t: (t not in last, sweep.order[t]))


def _before_reduction(out: Node, others: list[Node], sweep: _Sweep) -> list[Node]:
    """Error taps for an output that is reduced over the batch, or that pairs its samples.

    They are the first values behind the last weights that keep the batch, that together cross
    every path to the output (the logits in front of a loss, the embeddings of two towers) and that
    lead to no other tap: that one's error would come through feedback points.
    """
    path = _from_weights(out, sweep)
    heavies = [n for n in path if sweep._is_heavy(n)]
    tail = path - sweep.ancestors(heavies) - set(heavies)
    start = [n for n in path - tail if any(u in tail for u in n.users)]
    taps = set(start or [n for n in tail if not any(a in tail for a in n.all_input_nodes)])
    taps |= {out} & set(heavies)
    while out not in taps:
        leads = sweep.ancestors([*taps, *others])
        wrong = {t for t in taps if t in leads or t not in sweep.folds or not is_float(t)}
        if not wrong:
            break
        taps = (taps - wrong) | {u for t in wrong for u in t.users if u in tail}
    if not taps or out in taps:
        raise UncuttableError(
            f"no error tap was found in front of the output {out.name!r}, which has no batch "
            f"dimension ({_source(out)}): nothing keeps the batch between the last weights and it, "
            "or all that does leads to other outputs as well\n  remedy: name the value whose "
            "gradient is the error with error_at=, or return what this output is computed from"
        )
    return _joined(sorted(taps, key=sweep.order.__getitem__), tail, sweep)


def _joined(taps: list[Node], tail: set[Node], sweep: _Sweep) -> list[Node]:
    """One value instead of several (the difference of two twins), if it is as wide as any."""

    def width(n: Node) -> int:
        return math.prod(sample_shape(n, sweep.folds[n]))

    behind: set[Node] = set(taps)
    reach = sweep.order[taps[-1]]
    for n in sweep.nodes if len(taps) > 1 else ():
        if n not in tail or not any(a in behind for a in n.all_input_nodes):
            continue
        if n not in sweep.folds:
            break  # from here on samples meet
        behind.add(n)
        open_ends = {u for m in behind - {n} for u in m.users if u in tail} - behind
        if sweep.order[n] > reach and not open_ends:
            return [n] if width(n) >= max(map(width, taps)) else taps
    return taps


def _from_weights(out: Node, sweep: _Sweep) -> set[Node]:
    """The values between trainable parameters and an output, and the output."""
    before = (sweep.ancestors([out]) | {out}) & sweep.data & sweep.live
    found: set[Node] = set()
    for n in sweep.nodes:
        if n not in before or n.op != "call_function" or n.target is aten.detach.default:
            continue
        if any(a in sweep.param_of or a in found for a in n.all_input_nodes):
            found.add(n)
    return found


def _name_layers(segments: list[_Segment], sweep: _Sweep) -> tuple[CutPoint, ...]:
    cuts: list[CutPoint] = []
    names: set[str] = set()
    taken: set[Node] = set()
    for seg in segments:
        node = seg.closed
        assert node is not None
        if node in taken:
            continue
        taken.add(node)
        base = seg.name or _owner(sorted(seg.own or seg.params)[0])
        name, k = base, 1
        while name in names:
            k += 1
            name = f"{base}#{k}"
        names.add(name)
        fold = sweep.folds[node]
        layer = Layer(
            index=len(cuts),
            name=name,
            node=node.name,
            sample_shape=sample_shape(node, fold),
            fold=(fold.dim, fold.outer, fold.inner),
            parameters=tuple(sorted(seg.params)),
            source=_source(node),
            channel=_channel(node),
        )
        cuts.append(CutPoint(node, layer))
    return tuple(cuts)


def _owner(parameter: str) -> str:
    """The module that a parameter belongs to; the parameter itself at the top level."""
    return parameter.rpartition(".")[0] or parameter


def _source(node: Node) -> str:
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    return lines[-2] if len(lines) > 1 else ""
