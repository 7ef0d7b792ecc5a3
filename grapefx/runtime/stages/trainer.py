"""A training step of one stage: agreed on by all ranks, run by the schedule, then committed."""

from __future__ import annotations

import copy
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grapefx.capture import Scope, module_tree
from grapefx.errors import GrapefxError, InputError, StageError
from grapefx.ir import Slot
from grapefx.methods import Method
from grapefx.options import Options
from grapefx.plan import Plan
from grapefx.plan.stages import divide_plan, ends_of
from grapefx.runtime.call import autocast_off
from grapefx.runtime.captures import Captures
from grapefx.runtime.program import Program
from grapefx.runtime.stages.compiled import StageStep, compile_stage
from grapefx.runtime.stages.engine import Engine, Inputs
from grapefx.runtime.stages.microbatches import divided, rows_of
from grapefx.runtime.stages.ownership import of_stage, owned
from grapefx.runtime.stages.wires import Links, Replicas, Transfers, share
from grapefx.runtime.training_state import TrainingState
from grapefx.torch_compat import pytree

Loss = Callable[[Any, Any], Tensor]


class Job:
    """One call of ``step`` on its way; without a loss the stages are only prepared."""

    def __init__(self, target: Any = None, loss: Loss | None = None) -> None:
        self.target, self.loss = target, loss
        self.scope: Any = None
        self.action: object = "building the stages"
        self.began = False
        self.returning: list[Tensor] | None = None
        self.losses: list[Tensor] = []
        self.autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


class StageTrainer:
    """Captures the model, divides it, and trains this rank's stage.

    ``ends``: the feedback points behind which stages end; None before a batch was seen.
    ``owned``: the stage's parameters and buffers by name.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        options: Options,
        links: Links,
        replicas: Replicas,
        microbatches: int,
        stages: Any,
    ) -> None:
        self.state = TrainingState(method, options)
        self.ends: tuple[int, ...] | None = None
        self.owned: dict[str, Tensor] = {}
        self._model, self._method, self._options = model, method, options
        self._links, self._replicas = links, replicas
        self._microbatches, self._stages = microbatches, stages
        self._captures = Captures(model, method, options, self._run)
        self._steps: dict[tuple[int, str, int], StageStep] = {}
        self._job: Job | None = None
        self._broken = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the points behind which stages end."""
        plan = self._captures.plan
        return tuple(plan.layers[k].name for k in self.ends or ()) if plan is not None else ()

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """Parameters that several stages use, by name: these stages, the owner first."""
        return next(iter(self._steps.values())).stages.shared

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(module_tree.parameters(self._model)).device

    def call(self, job: Job, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run a job on a batch. Raises as ``StagedModule.step``."""
        if self._broken:
            raise StageError(f"this pipeline has failed before: {self._broken}")
        if not torch.is_grad_enabled():
            raise InputError("a training step needs gradients enabled; it is inside no_grad()")
        job.scope = Scope(self._model, args, kwargs, False)
        self._job = job
        try:
            self._captures.call(job.scope, self.state.feedback)
        except StageError as e:
            self._broken = str(e).splitlines()[0]
            raise
        except GrapefxError as e:
            if not job.began:
                raise
            raise self._fails(job.action, e) from e
        except Exception as e:
            raise self._fails(job.action, e) from e
        finally:
            self._job = None

    def _fails(self, action: object, error: BaseException) -> StageError:
        found = self._links.failed(action, error)
        self._broken = str(found).splitlines()[0]
        return found

    def _run(self, program: Program, given: list[Any]) -> Sequence[Any]:
        """Called in the place of the captured graph: the whole step happens here."""
        job = self._job
        assert job is not None and program.plan is not None
        if job.returning is not None:
            return job.returning
        plan = program.plan
        batch = program.batch(given)
        if any(isinstance(g, Tensor) and g.requires_grad for k, g in enumerate(given)
               if plan.captured.inputs[k].role == "input"):  # fmt: skip
            raise InputError("a stage gives no gradient to its inputs\n  remedy: x.detach()")
        job.began = True
        kind = self.state.kind(plan)
        step = self._step(program, plan, kind, batch, given)
        outputs = self._outputs(plan)
        if job.loss is None:
            return outputs
        self._train(program, plan, step, batch, given, job)
        return outputs

    def _outputs(self, plan: Plan) -> list[Tensor]:
        """Stand-ins for the model's outputs, which nobody sees."""
        found = [n.meta["val"] for s, n in plan.joint.produced("output")]
        return [torch.empty(0, dtype=v.dtype) for v in found]

    def _step(
        self, program: Program, plan: Plan, kind: str, batch: int, given: list[Any]
    ) -> StageStep:
        key = (id(program), kind, batch)
        if key in self._steps:
            return self._steps[key]
        count, m = len(self._links.ranks), self._microbatches
        self._links.agree({"batch size": batch, "number of microbatches": m})
        if batch % m:
            raise InputError(
                f"a batch of {batch} samples cannot be divided into {m} microbatches of one size"
            )
        if plan.captured.batch is None and m > 1:
            raise InputError(
                "this model's graph holds one batch size only, so it has no microbatches\n"
                "  remedy: microbatches=1"
            )
        size = batch // m
        device = "h100" if self._captures.device_type == "cuda" else "cpu-2core"
        ends = self.ends
        if ends is None:
            ends = ends_of(plan, self._stages, count, size, device)
        graphs = divide_plan(plan, kind, size, ends)
        facts = {
            "stage ends": ends,
            "method": repr(self._method),
            "options": repr(self._options),
            "kind of step": kind,
            "shapes of arguments": [
                tuple(g.shape) for g, s in zip(given, plan.captured.inputs, strict=True)
                if s.role == "input" and isinstance(g, Tensor)
            ],
            "step graph": [_mark(s.step.gm.graph) for s in graphs[0].stages],
        }  # fmt: skip
        if self.ends is None:
            facts["parameters (differently seeded?)"] = _values(self._model)
        self._links.agree(facts)
        step = compile_stage(plan, kind, graphs, ends, self._links.rank, m)
        rank = self._links.rank
        mine = owned(self._model, plan, step.stages, given, rank)
        self.owned = {**mine, **self.owned}
        kept = self.state.feedback.tensors
        self.state.feedback.tensors = of_stage(kept, plan, ends, rank)
        self.ends = ends
        self._steps[key] = step
        return step

    def _train(
        self,
        program: Program,
        plan: Plan,
        step: StageStep,
        batch: int,
        given: list[Any],
        job: Job,
    ) -> None:
        places = program.places
        m, size = self._microbatches, batch // self._microbatches
        fixed = {Slot(role, name): given[k] for (role, name), k in places.items()  # type: ignore[arg-type]
                 if role != "input"}  # fmt: skip
        parts = divided(plan, places, given, m)
        device = given[0].device
        renamed = program.renamed
        feedback = self.state.feedback
        inputs = Inputs(
            fixed=fixed,
            parts=parts,
            feedback=lambda name: feedback.tensors[renamed.get(name, name)],
            loss=functools.partial(self._loss, program, plan, job, size),
            seed=(self._options.seed, self.state.schedule.step),
            noise=self._options.noise,
            device=device,
            offset=self._replicas.rank * m,
        )
        written = [given[k] for k in program.written
                   if plan.captured.inputs[k].name in self.owned]  # fmt: skip
        kept = [b.clone() for b in written]
        try:
            with torch.no_grad(), autocast_off(self._captures.device_type):
                gradients, learned = self._actions(step, inputs, fixed, job)
                changes, finite = self._changes(plan, step, learned, renamed, job)
        except BaseException:
            with torch.no_grad():
                for b, old in zip(written, kept, strict=True):
                    b.copy_(old)
            raise
        exact = step.kind == "calibration" and self._options.calib_refit != "feedback"
        quiet = not exact and self.state.schedule.step < self._options.align_warmup
        self.state.commit(changes, finite, [], [])
        for name, g in gradients.items():
            p = fixed[Slot("parameter", name)]
            g = torch.zeros_like(g) if quiet else g
            p.grad = g if p.grad is None else p.grad + g

    def _actions(
        self, step: StageStep, inputs: Inputs, fixed: dict[Slot, Any], job: Job
    ) -> tuple[dict[str, Tensor], dict[Slot, Tensor]]:
        """Run the schedule; what it found is returned, nothing is changed but buffers."""
        wires = Transfers(self._links, step, inputs.device)
        engine = Engine(step, inputs, wires, self._replicas)
        for action in step.schedule.ranks[self._links.rank]:
            job.action = action
            engine.do(action)
        job.action = "the last sends"
        wires.finish()
        job.action = "summing the gradients of shared parameters"
        like = {s.name: t for s, t in fixed.items() if s.role == "parameter"}
        share(self._links, step.stages.shared, engine.gradients, like)
        job.action = "summing gradients over data-parallel ranks"
        self._replicas.sums(engine.gradients)
        job.losses = engine.losses
        return engine.gradients, engine.learned

    def _loss(
        self, program: Program, plan: Plan, job: Job, size: int, i: int, outs: list[Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of microbatch ``i`` and the cotangents of the model's outputs."""
        keep = plan.differentiable
        with torch.enable_grad(), self._autocast():
            leaves = [
                o.detach().requires_grad_(True) if k else o for o, k in zip(outs, keep, strict=True)
            ]
            job.returning = leaves
            try:
                structured = program.call(job.scope)
            finally:
                job.returning = None
            part = pytree.tree_map(lambda t: rows_of(t, i, size, self._microbatches), job.target)
            assert job.loss is not None
            found = job.loss(structured, part)
            if not isinstance(found, Tensor) or found.ndim:
                raise InputError("loss(output, target) must return a scalar tensor")
            (found / (self._microbatches * self._replicas.size)).backward()
        names = [s.name for s, _ in plan.joint.select("cotangent")]
        live = [o for o, k in zip(leaves, keep, strict=True) if k]
        cotangents = {
            n: torch.zeros_like(o) if o.grad is None else o.grad
            for n, o in zip(names, live, strict=True)
        }
        return found.detach(), cotangents

    def _autocast(self) -> Any:
        device = self._captures.device_type
        on = self._job is not None and self._job.autocast
        return torch.autocast(device, enabled=on, dtype=torch.get_autocast_dtype(device))

    def _changes(
        self,
        plan: Plan,
        step: StageStep,
        learned: dict[Slot, Tensor],
        renamed: dict[str, str],
        job: Job,
    ) -> tuple[dict[str, Any], Tensor | None]:
        """New values of the training state's fields, and whether the maps could learn."""
        finite = learned.get(Slot("metric", "finite"))
        new = {renamed.get(s.name, s.name): t for s, t in learned.items() if s.role == "feedback"}
        metrics = dict(self.state.metrics)
        entries: dict[str, dict[str, Tensor]] = {}
        for slot, value in learned.items():
            name, _, layer = slot.name.partition("/")
            if slot.role == "metric" and layer:
                entries.setdefault(name, {})[layer] = value
        for name, found in entries.items():
            layers = tuple(x for x in plan.layers if x.name in found)
            metrics[name] = (torch.stack([found[x.name].float() for x in layers]), layers)
        schedule = copy.copy(self.state.schedule)
        done, cosine = step.kind == "calibration", math.nan
        if done and new:
            job.action = "agreeing that the calibration fitted"
            done, cosine = self._fitted(new, entries.get("cos_gradient", {}), finite)
        schedule.done(done, cosine)
        changes: dict[str, Any] = {"schedule": schedule, "metrics": metrics}
        if new:
            changes["feedback"] = self.state.feedback.having(new)
        return changes, finite

    def _fitted(
        self, new: dict[str, Tensor], cosines: dict[str, Tensor], finite: Tensor | None
    ) -> tuple[bool, float]:
        """Whether any stage's maps moved in this calibration, and the mean cosine of all layers."""
        old = self.state.feedback.tensors
        moved = any(not torch.equal(t, old[k]) for k, t in new.items())
        values = [float(v) for v in cosines.values() if v == v]
        ok = finite is None or bool(finite)
        found = [float(moved), float(ok), sum(values), float(len(values))]
        total = torch.tensor(found, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self._links.late)
        moves, fine, sums, count = total.tolist()
        auto = self._options.calib_every == "auto" and count > 0
        return moves > 0 and fine == len(self._links.ranks), sums / count if auto else math.nan


def _mark(graph: torch.fx.Graph) -> int:
    text = "\n".join(
        f"{n.op} {n.target} {n.args} {getattr(n.meta.get('val'), 'shape', '')}" for n in graph.nodes
    )
    return zlib.crc32(text.encode())


def _values(model: nn.Module) -> str:
    """Names, shapes and sums of all parameters."""
    own = [
        (n, tuple(p.shape), p.detach().double().sum().item())
        for n, p in module_tree.named_parameters(model)
    ]
    return f"{zlib.crc32(repr(own).encode()):08x}"
