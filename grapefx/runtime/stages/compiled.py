"""One kind of step on one stage: its graphs compiled, and the schedule that all ranks follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grapefx.analysis import pipelines as s
from grapefx.ir import Slot
from grapefx.lowering import Compiled, lower_saving, lower_tasks, update_for
from grapefx.passes.divide.commit import Commit
from grapefx.passes.divide.owners import stage_numbers
from grapefx.passes.divide.partition import Split, split
from grapefx.passes.divide.stages import SEND, Stages
from grapefx.passes.divide.tasks import Tasks, split_by_results
from grapefx.plan import Plan
from grapefx.plan.stages import schedule_of

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
    index: int
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
    schedule = schedule_of(stages, commit, microbatches, exact)
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
        index=index,
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
