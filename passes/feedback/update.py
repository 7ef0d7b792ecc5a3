"""Feedback pass: what a method says takes the place of every ``cut_backward``.

In: a joint graph (with or without tangents). Out: the whole step as one graph, markers erased.
Without tangents the cotangent at each cut comes from the error alone and the backward chain is
dead code (kind ``update``); with them the feedback maps learn as well (kind ``align``). Calibration
steps are in ``passes.calibration``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.errors import GrapefxError, MethodError
from grapefx.ir import Phase, Slot, StepGraph
from grapefx.maps import ErrorRows, FeedbackMap
from grapefx.maps.seeded import uniform
from grapefx.methods.base import Method, Rows, State
from grapefx.passes.differentiate.tangent import Stream, streams_of
from grapefx.passes.feedback.exact_rows import Chain, ExactRows
from grapefx.passes.feedback.mean_field import MeanChain, MeanField, map_of
from grapefx.passes.feedback.normal_equations import MEMORY, without_memory
from grapefx.passes.feedback.radial import bias_of, corrected, radial_error
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.edit import Edit

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
    radial: frozenset[int] = frozenset()  # points whose cotangent is corrected along its value
    keep: float = 0.0  # of the normal equations of earlier calibrations, where states have them
    exact: ExactRows | None = None  # which samples get their true gradient
    mean_field: MeanField | None = None  # how maps come from mean derivatives


class Builder:
    """One step graph in the making: what the method sees as rows, and what it returns."""

    def __init__(self, step: StepGraph, feedback: Feedback) -> None:
        self.edit = Edit(step)
        self.step = self.edit.step
        self.graph = self.edit.graph
        self.em = self.edit.emitter
        self.output = self.edit.output
        self.fb = feedback
        self.streams = streams_of(self.step)
        self.parameters = {s.name: n for s, n in self.step.select("parameter")}
        self.state_nodes: list[dict[str, Node]] = []
        self.rows_cache: dict[str, Node] = {}
        self.metrics: dict[str, dict[int, Node]] = {}
        self.new_states: list[dict[str, Node]] = []
        self.finite: Node | None = None

    def emit(self, fn: Any, *args: Any, phase: Phase, layer: str | None = None) -> Any:
        with self.em.before(self.output, phase=phase, layer=layer):
            return self.em.trace(fn, *args)

    # inputs

    def add_states(self) -> None:
        for m, state in zip(self.fb.maps, self.fb.states, strict=True):
            own = m.layer.name
            self.state_nodes.append(
                {
                    name: self.edit.add_input(
                        f"feedback_{m.layer.index}_{name}",
                        Slot("feedback", f"{own}/{name}"),
                        like,
                        layer=own,
                    )
                    for name, like in state.items()
                }
                if m.seed is None
                else self._from_seed(m)
            )

    def _from_seed(self, m: FeedbackMap) -> dict[str, Node]:
        method = self.fb.method

        def make(e: Tensor, m: FeedbackMap = m) -> State:
            assert m.seed is not None
            dtype = torch.promote_types(e.dtype, torch.float32)
            return method.from_uniform(uniform(m.shape, m.seed, e.device, dtype))

        made: dict[str, Node] = self.emit(
            make, self.error(m.rows), phase="projection", layer=m.layer.name
        )
        return made

    # rows

    def error(self, kind: str) -> Node:
        if kind not in self.rows_cache:
            rows = self.fb.error_rows[kind]
            self.rows_cache[kind] = self.emit(lambda ts: rows(ts), self._errors(), phase="error")
        return self.rows_cache[kind]

    def _errors(self) -> list[Node]:
        """e at each tap, in order."""
        taps = markers.find(self.graph, markers.TAP_BACKWARD)
        forward = markers.find(self.graph, markers.TAP)
        nodes = []
        for i in sorted(forward):
            if i in taps:
                nodes.append(taps[i])
            else:  # a tap whose output the loss does not use
                with self.em.before(self.output, phase="error"):
                    nodes.append(self.em.call(aten.zeros_like.default, forward[i]))
        return nodes

    def radial(self) -> Node:
        """What the true gradient's inner product with its value is, for each sample."""
        if "radial" not in self.rows_cache:
            forward = markers.find(self.graph, markers.TAP)
            values = [forward[i] for i in sorted(forward)]
            folds = list(next(iter(self.fb.error_rows.values())).folds)
            biases = [bias_of(tap) for tap in values]
            self.rows_cache["radial"] = self.emit(
                radial_error, self._errors(), values, biases, folds, phase="error"
            )
        return self.rows_cache["radial"]

    def tangent_rows(self, kind: str, stream: Stream) -> Node:
        key = f"{kind}/{id(stream)}"
        if key not in self.rows_cache:
            forward = markers.find(self.graph, markers.TAP)
            nodes = []
            for i in sorted(forward):
                node = stream.taps.get(i)
                if node is None:
                    with self.em.before(self.output, phase="tangent"):
                        like = next(iter(stream.taps.values()))
                        node = self._zero_tangent(forward[i], like)
                nodes.append(node)
            rows = self.fb.error_rows[kind]
            self.rows_cache[key] = self.emit(lambda ts: rows(ts), nodes, phase="tangent")
        return self.rows_cache[key]

    def target(self, kind: str) -> Node:
        """Class targets, one-hot in the shape of the output, as rows."""
        key = f"target/{kind}"
        if key not in self.rows_cache:
            tap = self._only_tap()
            if "target" not in self.rows_cache:
                self.rows_cache["target"] = self.edit.add_input(
                    "target", Slot("target", "0"), tap.meta["val"]
                )
            rows = self.fb.error_rows[kind]
            node = self.rows_cache["target"]
            self.rows_cache[key] = self.emit(lambda t: rows([t]), node, phase="error")
        return self.rows_cache[key]

    def outputs(self, kind: str) -> Node:
        """The value at the error tap, as rows."""
        key = f"output/{kind}"
        if key not in self.rows_cache:
            rows = self.fb.error_rows[kind]
            forward = markers.find(self.graph, markers.TAP)
            taps = [forward[i] for i in sorted(forward)]
            self.rows_cache[key] = self.emit(lambda ts: rows(ts), taps, phase="error")
        return self.rows_cache[key]

    def _only_tap(self) -> Node:
        taps = markers.find(self.graph, markers.TAP)
        if len(taps) != 1:
            raise MethodError(
                f"method {self.fb.method.name!r} reads class targets, which belong to one output; "
                f"this model has {len(taps)} outputs with a gradient\n"
                "  remedy: return one tensor of logits, or use a method that reads the error (dfa)"
            )
        return taps[0]

    def read(self, m: FeedbackMap, reads: frozenset[str]) -> dict[str, Node]:
        """The nodes of what is read at a point, noise and tangents aside, by field of ``Rows``."""
        found = {}
        if "error" in reads:
            found["error"] = self.error(m.rows)
        if "value" in reads:
            found["value"] = self._value(m)
        if "target" in reads:
            found["target"] = self.target(m.rows)
        if "output" in reads:
            found["output"] = self.outputs(m.rows)
        return found

    def pairs(self, m: FeedbackMap) -> list[tuple[Node, Node | None]]:
        """(noise, tangent rows) of each stream that holds the layer; no tangent in a quiet one."""
        return [
            (s.noise[m.layer.index], self.tangent_rows(m.rows, s) if s.taps else None)
            for s in self.streams
            if m.layer.index in s.noise
        ]

    def _zero_tangent(self, tap: Node, like: Node) -> Node:
        rows = self.em.call(aten.sym_size.int, like, 0)
        shape = [rows, *[int(s) for s in tap.meta["val"].shape[1:]]]
        return self.em.call(aten.new_zeros.default, like, shape)

    # learning

    def estimates(self) -> list[Node | None]:
        out: list[Node | None] = []
        for m in self.fb.maps:
            pairs = [(d, v) for v, d in self.pairs(m) if d is not None]
            if not pairs:
                out.append(None)
                continue

            def estimate(ds: list[Tensor], vs: list[Tensor], m: FeedbackMap = m) -> Tensor:
                total: Any = None
                for d, v in zip(ds, vs, strict=True):
                    rows = m.value_rows(v)
                    j = m.outer(d.to(rows.dtype), rows)
                    total = j if total is None else total + j
                dtype = torch.promote_types(total.dtype, torch.float32)
                mean: Tensor = total.to(dtype) / (ds[0].shape[0] * len(ds))
                return mean

            ds, vs = [d for d, _ in pairs], [v for _, v in pairs]
            made = self.emit(estimate, ds, vs, phase="alignment", layer=m.layer.name)
            made.meta[meta.REDUCE] = "mean"
            out.append(made)
        return out

    def learn(self) -> None:
        """New states, kept where everything is finite."""
        reads = self.fb.method.learns_from
        aligns = self.fb.method.aligns()
        estimates = self.estimates() if aligns else [None] * len(self.fb.maps)
        self.finite = self.all_finite()
        for m, state, j in zip(self.fb.maps, self.state_nodes, estimates, strict=True):
            own = self.pairs(m) if self.fb.method.per_sample else []
            samples = [(v, d) for v, d in own if d is not None]

            def step(
                state: State, j: Any, found: Any, samples: Any, ok: Tensor, m: FeedbackMap = m
            ) -> State:
                kept = {k: t for k, t in state.items() if k in MEMORY}
                state = without_memory(state)
                rows = _rows(m, state, found)
                if j is not None:
                    rows = replace(rows, estimate=j.to(next(iter(state.values())).dtype))
                if samples:
                    vs, ds = [m.value_rows(v) for v, _ in samples], [d for _, d in samples]
                    rows = replace(rows, noise=torch.cat(vs), tangent=torch.cat(ds))
                with authored(self.fb.method, "learn", m):
                    new = m.learned(self.fb.method.learn, rows)
                    shapes = {k: tuple(t.shape) for k, t in state.items()}
                    if {k: tuple(t.shape) for k, t in new.items()} != shapes:
                        raise TypeError(f"it has to return a state of {shapes}")
                return {**{k: torch.where(ok, new[k], state[k]) for k in state}, **kept}

            new = self.emit(
                step, state, j, self.read(m, reads), samples, self.finite,
                phase="alignment", layer=m.layer.name,
            )  # fmt: skip
            self.new_states.append(new)
            if j is not None and "B" in state:
                self.metric("cos_jacobian", m, cosine, state["B"], j)

    def average(self, start: bool) -> None:
        """Maps from the mean field; ``start``: from the means of this batch."""
        mean_field, rows = self.fb.mean_field, self.fb.error_rows[self.fb.maps[0].rows]
        assert mean_field is not None
        dtype = next(iter(self.fb.states[0].values())).dtype
        chain = MeanChain(self.edit, mean_field, rows, start, dtype)
        method = self.fb.method
        for m, state in zip(self.fb.maps, self.state_nodes, strict=True):

            def made(state: State, found: Any, m: FeedbackMap = m) -> State:
                whole = map_of(m, found, state["B"])
                parts = [whole[:, m.columns(g)] for g in range(m.groups)]
                return {**state, **refitted(method, m, parts, without_memory(state))}

            found = chain.rows.get(m.layer.index)
            new = self.emit(made, state, found, phase="mean_field", layer=m.layer.name)
            self.new_states.append(new)

    def _value(self, m: FeedbackMap) -> Node:
        return markers.find(self.graph, markers.CUT)[m.layer.index]

    def all_finite(self) -> Node:
        parts = [self.error(m.rows) for m in self.fb.maps]
        parts += [
            self.tangent_rows(m.rows, s) for m in self.fb.maps for s in self.streams if s.taps
        ]
        unique = list(dict.fromkeys(parts))

        def finite(xs: list[Tensor]) -> Tensor:
            # a sum is finite only if every term is; overflow of a finite sum skips a step, no more
            total = sum(x.float().abs().sum() for x in xs)
            return torch.isfinite(total)  # type: ignore[arg-type]

        made: Node = self.emit(finite, unique, phase="error")
        made.meta[meta.REDUCE] = "all"
        return made

    def metric(self, name: str, m: FeedbackMap, fn: Any, *args: Any) -> None:
        node = self.emit(fn, *args, phase="metric", layer=m.layer.name)
        self.metrics.setdefault(name, {})[m.layer.index] = node

    # projection

    @functools.cached_property
    def chain(self) -> Chain | None:
        """The backward chain of a part of the batch, where the option asks for it."""
        return None if self.fb.exact is None else Chain(self.edit, self.fb.exact)

    def cotangents(self, states: Sequence[dict[str, Node]]) -> dict[int, Node]:
        """What the method puts at each cut; its mean where the layer is in several streams."""
        reads = self.fb.method.reads
        out = {}
        backward = markers.find(self.graph, markers.CUT_BACKWARD)
        for m, state in zip(self.fb.maps, states, strict=True):
            node = backward.get(m.layer.index)
            if node is None:
                continue

            def project(
                state: State, incoming: Any, found: Any, pairs: Any, like: Tensor,
                m: FeedbackMap = m,
            ) -> Tensor:  # fmt: skip
                state = without_memory(state)
                dtype = next(iter(state.values())).dtype if state else like.dtype
                rows = _rows(m, state, found, dtype)
                if incoming is not None:
                    rows = replace(rows, incoming=m.value_rows(incoming))
                with authored(self.fb.method, "cotangent", m):
                    made = [
                        m.cotangent(
                            self.fb.method.cotangent,
                            replace(
                                rows,
                                noise=m.value_rows(v).to(dtype),
                                tangent=None if d is None else d.to(dtype),
                            ),
                        )
                        for v, d in pairs
                    ] or [m.cotangent(self.fb.method.cotangent, rows)]
                total = made[0]
                for more in made[1:]:
                    total = total + more
                return m.from_rows(total / len(made) if len(made) > 1 else total, like)

            out[m.layer.index] = self.emit(
                project,
                state,
                node.args[0] if "next_delta" in reads else None,
                self.read(m, reads),
                self.pairs(m) if {"tangent", "noise"} & reads else [],
                self._value(m),
                phase="projection",
                layer=m.layer.name,
            )
            if m.layer.index in self.fb.radial:
                out[m.layer.index] = self.emit(
                    corrected,
                    out[m.layer.index],
                    self._value(m),
                    self.radial(),
                    m.layer.fold,
                    phase="projection",
                    layer=m.layer.name,
                )
            if self.chain is not None:
                out[m.layer.index] = self.chain.corrected(
                    m.layer.index, out[m.layer.index], m.layer.fold
                )
        return out

    def decay_weights(self) -> None:
        """Add the method's weight decay to the gradients of the weights behind feedback points."""
        decay = self.fb.method.weight_decay
        if not decay:
            return
        layer_of = {p: m.layer.name for m in self.fb.maps for p in m.layer.parameters}
        weights = self.parameters
        results = self.edit.results
        for i, slot in enumerate(self.step.outputs):
            own, w = layer_of.get(slot.name), weights.get(slot.name)
            g = results[i]
            if slot.role != "gradient" or own is None or w is None or not isinstance(g, Node):
                continue
            if w.meta["val"].ndim >= 2:
                results[i] = self.emit(
                    lambda g, w: g + decay * w, g, w, phase="weight_grad", layer=own
                )
        self.edit.set_results(results)

    # output

    def finish(self) -> StepGraph:
        for m, new in zip(self.fb.maps, self.new_states, strict=self.new_states != []):
            for name, node in new.items():
                self.edit.add_output(Slot("feedback", f"{m.layer.name}/{name}"), node)
        for name, found in self.metrics.items():
            nan = float("nan")
            values = [found.get(m.layer.index) for m in self.fb.maps]

            def stack(vs: list[Any], nan: float = nan) -> Tensor:
                some = next(v for v in vs if v is not None)
                return torch.stack(
                    [v.float() if v is not None else some.new_full((), nan).float() for v in vs]
                )

            self.edit.add_output(Slot("metric", name), self.emit(stack, values, phase="metric"))
        if self.finite is not None:
            self.edit.add_output(Slot("metric", "finite"), self.finite)
        return self.edit.finish()


def _rows(
    m: FeedbackMap, state: State, found: dict[str, Tensor], dtype: torch.dtype | None = None
) -> Rows:
    """What a method reads at a point; the error and the like in ``dtype`` if it is given."""
    values = {k: m.value_rows(t) if k == "value" else t for k, t in found.items()}
    if dtype is not None:
        values = {k: t.to(dtype) for k, t in values.items()}
    return Rows(state, tokens=m.tokens, classes=m.classes, **values)


@contextlib.contextmanager
def authored(method: Method, part: str, m: FeedbackMap) -> Iterator[None]:
    """A method's own code inside: what goes wrong is said with the method, and what it may read."""
    try:
        yield
    except GrapefxError:
        raise
    except Exception as e:
        said = str(e).strip().splitlines()
        reads = method.reads if part == "cotangent" else method.learns_from
        raise MethodError(
            f"{part} of method {method.name!r} fails at layer {m.layer.name!r}: "
            f"{type(e).__name__}: {said[0] if said else ''}\n"
            f"  it may read {sorted(reads) or 'nothing'}, as declared; all else in rows is None"
        ) from e


def refitted(method: Method, m: FeedbackMap, parts: list[Tensor], state: State) -> State:
    """The method's state for the fitted map of each group."""
    like = state["B"].dtype
    if len(parts) == 1:
        return method.refit(state, parts[0].to(like))
    made = [method.refit(m.state_part(state, g), p.to(like)) for g, p in enumerate(parts)]
    return m.joined(made, state)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius cosine (GrAPE 2026 eq. 3); 0 where one of the two is 0."""
    a, b = a.float(), b.float()
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt().clamp_min(1e-30)


def build_update(step: StepGraph, feedback: Feedback, kind: str = "update") -> StepGraph:
    """A training step of the method. With tangents in the graph its maps learn from them.

    ``kind``: "mean_field" computes them anew from the running means of derivatives, "start" from
    those of this batch.
    """
    b = Builder(step, feedback)
    if feedback.method.feedback:
        b.add_states()
    else:
        b.state_nodes = [{} for _ in feedback.maps]
    learns = feedback.method.learns_from
    if kind != "update":
        b.average(kind == "start")
        replace_cuts(b, b.cotangents(b.new_states))
        b.decay_weights()
        return b.finish()
    if learns and (b.streams or "tangent" not in learns):
        b.learn()
    if feedback.method.transparent:
        backward = markers.find(b.graph, markers.CUT_BACKWARD)
        replace_cuts(b, {i: n.args[0] for i, n in backward.items()})  # type: ignore[misc]
        return b.finish()
    before = b.new_states if b.new_states and feedback.method.project_after_learn else b.state_nodes
    replace_cuts(b, b.cotangents(before))
    b.decay_weights()
    return b.finish()


def replace_cuts(b: Builder, cotangents: dict[int, Node]) -> None:
    """Put the cotangents in place of the ``cut_backward`` nodes."""
    for index, node in markers.find(b.graph, markers.CUT_BACKWARD).items():
        new = cotangents.get(index)
        assert isinstance(new, Node)
        b.edit.put(new, node)
