"""Error taps: the values whose true gradient is the error.

In: a sweep (``sweep.py``). Out: the outputs; for an output that is reduced over the batch, the
values in front; for a wide output layer, the value that it reads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from grapefx.errors import PlacementError
from grapefx.passes.graph.operators import LINEAR, op_name
from grapefx.passes.graph.order import ancestors
from grapefx.passes.graph.source import source_of
from grapefx.passes.place.points import select
from grapefx.passes.place.sweep import (
    Sweep,
    UncuttableError,
    is_complex,
    is_float,
    sample_shape,
    value,
)

aten = torch.ops.aten

# An output of so many entries a position, more than its layer reads, is tapped before that layer.
_WIDE = 1024


def error_taps(sweep: Sweep, error_at: Any) -> tuple[list[Node], str]:
    """The taps, and a note where they were moved for the user.

    ``error_at``: None, "output" (the outputs themselves, whatever their width) or the user's choice
    (``points.py``). Raises ``PlacementError`` where the model returns nothing that depends on
    its input, ``UncuttableError`` where nothing in front of a reduced output keeps the batch.
    """
    if error_at is not None and error_at != "output":
        taps = list(select(sweep, "error_at", error_at))
        return [t for t in taps if t not in sweep.ancestors(taps)], ""
    taps = _outer(sweep)
    return (taps, "") if error_at is not None else _before_wide_head(taps, sweep)


def _before_wide_head(taps: list[Node], sweep: Sweep) -> tuple[list[Node], str]:
    """The hidden state in front of a wide output layer (a vocabulary), as Launay et al. 2020."""
    if len(taps) != 1:
        return taps, ""
    node = taps[0]
    while not sweep.is_heavy(node):
        data = [a for a in node.all_input_nodes if a in sweep.data and is_float(a)]
        if len(data) != 1 or node in sweep.param_of:
            return taps, ""
        node = data[0]
    if op_name(node) not in LINEAR:
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


def _outer(sweep: Sweep) -> list[Node]:
    """The last differentiable outputs; for one without a batch dim, the values before it."""
    outputs = list(dict.fromkeys(n for n in sweep.user_outputs if is_float(n) and n in sweep.live))
    outputs = [n for n in outputs if n in sweep.data]
    if not outputs:
        raise PlacementError("the model returns no floating-point tensor that depends on its input")
    if any(map(is_complex, outputs)):
        raise UncuttableError(
            "the model returns a complex tensor, and feedback is real\n"
            "  remedy: return torch.view_as_real(it), or method='bp'"
        )
    trained = sweep.trained()  # h, and not h.detach() behind it; the joint trace refuses none
    outputs = [n for n in outputs if n in trained] or outputs
    inner = sweep.ancestors(outputs)
    last = [n for n in outputs if n not in inner]
    weighty = sweep.before_weights(outputs)
    tails = [n for n in outputs if n in inner and n not in weighty and n in sweep.folds]
    return _last(last, tails, sweep) or _last(last, [], sweep)


def _last(last: list[Node], tails: list[Node], sweep: Sweep) -> list[Node]:
    """The taps for outputs that lead to no other one.

    ``tails``: outputs that lead to one of ``last`` by code without parameters (logits beside their
    softmax). The loss may read them: no tap lies behind one, so that the error holds its gradient
    too. Returns nothing where that cannot be.
    """
    taps = {n: _first(n, tails, sweep) for n in last if n in sweep.folds}
    reduced = [n for n in last if n not in sweep.folds or not taps[n]]
    moved = set(reduced)
    while moved:  # a tap of one output may lead to those of another: it moves on
        for n in moved:
            others = [t for m in taps if m is not n for t in taps[m]]
            try:
                taps[n] = _before_reduction(n, others, sweep, join=not tails)
            except UncuttableError:
                if tails:
                    return []
                raise
        every = sweep.ancestors([t for found in taps.values() for t in found])
        moved = {n for n in reduced if any(t in every for t in taps[n])}
    found = {t for ts in taps.values() for t in ts}
    before = sweep.ancestors(found)
    if tails and (before & found or before & set(tails)):
        return []
    return sorted(found, key=lambda t: (t not in last, sweep.order[t]))


def _first(out: Node, tails: list[Node], sweep: Sweep) -> list[Node]:
    """The first of the outputs that lead to ``out`` by a tail, if they cross every path to it.

    ``out`` itself where there are none; nothing where a path passes them.
    """
    before = sweep.ancestors([out])
    found = [n for n in tails if n in before]
    if not found:
        return [out]
    found = [n for n in found if not sweep.ancestors([n]) & set(found)]
    trained, seen = sweep.trained(), set(found)
    stack = [out]
    while stack:
        n = stack.pop()
        if n in sweep.param_of:
            return []
        if n not in seen and n in trained:
            seen.add(n)
            stack.extend(n.all_input_nodes)
    return found


def _before_reduction(
    out: Node, others: list[Node], sweep: Sweep, *, join: bool = True
) -> list[Node]:
    """Error taps for an output that is reduced over the batch, or that pairs its samples.

    They are the first values behind the last weights that keep the batch, that together cross
    every path to the output (the logits in front of a loss, the embeddings of two towers) and that
    lead to no other tap: that one's error would come through feedback points.
    """
    path = _from_weights(out, sweep)
    heavies = [n for n in path if sweep.is_heavy(n)]
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
            f"dimension ({source_of(out)}): nothing keeps the batch between the last weights and "
            "it, or all that does leads to other outputs as well\n  remedy: name the value whose "
            "gradient is the error with error_at=, or return what this output is computed from"
        )
    ordered = sorted(taps, key=sweep.order.__getitem__)
    return _joined(ordered, tail, sweep) if join else ordered


def _joined(taps: list[Node], tail: set[Node], sweep: Sweep) -> list[Node]:
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


def _from_weights(out: Node, sweep: Sweep) -> set[Node]:
    """The values between trainable parameters and an output, and the output."""
    before = ancestors([out]) & sweep.data & sweep.live
    found: set[Node] = set()
    for n in sweep.nodes:
        if n not in before or n.op != "call_function" or n.target is aten.detach.default:
            continue
        if any(a in sweep.param_of or a in found for a in n.all_input_nodes):
            found.add(n)
    return found
