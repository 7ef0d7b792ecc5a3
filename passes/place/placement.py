"""Where the cuts go: feedback points and error taps.

In: the captured forward graph. Out: a ``Placement`` (nothing is rewritten here).

``sweep.py`` finds the segments and what may close them, ``taps.py`` the error taps; here
the user's choices are applied, and layers named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from grapefx.errors import OptionError, PlacementError, nearest
from grapefx.ir import Captured, Layer
from grapefx.passes.graph.folds import Fold
from grapefx.passes.graph.operators import op_name
from grapefx.passes.graph.order import ancestors
from grapefx.passes.graph.source import source_of
from grapefx.passes.place.blocks import blocks, sublayers
from grapefx.passes.place.points import select
from grapefx.passes.place.sweep import Segment, Sweep, is_float, sample_shape, value
from grapefx.passes.place.taps import error_taps

aten = torch.ops.aten

GRANULARITIES = ("layer", "sublayer", "block")

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
    exact: tuple[str, ...] = ()  # where the part begins that gets its true gradient


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

    ``points`` and ``error_at`` are choices of the user (see ``points.py``); ``error_at`` may
    be "output", for the outputs themselves whatever their width. Raises ``PlacementError`` when
    there is no trainable parameter, no differentiable output with a batch dim, or no feedback point
    at all (a single layer: use ``method="bp"``).
    """
    if granularity not in GRANULARITIES:
        raise OptionError(
            f"unknown granularity {granularity!r}.{nearest(granularity, GRANULARITIES)}"
        )
    sweep = Sweep(cap, trainable, batch_size)
    if not sweep.param_of:
        raise PlacementError(
            "the model has no trainable parameter on the path to its output; "
            "set requires_grad=True on what should learn"
        )
    sweep.run()
    taps, note = error_taps(sweep, error_at)
    cut_segments = sorted(sweep.closed, key=lambda s: sweep.order[s.closed])  # type: ignore[index]
    if points is not None:
        chosen = select(sweep, "points", points)
        cut_segments = [Segment(True, closed=n, name=name) for n, name in chosen.items()]
    before_tap = sweep.ancestors(taps)
    cut_segments = [
        s for s in cut_segments if s.closed in before_tap and (s.params or points is not None)
    ]
    if points is None:
        cut_segments = _thinned(cut_segments, sweep, taps, granularity)
    # the segment in front of the tap may have been closed at the tap itself: that is the head
    cut_segments = [s for s in cut_segments if s.closed not in taps]
    if points is not None or granularity != "layer" or sweep.stuck:
        _absorb(cut_segments, sweep)
        cut_segments = [s for s in cut_segments if s.params]
    cuts = _name_layers(cut_segments, sweep)
    covered = {p for c in cuts for p in c.layer.parameters}
    head = tuple(sorted(sweep.all_params() - covered))
    refusal = "" if cuts else _refusal(sweep, points)
    exact = _exact_from(cuts, sweep, taps)
    return Placement(cuts, tuple(taps), head, note, refusal, exact)


def _thinned(
    segments: list[Segment], sweep: Sweep, taps: list[Node], granularity: str
) -> list[Segment]:
    """The default points of a granularity that have a trainable parameter behind them.

    Between another value and the taps lies no parameter: what is in front of it, the output layer,
    learns from the error itself, whatever the model computes from its value.
    """
    weighty = sweep.before_weights(taps)
    behind = [s for s in segments if s.closed in weighty]
    if granularity == "layer":
        return behind
    if granularity == "block":
        chosen = [s for s in blocks(segments, sweep, taps) if s.closed in weighty]
        if chosen:
            return chosen
    return sublayers(behind, sweep, taps)


def _exact_from(cuts: tuple[CutPoint, ...], sweep: Sweep, taps: list[Node]) -> tuple[str, ...]:
    """Where the exact part begins: the first operators with parameters that lead to no cut.

    Each as its module (or node) with its source line.
    """
    leading = ancestors(c.node for c in cuts)
    within = ancestors(sweep.user_outputs) - leading
    seen: set[Node] = set()
    found: dict[str, None] = {}
    for n in sweep.nodes:
        if n not in within or n not in sweep.live or n not in sweep.data:
            continue
        if any(a in seen for a in n.all_input_nodes):
            seen.add(n)
        elif names := sweep.params_in(n):
            seen.add(n)
            at = source_of(n)
            found[_owner(min(names)) + (f" ({at})" if at else "")] = None
    return tuple(found)


def _refusal(sweep: Sweep, points: Any) -> str:
    """Why there is no feedback point, where the choice or values that cannot be cut are why."""
    if points is not None:
        return (
            "points: each chosen value is the error tap, lies behind it (the gradient is exact "
            "there already) or has no trainable parameter in front of it\n"
            "  remedy: choose earlier values, or a later tap with error_at="
        )
    if not sweep.stuck:
        return ""
    return (
        f"no feedback point can be placed behind {sweep.stuck[0]}: none of its values keeps the "
        "batch as one dimension\n  remedy: pass batch_dim= or reshape the value so that the batch "
        "is a dimension of its own; method='bp' needs no feedback point"
    )


def _channel(node: Node, fold: Fold) -> int | None:
    """The sample's dim that holds channels: first behind a convolution, last behind a linear.

    What shares the batch's dim (the frames of a video) comes in front of them.
    """
    seen = node
    for _ in range(64):
        name = op_name(seen) if seen.op == "call_function" else ""
        if any(k in name for k in _CHANNELS_FIRST):
            return int(fold.outer * fold.inner > 1)
        if any(k in name for k in _CHANNELS_LAST):
            return -1
        inputs = seen.all_input_nodes
        data = [a for a in inputs if is_float(a) or isinstance(value(a), (tuple, list))]
        if not data or name in _MOVES:
            return None
        seen = data[0]
    return None


def _absorb(segments: list[Segment], sweep: Sweep) -> None:
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


def _name_layers(segments: list[Segment], sweep: Sweep) -> tuple[CutPoint, ...]:
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
            source=source_of(node),
            channel=_channel(node, fold),
        )
        cuts.append(CutPoint(node, layer))
    return tuple(cuts)


def _owner(parameter: str) -> str:
    """The module that a parameter belongs to; the parameter itself at the top level."""
    return parameter.rpartition(".")[0] or parameter
