"""One process: the whole step graph on the whole batch, steps in a row, as a hand-written loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grapefx.ir import Slot
from grapefx.plan import Plan, build_plan, resolve, sizes_of
from grapefx.runtime.noise import draw, seed_of
from grapefx.runtime.training_state import TrainingState
from grapefx.torch_compat import batch_symbol

# calibrates in step 0 and in every seventh
OPTIONS: dict[str, Any] = {"calib_unit": "step", "calib_every": 7, "backend": "eager"}


class Reference:
    """Trains ``model`` as a pipeline of ``microbatches`` should, without being one."""

    def __init__(self, model: nn.Module, method: str, x: Tensor, microbatches: int) -> None:
        self.model, self.microbatches = model, microbatches
        chosen, options = resolve(method, OPTIONS)
        self.plan: Plan = build_plan(model, (x,), method=chosen, options=options)
        self.state = TrainingState(chosen, options)
        if self.plan.state_specs():
            p = next(model.parameters())
            self.state.feedback.ensure(self.plan.state_specs(), p.dtype, p.device)
        made = zip(self.plan.captured.inputs, self.plan.capture.examples, strict=True)
        self.constants = {s: e for s, e in made if s.role == "constant"}

    def kind(self) -> str:
        kinds = self.plan.kinds()
        if self.state.schedule.due() or kinds == ("calibration",):
            return "calibration"
        return "align" if "align" in kinds else kinds[0]

    def step(self, x: Tensor, y: Tensor, loss: Any) -> Tensor:
        plan, kind = self.plan, self.kind()
        step = plan.graph(kind)
        given: dict[Slot, Any] = dict(self.constants)
        given |= {Slot("parameter", n): p.detach() for n, p in self.model.named_parameters()}
        given |= {Slot("buffer", n): b for n, b in self.model.named_buffers()}
        given |= {Slot("feedback", n): t for n, t in self.state.feedback.tensors.items()}
        given[Slot("input", "0")] = x
        rows = plan.rows(x.shape[0] // self.microbatches)
        sizes = sizes_of(step, x.shape[0] // self.microbatches, rows)
        for slot, node in zip(step.inputs, step.placeholders(), strict=True):
            val = node.meta["val"]
            if slot.role == "noise":
                exprs = [(s, batch_symbol(s)) for s in val.shape]
                shape = [int(s if e is None else e.xreplace(sizes)) for s, e in exprs]
                given[slot] = torch.cat([self.noise(slot, shape, val.dtype, m)
                                         for m in range(self.microbatches)])  # fmt: skip
            elif slot.role == "cotangent":
                out = self.model(x)
                leaf = out.detach().requires_grad_(True)
                found = loss(leaf, y)
                found.backward()
                given[slot] = leaf.grad
        with torch.no_grad():
            results = step.gm(*[given[s] for s in step.inputs])
        for slot, value in zip(step.outputs, results, strict=True):
            if slot.role == "gradient":
                self.model.get_parameter(slot.name).grad = value
            elif slot.role == "feedback":
                self.state.feedback.tensors[slot.name] = value
        self.state.schedule.done(kind == "calibration")
        return found.detach()

    def noise(self, slot: Slot, shape: list[int], dtype: torch.dtype, m: int) -> Tensor:
        generator = torch.Generator()
        seed = (self.plan.options.seed, self.state.schedule.step, m)
        generator.manual_seed(seed_of(*seed, *slot.name.encode()))
        kind = self.plan.options.noise
        return draw([tuple(shape)], dtype, torch.device("cpu"), generator, kind)[0]
