"""Feedback pass: what a method says takes the place of every ``cut_backward``.

In: a joint graph (with or without tangents). Out: the whole step as one graph, markers erased, in
one of three kinds:

* ``update``: the cotangent at each cut comes from the error alone; the backward chain is dead code.
* ``align``: the same, and the feedback maps learn from the tangents.
* ``calibration``: the true gradient passes every cut; feedback maps are refitted by ridge regression
  from the pairs (e, delta_l), and the feedback gradient is computed beside it for its cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from grapefx.ir import Slot, StepGraph
from grapefx.maps import ErrorRows, FeedbackMap
from grapefx.methods.base import Method, Rows, State
from grapefx.passes import markers
from grapefx.passes.emit import Emitter
from grapefx.passes.order import dead_code, topological
from grapefx.passes.restride import differs, restride
from grapefx.passes.tangent import Stream

aten = torch.ops.aten


@dataclass(frozen=True)
class Feedback:
    """What the pass needs to know beside the graph."""

    method: Method
    maps: tuple[FeedbackMap, ...]
    error_rows: dict[str, ErrorRows]
    states: tuple[dict[str, Any], ...]  # fake tensors of each layer's state, by name
    ridge: float = 1e-2
    refit: bool = True
    true_gradients: bool = True


class _Builder:
    def __init__(self, step: StepGraph, feedback: Feedback, streams: Sequence[Stream]) -> None:
        self.step = step.copy()
        self.graph = self.step.gm.graph
        self.fb = feedback
        self.streams = self._renamed(step, streams)
        self.em = Emitter(self.graph)
        self.output = self.step.output_node()
        self.slots: list[Slot] = []
        self.state_nodes: list[dict[str, Node]] = []
        self.rows_cache: dict[str, Node] = {}
        self.metrics: dict[str, dict[int, Node]] = {}
        self.new_states: list[dict[str, Node]] = []
        self.finite: Node | None = None
        self.moved: list[Node] = []  # values that took a place with other strides

    def _renamed(self, step: StepGraph, streams: Sequence[Stream]) -> list[Stream]:
        names = {n.name: n for n in self.graph.nodes}
        return [
            Stream(
                {k: names[n.name] for k, n in s.noise.items()},
                {k: names[n.name] for k, n in s.taps.items()},
            )
            for s in streams
        ]

    def emit(self, fn: Any, *args: Any, phase: str, layer: str | None = None) -> Any:
        with self.em.before(self.output, grapefx_phase=phase, grapefx_layer=layer):
            return self.em.trace(fn, *args)

    # inputs

    def add_states(self) -> None:
        anchor = self.step.placeholders()[-1]
        mode = self.em.mode
        for m, state in zip(self.fb.maps, self.fb.states, strict=True):
            nodes = {}
            for name, like in state.items():
                with self.graph.inserting_after(anchor):
                    anchor = self.graph.placeholder(f"feedback_{m.layer.index}_{name}")
                with mode:
                    anchor.meta["val"] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
                anchor.meta["grapefx_role"] = "feedback"
                anchor.meta["grapefx_layer"] = m.layer.name
                nodes[name] = anchor
                self.slots.append(Slot("feedback", f"{m.layer.name}/{name}"))
            self.state_nodes.append(nodes)

    # rows

    def error(self, kind: str) -> Node:
        if kind not in self.rows_cache:
            taps = markers.find(self.graph, markers.TAP_BACKWARD)
            forward = markers.find(self.graph, markers.TAP)
            nodes = []
            for i in sorted(forward):
                if i in taps:
                    nodes.append(taps[i])
                else:  # a tap whose output the loss does not use
                    with self.em.before(self.output, grapefx_phase="error"):
                        nodes.append(self.em.call(aten.zeros_like.default, forward[i]))
            rows = self.fb.error_rows[kind]
            self.rows_cache[kind] = self.emit(lambda ts: rows(ts), nodes, phase="error")
        return self.rows_cache[kind]

    def tangent_rows(self, kind: str, stream: Stream) -> Node:
        key = f"{kind}/{id(stream)}"
        if key not in self.rows_cache:
            forward = markers.find(self.graph, markers.TAP)
            nodes = []
            for i in sorted(forward):
                node = stream.taps.get(i)
                if node is None:
                    with self.em.before(self.output, grapefx_phase="tangent"):
                        like = next(iter(stream.taps.values()))
                        node = self._zero_tangent(forward[i], like)
                nodes.append(node)
            rows = self.fb.error_rows[kind]
            self.rows_cache[key] = self.emit(lambda ts: rows(ts), nodes, phase="tangent")
        return self.rows_cache[key]

    def _zero_tangent(self, tap: Node, like: Node) -> Node:
        rows = self.em.call(aten.sym_size.int, like, 0)
        shape = [rows, *[int(s) for s in tap.meta["val"].shape[1:]]]
        return self.em.call(aten.new_zeros.default, like, shape)

    # learning

    def estimates(self) -> list[Node | None]:
        out: list[Node | None] = []
        for m in self.fb.maps:
            pairs = [
                (self.tangent_rows(m.kind, s), s.noise[m.layer.index])
                for s in self.streams
                if m.layer.index in s.noise
            ]
            if not pairs:
                out.append(None)
                continue

            def estimate(ds: list[Tensor], vs: list[Tensor], m: FeedbackMap = m) -> Tensor:
                total: Any = None
                for d, v in zip(ds, vs, strict=True):
                    rows = m.value_rows(v)
                    j = d.to(rows.dtype).t() @ rows
                    total = j if total is None else total + j
                dtype = torch.promote_types(total.dtype, torch.float32)
                return total.to(dtype) / (ds[0].shape[0] * len(ds))

            ds, vs = [d for d, _ in pairs], [v for _, v in pairs]
            out.append(self.emit(estimate, ds, vs, phase="alignment", layer=m.layer.name))
        return out

    def learn(self) -> None:
        """New states, kept where everything is finite."""
        estimates = self.estimates() if self.streams else [None] * len(self.fb.maps)
        self.finite = self._all_finite()
        for m, state, j in zip(self.fb.maps, self.state_nodes, estimates, strict=True):
            needs_value = "value" in self.fb.method.learns_from
            value = self._value(m) if needs_value else None
            error = self.error(m.kind) if "error" in self.fb.method.learns_from else None

            def step(state: State, j: Any, e: Any, h: Any, ok: Tensor, m: FeedbackMap = m) -> State:
                new = self.fb.method.learn(
                    Rows(
                        state,
                        estimate=None if j is None else j.to(state["B"].dtype),
                        error=e,
                        value=None if h is None else m.value_rows(h),
                    )
                )
                return {k: torch.where(ok, new[k], state[k]) for k in state}

            new = self.emit(
                step, state, j, error, value, self.finite, phase="alignment", layer=m.layer.name
            )
            self.new_states.append(new)
            if j is not None:
                self._metric("cos_jacobian", m, cosine, state["B"], j)

    def _value(self, m: FeedbackMap) -> Node:
        return markers.find(self.graph, markers.CUT)[m.layer.index]

    def _all_finite(self) -> Node:
        parts = [self.error(m.kind) for m in self.fb.maps]
        parts += [self.tangent_rows(m.kind, s) for m in self.fb.maps for s in self.streams]
        unique = list(dict.fromkeys(parts))

        def finite(xs: list[Tensor]) -> Tensor:
            # a sum is finite only if every term is; overflow of a finite sum skips a step, no more
            total = sum(x.float().abs().sum() for x in xs)
            return torch.isfinite(total)  # type: ignore[arg-type]

        return self.emit(finite, unique, phase="error")

    def _metric(self, name: str, m: FeedbackMap, fn: Any, *args: Any) -> None:
        node = self.emit(fn, *args, phase="metric", layer=m.layer.name)
        self.metrics.setdefault(name, {})[m.layer.index] = node

    # projection

    def cotangents(self, states: Sequence[dict[str, Node]]) -> dict[int, Node]:
        """What the method puts at each cut."""
        reads = self.fb.method.reads
        out = {}
        backward = markers.find(self.graph, markers.CUT_BACKWARD)
        for m, state in zip(self.fb.maps, states, strict=True):
            node = backward.get(m.layer.index)
            if node is None:
                continue
            streams = [s for s in self.streams if m.layer.index in s.noise]
            stream = streams[0] if "tangent" in reads and streams else None

            def project(
                state: State, e: Any, incoming: Any, v: Any, d: Any, like: Tensor,
                m: FeedbackMap = m,
            ) -> Tensor:  # fmt: skip
                dtype = next(iter(state.values())).dtype if state else like.dtype
                rows = self.fb.method.cotangent(
                    Rows(
                        state,
                        error=None if e is None else e.to(dtype),
                        incoming=None if incoming is None else m.value_rows(incoming),
                        noise=None if v is None else m.value_rows(v),
                        tangent=d,
                    )
                )
                return m.from_rows(rows, like)

            out[m.layer.index] = self.emit(
                project,
                state,
                self.error(m.kind) if "error" in reads else None,
                node.args[0] if "next_delta" in reads else None,
                stream.noise[m.layer.index] if stream else None,
                self.tangent_rows(m.kind, stream) if stream else None,
                self._value(m),
                phase="projection",
                layer=m.layer.name,
            )
        return out

    def refit(self) -> None:
        """B_l = (e^T e + ridge)^-1 e^T delta_l, from the true gradient (DESIGN 6.2)."""
        backward = markers.find(self.graph, markers.CUT_BACKWARD)
        inverse: dict[str, Node] = {}
        ridge = self.fb.ridge

        def gram(e: Tensor) -> Tensor:
            e = e.to(torch.promote_types(e.dtype, torch.float32))
            # rows are scaled by 1/N and by any loss scale: normalise before the solve
            e = e / e.abs().amax().clamp_min(1e-30)
            g = e.t() @ e
            c = g.shape[0]
            g = g + torch.eye(c, dtype=g.dtype, device=g.device) * (ridge * g.trace() / c + 1e-30)
            return torch.linalg.solve(g, e.t())

        def fit(solved: Tensor, e: Tensor, delta: Tensor, state: State, m: Any) -> State:
            top = e.to(solved.dtype).abs().amax().clamp_min(1e-30)
            b = solved @ (m.value_rows(delta).to(solved.dtype) / top)
            new = self.fb.method.refit(state, b.to(state["B"].dtype))
            ok = torch.isfinite(b.abs().sum())
            return {k: torch.where(ok, new[k], state[k]) for k in state}

        for m, state in zip(self.fb.maps, self.state_nodes, strict=True):
            node = backward.get(m.layer.index)
            if node is None:
                self.new_states.append(state)
                continue
            e = self.error(m.kind)
            if m.kind not in inverse:
                inverse[m.kind] = self.emit(gram, e, phase="refit")
            new = self.emit(
                lambda s, e, d, st, m=m: fit(s, e, d, st, m),
                inverse[m.kind], e, node.args[0], state,
                phase="refit", layer=m.layer.name,
            )  # fmt: skip
            self.new_states.append(new)
        self.finite = self._all_finite() if self.fb.maps else None

    # output

    def finish(self) -> StepGraph:
        results = list(self.output.args[0])  # type: ignore[arg-type]
        outputs = list(self.step.outputs)
        if self.new_states:
            for m, new in zip(self.fb.maps, self.new_states, strict=True):
                for name, node in new.items():
                    results.append(node)
                    outputs.append(Slot("feedback", f"{m.layer.name}/{name}"))
        for name, found in self.metrics.items():
            nan = float("nan")
            values = [found.get(m.layer.index) for m in self.fb.maps]

            def stack(vs: list[Any], nan: float = nan) -> Tensor:
                some = next(v for v in vs if v is not None)
                return torch.stack(
                    [v.float() if v is not None else some.new_full((), nan).float() for v in vs]
                )

            results.append(self.emit(stack, values, phase="metric"))
            outputs.append(Slot("metric", name))
        if self.finite is not None:
            results.append(self.finite)
            outputs.append(Slot("metric", "finite"))
        self.output.args = (tuple(results),)
        self.moved += markers.erase(self.graph)
        topological(self.graph)
        dead_code(self.graph)
        restride(self.graph, self.moved)
        return replace(
            self.step,
            gm=GraphModule(self.step.gm, self.graph),
            inputs=self.step.inputs + tuple(self.slots),
            outputs=tuple(outputs),
        )


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius cosine (001 eq. 3); 0 where one of the two is 0."""
    a, b = a.float(), b.float()
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt().clamp_min(1e-30)


def build_update(
    step: StepGraph, feedback: Feedback, streams: Sequence[Stream] = ()
) -> StepGraph:
    """A training step of the method. With ``streams`` (from the tangent pass) it also learns."""
    b = _Builder(step, feedback, streams)
    if feedback.method.feedback:
        b.add_states()
    else:
        b.state_nodes = [{} for _ in feedback.maps]
    learns = feedback.method.learns_from
    if learns and (streams or "tangent" not in learns):
        b.learn()
    before = b.new_states if b.new_states and feedback.method.project_after_learn else b.state_nodes
    replace_cuts(b, b.cotangents(before))
    return b.finish()


def build_calibration(step: StepGraph, feedback: Feedback) -> StepGraph:
    """A calibration step: true gradients, refitted maps, and the cosine of what the method gives."""
    b = _Builder(step, feedback, ())
    method = feedback.method
    fitted = method.feedback and method.refits and feedback.refit
    compare = method.feedback and not method.needs_tangents() and not method.sequential
    if method.feedback and (fitted or compare or not feedback.true_gradients):
        b.add_states()
        if fitted:
            b.refit()
    if compare and b.state_nodes:
        old = _feedback_gradients(b, b.cotangents(b.state_nodes))
        _compare(b, old)
    backward = markers.find(b.graph, markers.CUT_BACKWARD)
    if not feedback.true_gradients and compare:
        # this batch only re-fits the maps: its update is the method's own, with the new maps
        replace_cuts(b, b.cotangents(b.new_states or b.state_nodes))
    else:
        replace_cuts(b, {i: n.args[0] for i, n in backward.items()})  # type: ignore[misc]
    return b.finish()


def replace_cuts(b: _Builder, cotangents: dict[int, Node]) -> None:
    """Put the cotangents in place of the ``cut_backward`` nodes."""
    for index, node in markers.find(b.graph, markers.CUT_BACKWARD).items():
        new = cotangents.get(index)
        assert isinstance(new, Node)
        if differs(node, new):
            b.moved.append(new)
        node.replace_all_uses_with(new)
        b.graph.erase_node(node)


def _feedback_gradients(b: _Builder, cotangents: dict[int, Node]) -> dict[str, Node]:
    """A second copy of what lies behind the cuts, fed with the method's cotangents."""
    twin: dict[Node, Node] = {}
    for index, node in markers.find(b.graph, markers.CUT_BACKWARD).items():
        twin[node] = cotangents[index]
        if differs(node, twin[node]):
            b.moved.append(twin[node])
    for node in list(b.graph.nodes):
        if node.op != "call_function" or node in twin:
            continue
        if node.target is markers.CUT_BACKWARD or not any(a in twin for a in node.all_input_nodes):
            continue
        if node.meta.get("grapefx_phase") in ("refit", "metric"):
            continue
        with b.graph.inserting_before(b.output):
            new = b.graph.node_copy(node, lambda a: twin.get(a, a))
        new.meta = {**node.meta, "grapefx_phase": "metric"}
        twin[node] = new
    return {
        s.name: twin.get(n, n)
        for s, n in b.step.produced("gradient")
        if isinstance(n, Node)
    }


def _compare(b: _Builder, twins: dict[str, Node]) -> None:
    true = {s.name: n for s, n in b.step.produced("gradient") if isinstance(n, Node)}
    for m in b.fb.maps:
        names = [p for p in m.layer.parameters if p in true and p in twins]
        if not names:
            continue

        def cos(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
            xs, ys = [x.float() for x in xs], [y.float() for y in ys]
            dot = sum((x * y).sum() for x, y in zip(xs, ys, strict=True))
            size = sum((x * x).sum() for x in xs) * sum((y * y).sum() for y in ys)
            return dot / size.sqrt().clamp_min(1e-30)  # type: ignore[union-attr]

        b._metric("cos_gradient", m, cos, [true[p] for p in names], [twins[p] for p in names])
