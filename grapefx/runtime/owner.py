"""What one training call leaves for its backward, and how a finished backward is committed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grapefx.runtime.program import CompiledStep, Program
from grapefx.runtime.targets import one_hot

if TYPE_CHECKING:
    from grapefx.runtime.module import FeedbackModule

_NOTHING: Callable[[], Any] = contextlib.nullcontext


def autocast_off(device: str) -> Any:
    """A context in which autocast does not act: graphs hold their own casts."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING()


class Owner:
    """What one training call leaves for its backward: the runtime and the program's wiring."""

    __slots__ = ("calibration", "differentiable", "layers", "module", "plan", "renamed")

    def __init__(self, module: FeedbackModule, program: Program, calibration: bool) -> None:
        assert program.plan is not None
        self.module = module
        self.plan = program.plan
        self.differentiable = program.plan.differentiable
        self.layers = program.plan.layers
        self.calibration = calibration
        self.renamed = program.renamed

    def late_input(self, role: str, name: str) -> Tensor:
        """A feedback tensor as it is now, or the class targets of this step."""
        if role == "target":
            found = one_hot(self.module._targets, self.plan)
            self.module.__dict__["_targets"] = None  # used up: old targets never train a new batch
            return found
        return self.module._feedback.tensors[self.renamed.get(name, name)]

    def run_update(self, step: CompiledStep, inputs: list[Any]) -> Any:
        """The update graph, with autocast off: the graph holds its own casts."""
        with autocast_off(self.module._device_type):
            return step.update(inputs)

    def commit(self, step: CompiledStep, results: Any) -> list[Any]:
        """Take the learned feedback over in one assignment; return the gradients in order."""
        module = self.module
        gradients: dict[tuple[str, str], Any] = {}
        learned: dict[str, Tensor] = {}
        for (role, name), value in zip(step.results, results, strict=True):
            if role == "feedback":
                learned[self.renamed.get(name, name)] = value
            elif role == "metric":
                module._metrics[name] = (value, self.layers)
            else:
                gradients[role, name] = value
        found = [gradients.get(slot) for slot in step.gradients]
        if learned:
            module._feedback.tensors = {**module._feedback.tensors, **learned}
        if not self.calibration and module._schedule.step < module._options.align_warmup:
            # zeros, not None: DistributedDataParallel and GradScaler wait for a gradient
            found = [
                torch.zeros_like(g) if role == "gradient" and g is not None else g
                for (role, _), g in zip(step.gradients, found, strict=True)
            ]
        module._after_step(self.calibration)
        if self.calibration and module._options.calib_update == "sgd":
            found = module._own_sgd(step, found)
        return found
