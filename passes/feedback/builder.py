"""One step graph in the making: what a method keeps enters it, and what it learned leaves it.

``Feedback`` says what the passes of this folder need to know beside the graph. A ``Builder`` holds
the graph while they work on it, one after the other: ``learning.py``, ``projection.py`` and
``calibration.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.ir import Slot, StepGraph
from grapefx.maps import ErrorRows, FeedbackMap
from grapefx.maps.seeded import uniform
from grapefx.methods.base import Method, State
from grapefx.passes.feedback.exact_rows import Chain, ExactRows
from grapefx.passes.feedback.mean_field import MeanField
from grapefx.passes.feedback.method_inputs import MethodInputs
from grapefx.passes.graph.edit import Edit


@dataclass(frozen=True)
class Feedback:
    """What the passes need to know beside the graph."""

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
    """One step graph in the making.

    ``state_nodes``: what the method keeps at each point, empty until ``add_states``;
    ``new_states``: what it keeps after the step, empty where it learns nothing; ``finite``: whether
    this batch may change it.
    """

    def __init__(self, step: StepGraph, feedback: Feedback) -> None:
        self.edit = Edit(step)
        self.step = self.edit.step
        self.graph = self.edit.graph
        # now: later the step has inputs that it does not know of yet
        self.parameters = {s.name: n for s, n in self.step.select("parameter")}
        self.feedback = feedback
        self.inputs = MethodInputs(self.edit, feedback.error_rows, feedback.method.name)
        self.state_nodes: list[dict[str, Node]] = [{} for _ in feedback.maps]
        self.new_states: list[dict[str, Node]] = []
        self.finite: Node | None = None
        self._metrics: dict[str, dict[int, Node]] = {}

    def add_states(self) -> None:
        """The feedback maps enter the graph: as inputs, or computed from their seed."""
        self.state_nodes = [
            self._from_seed(m)
            if m.seed is not None
            else {
                name: self.edit.add_input(
                    f"feedback_{m.layer.index}_{name}",
                    Slot("feedback", f"{m.layer.name}/{name}"),
                    like,
                    layer=m.layer.name,
                )
                for name, like in state.items()
            }
            for m, state in zip(self.feedback.maps, self.feedback.states, strict=True)
        ]

    def _from_seed(self, m: FeedbackMap) -> dict[str, Node]:
        method = self.feedback.method

        def make(e: Tensor, m: FeedbackMap = m) -> State:
            assert m.seed is not None
            dtype = torch.promote_types(e.dtype, torch.float32)
            return method.from_uniform(uniform(m.shape, m.seed, e.device, dtype))

        made: dict[str, Node] = self.edit.emit(
            make, self.inputs.error(m.rows), phase="projection", layer=m.layer.name
        )
        return made

    @functools.cached_property
    def chain(self) -> Chain | None:
        """The backward chain of a part of the batch, where the option asks for it."""
        return None if self.feedback.exact is None else Chain(self.edit, self.feedback.exact)

    def metric(self, name: str, m: FeedbackMap, fn: Any, *args: Any) -> None:
        """A number to be reported for a layer: ``fn`` of the values of ``args``."""
        node = self.edit.emit(fn, *args, phase="metric", layer=m.layer.name)
        self._metrics.setdefault(name, {})[m.layer.index] = node

    def finish(self) -> StepGraph:
        """The step with the new states and the metrics as outputs."""
        maps = self.feedback.maps
        for m, new in zip(maps, self.new_states, strict=self.new_states != []):
            for name, node in new.items():
                self.edit.add_output(Slot("feedback", f"{m.layer.name}/{name}"), node)
        for name, found in self._metrics.items():
            values = [found.get(m.layer.index) for m in maps]
            made = self.edit.emit(_stacked, values, phase="metric")
            self.edit.add_output(Slot("metric", name), made)
        if self.finite is not None:
            self.edit.add_output(Slot("metric", "finite"), self.finite)
        return self.edit.finish()


def _stacked(values: list[Any]) -> Tensor:
    """A metric of all layers; NaN for a layer that has none."""
    some = next(v for v in values if v is not None)
    nan = float("nan")
    return torch.stack(
        [v.float() if v is not None else some.new_full((), nan).float() for v in values]
    )
