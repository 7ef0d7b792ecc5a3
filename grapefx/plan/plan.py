"""A plan: what is known about one captured call, and the step graphs that are made of it.

``build.py`` makes plans; ``passes/pipeline.py`` lists the passes that make each kind of step of
the joint graph.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from grapefx.capture import Capture
from grapefx.errors import BudgetError, CaptureError, PlacementError
from grapefx.ir import Captured, Layer, Role, StepGraph
from grapefx.maps import ErrorRows, FeedbackMap, StateSpec, choose_maps
from grapefx.methods import Method, get_method
from grapefx.options import Options
from grapefx.passes.feedback.builder import Feedback
from grapefx.passes.feedback.exact_rows import ExactRows
from grapefx.passes.feedback.late_rows import pending
from grapefx.passes.feedback.mean_field import KEY, MeanField
from grapefx.passes.feedback.normal_equations import memory_shapes
from grapefx.passes.feedback.radial import homogeneous_points
from grapefx.passes.feedback.second_forward import input_size
from grapefx.passes.feedback.weights import weight_shapes
from grapefx.passes.graph import markers
from grapefx.passes.graph.verify import independence
from grapefx.passes.pipeline import Noise, StepContext, build_step
from grapefx.passes.place.placement import Placement
from grapefx.passes.runner import PassRun
from grapefx.plan.feedback_points import default_budget, reads_classes
from grapefx.plan.request import check_together
from grapefx.torch_compat import (
    batch_symbol,
    fixed_size,
    new_fake_mode,
)

KINDS = ("update", "align", "calibration")


@dataclass
class Plan:
    """Everything known about one captured call: graphs are built when first asked for."""

    capture: Capture
    captured: Captured
    placement: Placement
    joint: StepGraph
    layers: tuple[Layer, ...]
    full_maps: tuple[FeedbackMap, ...]
    full_rows: dict[str, ErrorRows]
    method: Method
    options: Options
    batch: Any
    batch_size: int
    differentiable: tuple[bool, ...]  # for each output of the model
    independent: dict[str, tuple[str, ...]] = field(default_factory=dict)
    maps: tuple[FeedbackMap, ...] = field(init=False)
    error_rows: dict[str, ErrorRows] = field(init=False)
    notes: list[str] = field(init=False)
    passes: dict[str, tuple[PassRun, ...]] = field(default_factory=dict)
    _graphs: dict[str, StepGraph] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = self.options
        self.maps, self.error_rows, said = choose_maps(
            self.full_maps,
            self.full_rows,
            feedback=options.feedback,
            budget=default_budget(options, self.captured),
            method=self.method,
            seed=options.seed,
            refits=self.method.refits
            and (
                options.calibrates
                or options.mean_field is not None
                # refits in `net.calibration()`, if nowhere else
                or options.calib_refit == "feedback"
            ),
        )
        self.notes = [*self.captured.notes, *said]
        if self.method.feedback:
            self.notes += filter(None, (self.placement.note, self._poor()))

    def _poor(self) -> str:
        """Why feedback can teach little with this placement; empty where it can."""
        if self.full_maps and max(m.error_dim for m in self.full_maps) == 1:
            return (
                "the error has one entry a sample: at each feedback point all samples' feedback "
                "lies on one line; error_at= can tap it in front of the output layer"
            )
        inside = [p for layer in self.layers for p in layer.parameters]
        if len(self.layers) == 1 and self.options.points is None and len(inside) >= 8:
            finer = "" if self.options.granularity == "layer" else "granularity='layer' or "
            return (
                f"one feedback point: the {len(inside)} parameters behind it learn by "
                f"backpropagation from there; {finer}points= may place more"
            )
        return ""

    def kinds(self) -> tuple[str, ...]:
        """The kinds of step that this method uses."""
        if self.method.exact:
            return ("calibration",)
        if self.method.needs_tangents():
            return ("align", "calibration")
        if self.mean_field is not None and self.mean_field.every:
            often = ("mean_field", "calibration")
            return often if self.mean_field.every == 1 else ("update", *often)
        return KINDS if self.method.aligns() else ("update", "calibration")

    def graph(self, kind: str) -> StepGraph:
        """The whole training step of a kind as one flat graph."""
        if kind not in self._graphs:
            self._graphs[kind] = self._build(kind)
        return self._graphs[kind]

    @functools.cached_property
    def radial(self) -> frozenset[int]:
        """The feedback points whose cotangents get the radial correction, by index."""
        wanted = self.options.radial is not False and self.method.mechanism == "points"
        return homogeneous_points(self.joint) if wanted and self.maps else frozenset()

    @property
    def exact_rows(self) -> ExactRows | None:
        """Which samples of a batch are backpropagated; None for none."""
        options = self.options
        if options.exact_rows == 0 or self.method.exact:
            return None
        return ExactRows(
            options.exact_rows,
            options.exact_weight,
            options.exact_pick,
            self.batch,
            self.batch_size,
            options.exact_late,
        )

    @functools.cached_property
    def late(self) -> dict[str, torch.Tensor]:
        """The corrections that wait for the next step, in the learning state: fake tensors."""
        return pending(self.joint) if self.exact_rows is not None and self.exact_rows.late else {}

    @property
    def mean_field(self) -> MeanField | None:
        """How maps come from mean derivatives; None for not at all.

        A graph of one sample alone (the rest of an epoch) uses the maps that there are.
        """
        wanted = self.options.mean_field
        if wanted is None or self.method.exact or self.batch is None:
            return None
        return MeanField(0 if isinstance(wanted, str) else wanted, self.batch)

    @functools.cached_property
    def means(self) -> str:
        """The key of the running means in the learning state: one for each set of shapes."""
        slots = self.graph("mean_field").outputs
        return next(s.name for s in slots if s.role == "feedback" and s.name.startswith(KEY))

    @property
    def derived(self) -> tuple[str, ...]:
        """The operators whose tangent rule was made from torch's own derivatives, so far."""
        return tuple(dict.fromkeys(op for step in self._graphs.values() for op in step.derived))

    @property
    def graphs(self) -> dict[str, torch.fx.GraphModule]:
        """Every kind's graph, for analysis."""
        return {k: self.graph(k).gm for k in self.kinds()}

    def state_specs(self) -> tuple[StateSpec, ...]:
        """What keeps a state with this method: feedback points, weights, or the input."""
        if not self.method.keeps_state:
            return ()
        if self.method.state_at == "weight":
            return tuple(StateSpec(n, s) for n, s in weight_shapes(self.joint).items())
        if self.method.state_at == "input":
            size = input_size(self.joint, self.method.name)
            return (StateSpec("input", (size, self.error_rows["dense"].dim)),)
        seed = self.options.seed
        remembers = self.options.calib_forget is not None
        return tuple(
            StateSpec(m.layer.name, m.shape, m.reading(seed), memory_shapes(m) if remembers else ())
            for m in self.maps
            if m.seed is None
        )

    def states(self) -> tuple[dict[str, torch.Tensor], ...]:
        """Fake tensors of each state in ``state_specs`` (shape, dtype, device; no memory)."""
        like = next(iter(self.joint.placeholders())).meta["val"]
        dtype = torch.promote_types(like.dtype.to_real(), torch.float32)
        generator = torch.Generator(like.device)
        with new_fake_mode():
            return tuple(
                self.method.init(spec.shape, generator, dtype)
                | {
                    k: torch.zeros(shape, dtype=dtype, device=like.device)
                    for k, shape in spec.memory
                }
                for spec in self.state_specs()
            )

    def _point_states(self) -> tuple[dict[str, torch.Tensor], ...]:
        """The state of each map, empty where it keeps none."""
        if self.method.state_at != "point" or not self.method.keeps_state:
            return tuple({} for _ in self.maps)
        kept = dict(zip((s.key for s in self.state_specs()), self.states(), strict=True))
        return tuple(kept.get(m.layer.name, {}) for m in self.maps)

    def for_method(self, method: str | Method, options: Options) -> Plan:
        """The same capture, with its feedback points, for another method; no budget is checked.

        ``options`` may differ where the capture does not (granularity and batch dim must agree).
        """
        chosen = get_method(method, {})
        plan = replace(self, method=chosen, options=options, independent={}, passes={}, _graphs={})
        if self.placement.note and reads_classes(chosen):
            raise PlacementError(
                f"method {chosen.name!r} reads class targets at the model's output, but "
                f"{self.placement.note}\n  remedy: error_at='output'"
            )
        if not plan.maps:
            check_feedback(plan)
        return plan

    def over_budget(self) -> str:
        """Why the feedback maps do not fit into ``feedback_budget``; empty when they do."""
        have = sum(m.bytes for m in self.maps)
        budget = default_budget(self.options, self.captured)
        if not self.method.feedback or have <= budget:
            return ""
        worst = max(self.maps, key=lambda m: m.bytes)
        return (
            f"the feedback maps need {have / 2**20:.0f} MiB, the budget is "
            f"{budget / 2**20:.0f} MiB "
            f"(largest: layer {worst.layer.name!r}, {worst.error_dim} x {worst.value_dim})\n"
            "  remedy: feedback_budget=, feedback='auto', or fewer points with granularity='block'"
        )

    def _build(self, kind: str) -> StepGraph:
        check_together(self.method, self.options)
        runs: list[PassRun] = []
        step = build_step(self.joint, kind, self._context(), runs)
        self.passes[kind] = tuple(runs)
        fixed = fixed_size(self.batch, self.joint.placeholders()[0].meta["val"])
        if fixed is not None:
            raise CaptureError(
                f"the batch size became fixed at {fixed} while the {kind!r} graph was built (a "
                "rule of ours assumed it)\n  remedy: please report this model"
            )
        if kind != "calibration" and not self.method.sequential:
            options = self.options
            self.independent = independence(
                step,
                self.layers,
                options.exact_rows > 0,
                self.late if options.exact_late else None,
            )
        return step

    def _context(self) -> StepContext:
        """What the passes of a step read beside the joint graph."""
        method, options = self.method, self.options
        kept = not isinstance(options.mean_field, int) and all(m.seed is None for m in self.maps)
        feedback = Feedback(
            method,
            self.maps,
            self.error_rows,
            self._point_states(),
            ridge=options.ridge,
            refit=options.calib_refit != "weights" and kept,
            true_gradients=options.calib_refit != "feedback",
            keep=options.calib_forget or 0.0,
            radial=self.radial,
            exact=self.exact_rows,
            mean_field=self.mean_field,
        )
        streams = self.streams()
        quiet: tuple[int, ...] = ()
        if method.tangents_from == "last":
            last = markers.last_points(self.joint.gm.graph)
            streams = tuple(s for s in (tuple(i for i in s if i in last) for s in streams) if s)
            quiet = tuple(layer.index for layer in self.layers if layer.index not in last)
        noise = Noise(
            streams,
            quiet,
            rows_hint=self._sub_batch(),
            signs=options.noise == "rademacher",
            perturb=options.perturb,
        )
        return StepContext(
            self.layers, feedback, self.batch, self.batch_size, noise, self._other_states()
        )

    def _other_states(self) -> dict[str, dict[str, torch.Tensor]]:
        """Fake tensors of the states that do not belong to feedback points, by what keeps them."""
        if self.method.mechanism == "weights":
            names = [s.key for s in self.state_specs()] or list(weight_shapes(self.joint))
            states = self.states() or tuple({} for _ in names)
            return dict(zip(names, states, strict=True))
        if self.method.mechanism == "two_forwards":
            return {"input": next(iter(self.states()), {})}
        return {}

    def streams(self) -> tuple[tuple[int, ...], ...]:
        """Which layers' noise runs together; each group as often as there are directions."""
        everything = tuple(layer.index for layer in self.layers)
        groups = {"shared": 1, "per_layer": len(everything)}.get(
            str(self.options.streams), self.options.streams
        )
        count = max(1, min(int(groups), len(everything)))
        size, more = divmod(len(everything), count)
        parts, start = [], 0
        for k in range(count):
            end = start + size + (k < more)
            parts.append(everything[start:end])
            start = end
        return tuple(part for part in parts for _ in range(self.options.directions))

    def _sub_batch(self) -> int | None:
        """An example of the number of samples with tangents; None for all of them."""
        if self.options.tangent_fraction == 1:
            return None
        whole = self.batch is None and self.rows(self.batch_size) == self.batch_size
        return None if whole else self.rows(self.batch_size)

    def rows(self, batch: int) -> int:
        """How many samples carry tangents in a batch of ``batch``."""
        return max(1, min(batch, round(batch * self.options.tangent_fraction)))


def check_feedback(plan: Plan) -> None:
    """Raise ``PlacementError`` or ``BudgetError`` where the method cannot work on these points."""
    if plan.method.mechanism != "points" or plan.method.exact:
        return
    if plan.placement.refusal:
        raise PlacementError(plan.placement.refusal)
    if not plan.maps:
        raise PlacementError(
            f"method {plan.method.name!r} found no feedback point: the model has one layer with "
            "weights, or none that keeps the batch; use method='bp'"
        )
    if plan.options.radial is True and not plan.radial:
        raise PlacementError(
            "radial=True: behind no feedback point is the network homogeneous of degree 1 (linear "
            "layers, ReLU, pooling, sums; no normalisation, no shortcut from in front of it)\n"
            "  remedy: radial='auto', which then corrects nothing, or radial=False"
        )
    if plan.options.mean_field is not None:
        _check_mean_field(plan)
    excess = plan.over_budget()
    if excess:
        raise BudgetError(excess)


def _check_mean_field(plan: Plan) -> None:
    """Raise ``PlacementError`` where maps cannot come from mean derivatives."""
    asked = f"mean_field={plan.options.mean_field!r}"
    kinds = {m.rows: m.layer.name for m in plan.maps}
    if len(kinds) > 1:
        raise PlacementError(
            f"{asked} is for maps of one kind, but that of layer {kinds['token']!r} serves each "
            f"token, that of layer {kinds['dense']!r} a sample\n  remedy: points= of one kind"
        )
    if any(m.seed is not None for m in plan.maps):
        raise PlacementError(f"{asked} does not go with feedback='seeded', whose maps are not kept")
    if plan.batch is None and plan.batch_size > 1:
        raise PlacementError(
            f"{asked} needs a batch size that may change, but this model's graph holds for "
            f"{plan.batch_size} samples alone\n  remedy: leave mean_field out"
        )


def sizes_of(step: StepGraph, batch: int, rows: int) -> dict[Any, int]:
    """What each symbol of a step graph stands for: the batch, or the samples with tangents."""
    sizes: dict[Any, int] = {}
    numbers: dict[Role, int] = {"input": batch, "noise": rows}
    for role, number in numbers.items():
        for _, node in step.select(role):
            for size in node.meta["val"].shape:
                expr = batch_symbol(size)
                for symbol in expr.free_symbols if expr is not None else ():
                    sizes.setdefault(symbol, number)
    return sizes
