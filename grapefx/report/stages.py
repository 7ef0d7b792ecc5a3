"""A model in stages, as text: ends, balance, what travels, schedules, and what they would take.

Times are roofline predictions on one worker of a device model, each operator alone; transfers are
listed in bytes and taken to cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grapefx.analysis import pipelines as s
from grapefx.analysis.cost import graph_cost
from grapefx.analysis.device import DeviceModel, load_device
from grapefx.errors import InputError
from grapefx.ir import StepGraph
from grapefx.passes.divide.owners import LATE_ROLES
from grapefx.passes.divide.partition import split
from grapefx.passes.divide.stages import SEND, Stages
from grapefx.passes.graph.order import ancestors, descendants
from grapefx.plan import Plan
from grapefx.plan.stages import check_method, divide_plan, ends_of, schedule_of, usual_kind

MOST = 800  # stages x microbatches up to which the zero-bubble order is worked out


@dataclass(frozen=True)
class StageCost:
    """Seconds of one microbatch on one stage, and bytes: of weights, and saved a microbatch."""

    forward: float
    backward: float
    update: float
    weights: int
    saved: int

    def seconds(self, do: s.Do) -> float:
        """Of one action; learning and the loss count as nothing."""
        found = {"forward": self.forward, "backward": self.backward, "update": self.update}
        return found.get(do, 0.0)


def stage_cost(
    step: StepGraph, chains: set[str], device: DeviceModel, microbatches: int = 1
) -> StageCost:
    """What a stage's graph costs. ``chains``: the names of the gradients that it sends on.

    Every microbatch but the first adds its gradients to those before it: two are read, one written.
    """
    slots = dict(zip(step.placeholders(), step.inputs, strict=True))
    late = descendants(n for n, slot in slots.items() if slot.role in LATE_ROLES)
    pairs = zip(step.outputs, step.results(), strict=True)
    sent = [n for slot, n in pairs if slot.name.removeprefix(SEND) in chains]
    chain = ancestors(sent) & late
    sums = {"forward": 0.0, "backward": 0.0, "update": 0.0}
    for node, cost in graph_cost(step.gm).nodes.items():
        part = "backward" if node in chain else "update" if node in late else "forward"
        flops = (cost.matmul_flops, cost.vector_flops)
        sums[part] += device.seconds(*flops, cost.bytes, cost.dtype)
    pairs = zip(step.outputs, step.results(), strict=True)
    for gradient in [n.meta["val"] for slot, n in pairs if slot.role == "gradient"]:
        adding = device.seconds(0, gradient.numel(), 3 * _bytes(gradient), gradient.dtype)
        sums["update"] += adding * (microbatches - 1) / microbatches
    weights = sum(_bytes(n.meta["val"]) for n, slot in slots.items() if slot.role == "parameter")
    parts = split(step)
    held = [n for n in parts.update.graph.nodes if n.op == "placeholder"][: parts.saved]
    kept = {n.name for n in parts.forward.graph.nodes if n.op == "placeholder"}
    saved = sum(_bytes(n.meta["val"]) for n in held if n.name not in kept)
    return StageCost(sums["forward"], sums["backward"], sums["update"], weights, saved)


def _bytes(val: object) -> int:
    return val.numel() * val.element_size() if isinstance(val, torch.Tensor) else 0


def _chains(stages: Stages, index: int) -> set[str]:
    return {c.name for c in stages.channels if c.kind == "chain" and c.source == index}


def stages_text(
    plans: Sequence[Plan], count: int, microbatches: int, batch: int | None, device: str, name: str
) -> str:
    """The report of ``grapefx-inspect --stages``; ``plans``: of backpropagation, then of others.

    Raises:
        InputError: the batch cannot be divided into so many microbatches.
        PlacementError: the model has fewer places to end a stage at.
    """
    size = batch or plans[0].batch_size
    if size % microbatches:
        raise InputError(
            f"a batch of {size} samples cannot be divided into {microbatches} microbatches of one "
            "size\n  remedy: --batch or --microbatches"
        )
    model = load_device(device)
    part = size // microbatches
    lines = [
        f"{name}: {count} stages, {microbatches} microbatches of {part} samples, {device}",
        "times are predictions, transfers are free in them",
    ]
    rows: list[tuple[str, float, int]] = []
    exact: list[StageCost] = []
    for plan in plans:
        check_method(plan.method)
        kind = usual_kind(plan)
        ends = ends_of(plan, "auto", count, part, device)
        stages, commit = divide_plan(plan, kind, part, ends)
        costs = [
            stage_cost(x.step, _chains(stages, x.index), model, microbatches) for x in stages.stages
        ]
        chained = kind == "calibration" or plan.method.exact
        schedule = schedule_of(stages, commit, microbatches, chained)
        spans = s.simulate(schedule, lambda r, a, costs=costs: costs[r].seconds(a.do))  # type: ignore[misc]
        title = f"{plan.method.name} ({kind} step)"
        lines += ["", title, *_ends(plan, ends, costs), *_links(stages)]
        lines += [s.gantt(spans), "    F forward  b gradient sent on  u update  . waiting"]
        rows.append((plan.method.name, s.makespan(spans), max(s.held(schedule))))
        if chained and not exact:
            exact = costs
            rows += _baselines(costs, microbatches)
    lines += ["", *_table(rows), "", *_scaling(plans, exact, microbatches, part, model)]
    return "\n".join(lines) + "\n"


def _ends(plan: Plan, ends: Sequence[int], costs: Sequence[StageCost]) -> list[str]:
    lines = ["  stage  ends behind            F us     b us     u us  weights KiB  saved KiB"]
    for k, c in enumerate(costs):
        name = plan.layers[ends[k]].name if k < len(ends) else "the output"
        lines.append(
            f"  {k:>5}  {name:<20} {c.forward * 1e6:>8.1f} {c.backward * 1e6:>8.1f} "
            f"{c.update * 1e6:>8.1f}  {c.weights / 1024:>11.1f}  {c.saved / 1024:>9.1f}"
        )
    totals = [c.forward + c.backward + c.update for c in costs]
    lines.append(f"  slowest stage / mean: {max(totals) * len(totals) / sum(totals):.2f}")
    return lines


def _links(stages: Stages) -> list[str]:
    sums: dict[tuple[int, int, str], int] = {}
    for c in stages.channels:
        for t in c.targets:
            key = (c.source, t, c.kind)
            sums[key] = sums.get(key, 0) + c.bytes
    what = {"recv": "values", "late": "error and tangents", "chain": "gradients"}
    return [
        f"  {a} -> {b}: {n / 1024:.1f} KiB a microbatch ({what[kind]})"
        for (a, b, kind), n in sorted(sums.items())
    ]


def _baselines(costs: Sequence[StageCost], microbatches: int) -> list[tuple[str, float, int]]:
    """Other schedules of the same exact step: a gradient leaves with the whole backward in GPipe
    and 1F1B, in front of the weight gradients with zero bubble.
    """
    count = len(costs)
    found = []
    for name, order, after in (
        ("GPipe", s.forward_first(count, microbatches), "update"),
        ("1F1B", s.one_forward_one_backward(count, microbatches), "update"),
        ("zero bubble", s.zero_bubble(count, microbatches), "backward"),
    ):
        if name == "zero bubble" and count * microbatches > MOST:
            continue
        schedule = s.connect(order, _chain(count, after))  # type: ignore[arg-type]
        spans = s.simulate(schedule, lambda r, a: costs[r].seconds(a.do))
        found.append((name, s.makespan(spans), max(s.held(schedule))))
    total = sum(c.forward + c.backward + c.update for c in costs) * microbatches
    found.append((f"data parallelism on {count}", total / count, 1))
    found.append(("one device", total, 1))
    return found


def _chain(count: int, after: s.Do) -> list[s.Link]:
    """Activations to the next stage, gradients to the one before."""
    pairs = range(count - 1)
    return [s.Link(f"h{r}", "recv", r, r + 1, "forward", "forward") for r in pairs] + [
        s.Link(f"g{r}", "chain", r + 1, r, after, "backward") for r in pairs
    ]


def _table(rows: Sequence[tuple[str, float, int]]) -> list[str]:
    lines = ["schedule                     ms a step  microbatches held"]
    for name, seconds, held in rows:
        lines.append(f"{name:<27} {seconds * 1e3:>10.3f}  {held:>17}")
    return lines


def _scaling(
    plans: Sequence[Plan],
    exact: Sequence[StageCost],
    microbatches: int,
    part: int,
    device: DeviceModel,
) -> list[str]:
    """Predicted steps on up to 64 equal stages, as parts of one device's step."""
    if not exact:
        return []
    f, b, u = (sum(getattr(c, k) for c in exact) for k in ("forward", "backward", "update"))
    one = (f + b + u) * microbatches
    lines = [
        f"equal stages, {microbatches} microbatches: the step as a part of one device's",
        "stages      1F1B  zero bubble" + "".join(f"{p.method.name:>13}" for p in plans[1:]),
    ]
    others = []
    for plan in plans[1:]:
        stages, _ = divide_plan(plan, usual_kind(plan), part, ())
        c = stage_cost(stages.stages[0].step, set(), device)
        others.append((c.forward, c.update))
    for p in (2, 4, 8, 16, 32, 64):
        chain = (microbatches + p - 1) * (f + b + u) / p
        zero = (microbatches * (f + b + u) + (p - 1) * max(0.0, f + b - u)) / p
        cells = [chain / one, max(zero, (p * (f + b) + u) / p) / one]
        cells += [(microbatches * (x + y) + (p - 1) * x) / p / one for x, y in others]
        lines.append(f"{p:>6}  {cells[0]:>8.3f}  {cells[1]:>11.3f}" + "".join(
            f"{c:>13.3f}" for c in cells[2:]))  # fmt: skip
    return lines
