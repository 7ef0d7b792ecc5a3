"""Which parameters, buffers and feedback maps live on which stage: those that its graph reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from grapefx.errors import MethodError
from grapefx.ir import Slot
from grapefx.passes.divide.owners import stage_numbers
from grapefx.passes.divide.stages import Stages
from grapefx.plan import Plan


def owned(
    model: nn.Module, plan: Plan, stages: Stages, given: list[Any], rank: int
) -> dict[str, Tensor]:
    """The parameters and buffers of stage ``rank``, by their names in the whole model.

    Raises:
        MethodError: a buffer is written by one stage and read by another.
    """
    read: dict[Slot, list[int]] = {}
    for stage in stages.stages:
        for slot in stage.step.inputs:
            read.setdefault(slot, []).append(stage.index)
    writes = {
        slot.name: stage.index
        for stage in stages.stages
        for slot in stage.step.outputs
        if slot.role == "buffer"
    }
    known: set[int] = set()
    found: dict[str, Tensor] = {}
    for slot, k in ((s, k) for k, s in enumerate(plan.captured.inputs)):
        if slot.role not in ("parameter", "buffer"):
            continue
        at = read.get(slot, [0])
        if slot.role == "buffer" and slot.name in writes:
            if set(at) - {writes[slot.name]}:
                raise MethodError(
                    f"buffer {slot.name!r} is written by stage {writes[slot.name]} and read by "
                    f"stages {at}\n  remedy: end a stage elsewhere (stages=[...])"
                )
            at = [writes[slot.name]]
        known.add(given[k].data_ptr())
        if rank in at:
            found[slot.name] = given[k]
    if rank == 0:  # what the graph does not read belongs to the first stage
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if t.data_ptr() not in known:
                found[name] = t
    return found


def of_stage(
    maps: dict[str, Tensor], plan: Plan, ends: tuple[int, ...], rank: int
) -> dict[str, Tensor]:
    """The feedback tensors ("layer/name") of a stage's own layers."""
    label = stage_numbers(plan.layers, ends)
    others = {name for name, at in label.items() if at != rank}
    return {k: v for k, v in maps.items() if k.rpartition("/")[0].partition("[")[0] not in others}
