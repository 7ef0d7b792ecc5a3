"""Feedback pass: what a method says takes the place of every ``cut_backward``.

In: a joint graph (with or without tangents). Out: the whole step as one graph, markers erased.
Without tangents the cotangent at each cut comes from the error alone and the backward chain is
dead code (kind ``update``); with them the feedback maps learn as well (kind ``align``).

The way of the error: ``method_inputs.py`` reads e at the taps, as rows; ``projection.py`` makes a
cotangent of it at each cut, from which the local derivatives that the joint graph holds already
make the parameters' gradients. ``learning.py`` is how the maps change meanwhile, ``builder.py``
what all of them work on. Calibration steps are in ``calibration.py``.
"""

from __future__ import annotations

from grapefx.ir import StepGraph
from grapefx.passes.feedback.builder import Builder, Feedback
from grapefx.passes.feedback.learning import average, learn
from grapefx.passes.feedback.projection import decay_weights, open_cuts, put_cotangents


def build_update(step: StepGraph, feedback: Feedback, kind: str = "update") -> StepGraph:
    """A training step of the method. With tangents in the graph its maps learn from them.

    ``kind``: "mean_field" computes them anew from the running means of derivatives, "start" from
    those of this batch.
    """
    b = Builder(step, feedback)
    method, learns = feedback.method, feedback.method.learns_from
    if method.feedback:
        b.add_states()
    states = b.state_nodes
    if kind != "update":
        average(b, kind == "start")
        states = b.new_states
    elif learns and (b.inputs.streams or "tangent" not in learns):
        learn(b)
        if method.project_after_learn:
            states = b.new_states
    if kind == "update" and method.transparent:
        open_cuts(b)
        return b.finish()
    put_cotangents(b, states)
    decay_weights(b)
    return b.finish()
