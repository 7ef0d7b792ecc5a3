"""The pipeline: which passes make each kind of step, and which take it to the compiler, in order.

    joint graph --STEPS[kind]--> step graph --DIVIDE--> forward | update --FORWARD, UPDATE--> code

Capture, placement and the joint trace come before (``grapefx/plan/build.py``); Inductor comes after
(``grapefx/lowering.py``). ``runner.py`` says what a pass is, and runs, checks and logs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grapefx.ir import Layer, StepGraph
from grapefx.passes.differentiate.tangent import add_tangents
from grapefx.passes.divide.partition import Split, forward_only, split
from grapefx.passes.divide.tail import Tail, cut_tail
from grapefx.passes.feedback.builder import Feedback
from grapefx.passes.feedback.calibration import build_calibration
from grapefx.passes.feedback.perturbed import build_perturbed
from grapefx.passes.feedback.second_forward import build_two_forwards
from grapefx.passes.feedback.update import build_update
from grapefx.passes.feedback.weights import stand_in
from grapefx.passes.graph.annotate import annotate
from grapefx.passes.graph.custom_functions import expand
from grapefx.passes.graph.order import dead_code
from grapefx.passes.graph.prune import prune_masks
from grapefx.passes.peephole.channels_last import channels_last
from grapefx.passes.peephole.decompose import decompose
from grapefx.passes.peephole.join_products import join_products
from grapefx.passes.peephole.late_bias import add_bias_late
from grapefx.passes.peephole.pooling import tile_pools
from grapefx.passes.runner import Pass, PassRun, declare, run


@dataclass(frozen=True)
class Noise:
    """How tangents are drawn, as ``add_tangents`` takes it: see there for each."""

    streams: tuple[tuple[int, ...], ...]
    quiet: tuple[int, ...]
    rows_hint: int | None
    signs: bool
    perturb: str


@dataclass(frozen=True)
class StepContext:
    """What the passes of a step may read beside the graph.

    ``states``: fake tensors of what the method keeps for weights, by parameter, or for the input.
    """

    layers: tuple[Layer, ...]
    feedback: Feedback
    batch: Any
    batch_size: int
    noise: Noise
    states: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class LowerContext:
    """What the passes in front of a compiler may read beside the graph.

    ``sizes``: a number for each size symbol, None to keep them symbols. ``options`` are Inductor's.
    ``strides``: of the values that the forward graph saves, as it was compiled.
    """

    sizes: dict[Any, int] | None = None
    options: dict[str, Any] | None = None
    strides: Sequence[Any] = ()


# Each kind of step, from the joint graph

TANGENTS = Pass[StepContext](
    "tangents",
    lambda step, c: add_tangents(
        step,
        c.layers,
        batch=c.batch,
        batch_size=c.batch_size,
        streams=c.noise.streams,
        quiet=c.noise.quiet,
        rows_hint=c.noise.rows_hint,
        signs=c.noise.signs,
        perturb=c.noise.perturb,
    ),
    needs=("markers",),
    gives=("markers",),
)
FEEDBACK = Pass[StepContext](
    "feedback",
    lambda step, c: build_update(step, c.feedback),
    needs=("markers",),
    gives=("no markers", "no dead code"),
)
MEAN_FIELD = Pass[StepContext](
    "mean_field",
    lambda step, c: build_update(step, c.feedback, "mean_field"),
    needs=("markers",),
    gives=("no markers", "no dead code"),
)
START = Pass[StepContext](
    "start",
    lambda step, c: build_update(step, c.feedback, "start"),
    needs=("markers",),
    gives=("no markers", "no dead code"),
)
CALIBRATION = Pass[StepContext](
    "calibration",
    lambda step, c: build_calibration(step, c.feedback),  # a frozen model has no markers
    gives=("no markers", "no dead code"),
)
STAND_IN = Pass[StepContext](
    "stand_in",
    lambda step, c: stand_in(step, c.feedback.method, c.states),
    needs=("markers",),
    gives=("markers",),
)
PERTURBED = Pass[StepContext](
    "perturbed",
    lambda step, c: build_perturbed(
        step, batch=c.batch, batch_size=c.batch_size, name=c.feedback.method.name
    ),
    needs=("markers",),
    gives=("no markers", "no dead code"),
)
SECOND_FORWARD = Pass[StepContext](
    "second_forward",
    lambda step, c: build_two_forwards(step, c.feedback.method, c.states["input"]),
    needs=("markers",),
    gives=("no markers", "no dead code"),
)
EXPAND = Pass[Any]("expand", lambda step, _: expand(step.gm.graph), in_place=True)
PRUNE_MASKS = Pass[Any](
    "prune_masks", lambda step, _: prune_masks(step.gm.graph), in_place=True, optional=True
)
DEAD_CODE = Pass[Any](
    "dead_code", lambda step, _: dead_code(step.gm.graph), gives=("no dead code",), in_place=True
)
ANNOTATE = Pass[StepContext](
    "annotate",
    lambda step, c: annotate(step, c.layers),
    needs=("no markers",),
    gives=("labelled",),
    in_place=True,
)

FINISH = (EXPAND, PRUNE_MASKS, DEAD_CODE, ANNOTATE)

STEPS: dict[str, tuple[Pass[StepContext], ...]] = {
    "update": (FEEDBACK, *FINISH),
    "align": (TANGENTS, FEEDBACK, *FINISH),
    "calibration": (CALIBRATION, *FINISH),
    # maps from mean derivatives: running means, and the first batch's
    "mean_field": (MEAN_FIELD, *FINISH),
    "start": (START, *FINISH),
    # a method whose mechanism is not feedback at points has this step beside its calibration
    "weights": (STAND_IN, FEEDBACK, *FINISH),
    "parameters": (PERTURBED, *FINISH),
    "two_forwards": (SECOND_FORWARD, *FINISH),
}

# From a step graph to what a compiler gets

TILE_POOLS = Pass[LowerContext](
    "tile_pools", lambda step, _: tile_pools(step), in_place=True, optional=True
)
DECOMPOSE = Pass[LowerContext](
    "decompose",
    lambda step, c: decompose(step, c.sizes, inductor=True, options=c.options),
    gives=("no dead code",),
)
FIX_SIZES = Pass[LowerContext](
    "fix_sizes", lambda step, c: decompose(step, c.sizes, inductor=False), gives=("no dead code",)
)
JOIN_PRODUCTS = Pass[LowerContext](
    "join_products", lambda step, _: join_products(step.gm), in_place=True, optional=True
)
LATE_BIAS = Pass[LowerContext](
    "late_bias", lambda step, _: add_bias_late(step.gm), in_place=True, optional=True
)
CHANNELS_LAST = Pass[LowerContext](
    "channels_last",
    lambda step, c: channels_last(step.gm, c.strides),
    in_place=True,
    optional=True,
)

# by backend: in front of the split; on the forward graph; on the update graph
DIVIDE: dict[str, tuple[Pass[LowerContext], ...]] = {
    "inductor": (TILE_POOLS, DECOMPOSE),
    "eager": (FIX_SIZES,),
}
FORWARD: dict[str, tuple[Pass[LowerContext], ...]] = {
    "inductor": (JOIN_PRODUCTS, LATE_BIAS),
    "eager": (),
}
INFERENCE: dict[str, tuple[Pass[LowerContext], ...]] = {"inductor": (LATE_BIAS,), "eager": ()}
UPDATE: dict[str, tuple[Pass[LowerContext], ...]] = {"inductor": (CHANNELS_LAST,), "eager": ()}

BACKENDS = tuple(DIVIDE)

for _lists in (STEPS, DIVIDE, FORWARD, INFERENCE, UPDATE):
    for _passes in _lists.values():
        declare(_passes)


def build_step(
    joint: StepGraph, kind: str, context: StepContext, runs: list[PassRun] | None = None
) -> StepGraph:
    """A training step of one kind ("update", "align", ...), from the joint graph."""
    mechanism = context.feedback.method.mechanism
    which = mechanism if kind != "calibration" and mechanism in STEPS else kind
    return run(STEPS[which], joint, context, kind, runs)


def divide(
    step: StepGraph,
    kind: str,
    backend: str,
    context: LowerContext,
    runs: list[PassRun] | None = None,
) -> tuple[Split, Tail | None]:
    """A step graph as forward graph and update graph; of a calibration also what it fits after."""
    tail = None
    if kind == "calibration":
        step, tail = cut_tail(step)
    return split(prepare(step, kind, backend, context, runs)), tail


def prepare(
    step: StepGraph,
    kind: str,
    backend: str,
    context: LowerContext,
    runs: list[PassRun] | None = None,
) -> StepGraph:
    """What a backend wants done to a step graph before it is split."""
    if backend == "eager" and context.sizes is None:
        return step
    return run(DIVIDE[backend], step, context, kind, runs)


def inference(
    forward: StepGraph, backend: str, context: LowerContext
) -> tuple[StepGraph, tuple[int, ...]]:
    """A forward graph for inference, and which of the inputs of ``forward`` it uses."""
    step, used = forward_only(prepare(forward, "inference", backend, context))
    return run(INFERENCE[backend], step, context, "inference"), used
