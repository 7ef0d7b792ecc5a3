"""One kind of step on one stage: its graphs compiled, and the schedule that all ranks follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grapefx.ir import Slot
from grapefx.lowering import Compiled, lower_saving, lower_tasks, update_for
from grapefx.passes.divide.commit import Commit, cut_commit
from grapefx.passes.divide.partition import Split, split
from grapefx.passes.divide.stages import SEND, Stages, split_stages, stage_numbers
from grapefx.passes.divide.tasks import Tasks, split_by_results
from grapefx.passes.pipeline import LowerContext, prepare
from grapefx.plan import Plan
from grapefx.runtime.program import sizes_of
from grapefx.runtime.stages import schedule as s

PARTS: tuple[s.Do, ...] = ("error", "backward", "estimate", "update")


@dataclass(frozen=True)
class Draw:
    """A noise input: its slot, and the shape of a draw for one microbatch."""

    slot: Slot
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StageStep:
    """What one stage runs for a microbatch, and once a step.

    ``forward`` takes the values of ``takes`` and gives those of ``gives``, then saved ones; the
    parts of ``tasks`` take saved values, then those of ``late``. ``results``: for each result of
    the update its slot and the action that computes it. ``vals``: fake values of what travels and
    of the outputs, by slot.
    """

    kind: str
    stages: Stages
    schedule: s.Schedule
    forward: Compiled
    takes: tuple[Slot, ...]
    gives: tuple[Slot, ...]
    saved: int
    late: tuple[Slot, ...]
    tasks: Tasks
    calls: tuple[Compiled, ...]
    results: tuple[tuple[Slot, s.Do], ...]
    draws: tuple[Draw, ...]
    commit: Commit | None
    cotangents: dict[str, Tensor]
    random: bool


def divide_plan(
    plan: Plan, kind: str, batch: int, ends: Sequence[int]
) -> tuple[Stages, Commit | None]:
    """A plan's step of one kind, for microbatches of ``batch`` samples, in stages."""
    names = [layer.name for layer in plan.layers]
    main, commit = cut_commit(plan.graph(kind), names, plan.method.name)
    sizes = sizes_of(main, batch, plan.rows(batch))
    context = LowerContext(sizes, plan.options.backend_options)
    fixed = prepare(main, kind, plan.options.backend, context)
    exact = kind == "calibration" or plan.method.exact
    found = split_stages(fixed, plan.layers, ends, exact=exact, readers=commit.readers())
    return found, commit if commit.outputs else None


def links_of(stages: Stages, kind_exact: bool, first: bool) -> list[s.Link]:
    """Every value that travels, from one stage to one other."""
    early = {
        slot.name.removeprefix(SEND)
        for stage in stages.stages
        for slot in stage.step.outputs
        if slot.role == "output" and slot.name.startswith(SEND)
    }
    found = []
    for c in stages.channels:
        before: s.Do = "forward" if c.kind == "recv" else "estimate" if first else "update"
        if kind_exact and c.kind != "recv":
            before = "backward"
        after: s.Do = "forward" if c.name in early else "error"
        if c.kind == "chain":
            after = "backward"
        found += [s.Link(c.name, c.kind, c.source, t, after, before, c.bytes) for t in c.targets]
    return sorted(found, key=lambda link: link.after != "forward")  # received as they are sent


def order_of(stages: int, microbatches: int, exact: bool, commit: Commit | None) -> s.Order:
    """What each rank computes, and when."""
    if exact:
        order = s.one_forward_one_backward(stages, microbatches)
    elif commit is not None and commit.first:
        return s.learn_first(stages, microbatches)
    else:
        order = s.feedback(stages, microbatches)
    return order if commit is None else s.with_learning(order)


def compile_stage(
    plan: Plan,
    kind: str,
    divided: tuple[Stages, Commit | None],
    ends: Sequence[int],
    index: int,
    microbatches: int,
) -> StageStep:
    """Everything that stage ``index`` runs in a step; ``divided`` comes from ``divide_plan``."""
    options = plan.options
    backend = options.backend
    stages, commit = divided
    exact = kind == "calibration" or plan.method.exact
    first = commit is not None and commit.first
    order = order_of(len(ends) + 1, microbatches, exact, commit)
    schedule = s.check(s.connect(order, links_of(stages, exact, first)))
    step = stages.stages[index].step
    parts = split(step)
    forward, strides = lower_saving(parts, kind, backend, options.backend_options)
    update = update_for(parts, strides, kind, backend)
    doing = _doing(parts, stages, index, first)
    tasks = split_by_results(update, PARTS, doing)
    calls = lower_tasks(tasks, strides, backend, options.backend_options)
    label = stage_numbers(plan.layers, ends)
    own = [layer.name for layer in plan.layers if label[layer.name] == index]
    nodes = dict(zip(step.inputs, step.placeholders(), strict=True))
    takes = tuple(step.inputs[i] for i in parts.forward_inputs)
    return StageStep(
        kind=kind,
        stages=stages,
        schedule=schedule,
        forward=forward,
        takes=takes,
        gives=parts.forward_outputs,
        saved=parts.saved,
        late=tuple(step.inputs[i] for i in parts.late_inputs),
        tasks=tasks,
        calls=tuple(calls),
        results=tuple(zip(parts.update_outputs, doing, strict=True)),
        draws=tuple(
            Draw(slot, tuple(nodes[slot].meta["val"].shape), nodes[slot].meta["val"].dtype)
            for slot in takes
            if slot.role in ("noise", "random")
        ),
        commit=None if commit is None else commit.only(own),
        cotangents={
            slot.name: node.meta["val"]
            for slot, node in nodes.items()
            if slot.role == "cotangent" and ":" not in slot.name
        },
        random=any(_draws(n) for n in parts.forward.graph.nodes),
    )


def _draws(node: torch.fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or "inductor_seed" in str(node.target)


def _doing(parts: Split, stages: Stages, index: int, first: bool) -> list[s.Do]:
    """The action that computes each result of the update."""
    kinds = {c.name: c.kind for c in stages.channels if c.source == index and c.kind != "recv"}
    late = {c.name for c in stages.channels if c.source == index and c.kind == "late"}
    found: list[s.Do] = []
    for slot in parts.update_outputs:
        name = slot.name.removeprefix(SEND)
        if slot.name.startswith(SEND) and name in kinds:
            found.append("error" if name in late else "backward")
        elif first and slot.role == "saved":
            found.append("estimate")
        else:
            found.append("update")
    return found


__all__ = ["Draw", "StageStep", "compile_stage", "divide_plan", "links_of", "order_of"]
