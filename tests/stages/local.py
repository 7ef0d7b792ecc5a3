"""All stages of a pipeline in one process, and the whole step on the whole batch beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grapefx.analysis.pipelines import Action
from grapefx.ir import Slot
from grapefx.passes.divide.owners import legal_ends
from grapefx.plan import Plan, sizes_of
from grapefx.plan.stages import divide_plan
from grapefx.runtime.noise import draw, seed_of
from grapefx.runtime.stages.compiled import StageStep, compile_stage
from grapefx.runtime.stages.engine import Engine, Inputs
from grapefx.torch_compat import batch_symbol
from tests.zoo import step_inputs

SEED = (0, 5)


class LocalWires:
    """A letter box that all ranks share."""

    def __init__(self, rank: int, box: dict[Any, Tensor]) -> None:
        self.rank, self.box = rank, box

    def send(self, a: Action, value: Tensor) -> None:
        self.box[self.rank, a.peer, a.microbatch, a.value, a.kind] = value

    def recv(self, a: Action) -> Tensor:
        return self.box.pop((a.peer, self.rank, a.microbatch, a.value, a.kind))

    def there(self, a: Action) -> bool:
        return (a.peer, self.rank, a.microbatch, a.value, a.kind) in self.box


def ends_for(plan: Plan, stages: int) -> tuple[int, ...]:
    """Even ends, as many as there can be."""
    legal = legal_ends(plan.layers)
    count = min(stages - 1, len(legal))
    return tuple(sorted({legal[i * len(legal) // count] for i in range(count)})) if count else ()


def loss_of(out: list[Tensor], rows: slice) -> Tensor:
    """A mean over the samples' losses that knows which samples they are."""
    total: Any = 0.0
    for k, t in enumerate(out):
        generator = torch.Generator().manual_seed(k)
        w = torch.randn(64, *t.shape[1:], generator=generator, dtype=torch.float64).to(t.dtype)
        total = total + (torch.sin(t) * w[rows] + 0.3 * t * t).mean()
    return total


def noise_of(plan: Plan, slot: Slot, shape: list[int], dtype: torch.dtype, m: int) -> Tensor:
    generator = torch.Generator()
    generator.manual_seed(seed_of(*SEED, m, *slot.name.encode()))
    kind = "gaussian" if slot.role == "random" else plan.options.noise
    return draw([tuple(shape)], dtype, torch.device("cpu"), generator, kind)[0]


def given_of(plan: Plan, kind: str, model: Any, args: Any) -> dict[Slot, Any]:
    """Values for the inputs of the whole step; noise is that of ``M`` microbatches joined."""
    step = plan.graph(kind)
    found = dict(zip(step.inputs, step_inputs(plan, step, model, args), strict=True))
    for slot in found:
        if slot.name.endswith("/scale"):
            found[slot] = found[slot].abs() + 1
    return found


def whole(plan: Plan, kind: str, given: dict[Slot, Any], microbatches: int) -> dict[Slot, Any]:
    """The step graph on the whole batch; the cotangent is that of ``loss_of``."""
    step = plan.graph(kind)
    batch = next(v for s, v in given.items() if s.role == "input").shape[0]
    sizes = sizes_of(step, batch // microbatches, plan.rows(batch // microbatches))
    given = dict(given)
    for slot, node in zip(step.inputs, step.placeholders(), strict=True):
        if slot.role == "noise":
            exprs = [(s, batch_symbol(s)) for s in node.meta["val"].shape]
            shape = [int(s if e is None else e.xreplace(sizes)) for s, e in exprs]
            parts = [noise_of(plan, slot, shape, node.meta["val"].dtype, m)
                     for m in range(microbatches)]  # fmt: skip
            given[slot] = torch.cat(parts)
    cotangents = [s for s in step.inputs if s.role == "cotangent"]
    first = dict(zip(step.outputs, step.gm(*[given[s] for s in step.inputs]), strict=True))
    outs = [v.detach().requires_grad_(True) for s, v in first.items() if s.role == "output"]
    live = [o for o, keep in zip(outs, plan.differentiable, strict=True) if keep]
    loss_of(live, slice(0, batch)).backward()
    given |= dict(zip(cotangents, [o.grad for o in live], strict=True))
    return dict(zip(step.outputs, step.gm(*[given[s] for s in step.inputs]), strict=True))


def engines(
    plan: Plan, kind: str, given: dict[Slot, Any], ends: tuple[int, ...], microbatches: int
) -> list[Engine]:
    """The engines of all stages, ready to be driven."""
    batch = next(v for s, v in given.items() if s.role == "input").shape[0]
    size = batch // microbatches
    dynamic = {
        s for k, s in enumerate(x for x in plan.captured.inputs if x.role == "input")
        if k in [plan.captured.inputs[i].role == "input" and k for i in plan.captured.dynamic]
        or given[s].shape[:1] == (batch,)
    }  # fmt: skip
    parts = [
        {s: v[m * size : (m + 1) * size] if s in dynamic else v
         for s, v in given.items() if s.role == "input"}
        for m in range(microbatches)
    ]  # fmt: skip
    names = [s.name for s in plan.graph(kind).inputs if s.role == "cotangent"]

    def loss(m: int, outs: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        outs = [o.detach().requires_grad_(True) for o in outs]
        live = [o for o, keep in zip(outs, plan.differentiable, strict=True) if keep]
        with torch.enable_grad():
            found = loss_of(live, slice(m * size, (m + 1) * size))
            (found / microbatches).backward()
        return found.detach(), dict(zip(names, [o.grad for o in live], strict=True))

    inputs = Inputs(
        fixed={s: v for s, v in given.items() if s.role in ("parameter", "buffer", "constant")},
        parts=parts,
        feedback=lambda name: given[Slot("feedback", name)],
        loss=loss,
        seed=SEED,
        noise=plan.options.noise,
        device=torch.device("cpu"),
    )
    box: dict[Any, Tensor] = {}
    made = []
    divided = divide_plan(plan, kind, size, ends)
    for index in range(len(ends) + 1):
        step: StageStep = compile_stage(plan, kind, divided, ends, index, microbatches)
        made.append(Engine(step, inputs, LocalWires(index, box), lambda how, value: value))
    return made


def drive(found: list[Engine]) -> None:
    """Run every rank's actions; a rank that waits for a value lets the others go on."""
    at = [0] * len(found)
    moved = True
    while moved:
        moved = False
        for r, engine in enumerate(found):
            actions = engine.step.schedule.ranks[r]
            while at[r] < len(actions):
                a = actions[at[r]]
                if a.do == "recv" and not engine.wires.there(a):  # type: ignore[attr-defined]
                    break
                with torch.no_grad():
                    engine.do(a)
                at[r] += 1
                moved = True
    assert all(
        i == len(e.step.schedule.ranks[r]) for r, (i, e) in enumerate(zip(at, found, strict=True))
    )
    assert not any(e.held for e in found)
