"""Changing a step graph: how a pass adds inputs and outputs to a copy, and how it ends.

A pass that rewrites a ``StepGraph`` makes one ``Edit`` of it, works on ``edit.graph``, and returns
``edit.finish()``. The step graph that it was given stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch.fx import Node

from grapefx.ir import Slot, StepGraph
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.emit import Emitter
from grapefx.passes.graph.order import dead_code, topological
from grapefx.passes.graph.restride import differs, restride
from grapefx.torch_compat import graph_module


class Edit:
    """A copy of a step graph in the making.

    ``emitter`` and ``emit`` add operators, ``add_input`` placeholders, ``add_output`` results.
    ``put`` replaces a value by another one.
    """

    def __init__(self, step: StepGraph) -> None:
        self.step = step.copy()
        self.graph = self.step.gm.graph
        self.output = self.step.output_node()
        self.emitter = Emitter(self.graph)
        self.inputs = list(self.step.inputs)
        self.outputs = list(self.step.outputs)
        self._last_input = self.step.placeholders()[-1]
        self._moved: list[Node] = []

    @property
    def last_input(self) -> Node:
        """The last placeholder: a node that reads nothing else may stand behind it."""
        return self._last_input

    @property
    def results(self) -> list[Any]:
        """The present results of the graph, one for each of ``outputs``."""
        return list(self.output.args[0])  # type: ignore[arg-type]

    def add_input(
        self,
        name: str,
        slot: Slot,
        like: torch.Tensor,
        *,
        shape: Sequence[Any] | None = None,
        dtype: torch.dtype | None = None,
        **labels: Unpack[meta.Labels],
    ) -> Node:
        """A placeholder behind the others, of the shape, dtype and device of ``like``.

        ``shape`` and ``dtype`` replace those of ``like``; ``labels`` are its phase and layer.
        """
        with self.graph.inserting_after(self._last_input):
            node = self.graph.placeholder(name)
        with self.emitter.mode:
            node.meta["val"] = torch.empty(
                like.shape if shape is None else list(shape),
                dtype=like.dtype if dtype is None else dtype,
                device=like.device,
            )
        node.meta |= {meta.ROLE: slot.role, **meta.entries(labels)}
        self._last_input = node
        self.inputs.append(slot)
        return node

    def emit(self, fn: Callable[..., Any], *args: Any, **labels: Unpack[meta.Labels]) -> Any:
        """A Python function of tensors (``Emitter.trace``), in front of the results."""
        with self.emitter.before(self.output, **labels):
            return self.emitter.trace(fn, *args)

    def add_output(self, slot: Slot, node: Any) -> None:
        """One result more, behind the others."""
        self.set_results([*self.results, node])
        self.outputs.append(slot)

    def set_results(self, results: Sequence[Any]) -> None:
        """Other nodes in the places of the results (None: no gradient)."""
        self.output.args = (tuple(results),)

    def put(self, new: Node, old: Node) -> None:
        """``new`` takes the place of ``old``, which is erased."""
        self.took_place(new, old)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def took_place(self, new: Node, old: Node) -> None:
        """Note that readers of ``old`` read ``new`` now, whose strides may be others."""
        if differs(old, new):
            self._moved.append(new)

    def finish(
        self, *, erase_markers: bool = True, keep_unused: bool = False, **facts: Any
    ) -> StepGraph:
        """The changed step graph: in order, without dead code, with true strides.

        ``erase_markers``: the cuts and taps go. ``keep_unused``: what nothing reads yet stays, for
        the next pass. ``facts``: further fields of the ``StepGraph``.
        """
        if erase_markers:
            self._moved += markers.erase(self.graph)
        topological(self.graph)
        if not keep_unused:
            dead_code(self.graph)
        restride(self.graph, self._moved)
        return replace(
            self.step,
            gm=graph_module(self.step.gm, self.graph),
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            **facts,
        )
