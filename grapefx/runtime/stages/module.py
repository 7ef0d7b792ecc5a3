"""What ``grapefx.compile(model, pipeline=...)`` returns: one stage of a model, trained by steps."""

from __future__ import annotations

import copy
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grapefx import tree
from grapefx.capture import Scope
from grapefx.errors import (
    GrapefxError,
    InputError,
    OptionError,
    StageError,
    StateError,
)
from grapefx.ir import Slot
from grapefx.methods import Method
from grapefx.options import Options
from grapefx.plan import Plan
from grapefx.runtime.call import autocast_off
from grapefx.runtime.captures import Captures
from grapefx.runtime.program import Program
from grapefx.runtime.stages.compiled import StageStep, compile_stage
from grapefx.runtime.stages.engine import Engine, Inputs
from grapefx.runtime.stages.microbatches import divided, rows_of
from grapefx.runtime.stages.ownership import of_stage, owned
from grapefx.runtime.stages.wires import Links, Replicas, Transfers, share
from grapefx.runtime.training_state import TrainingState
from grapefx.staging import check_method, divide_plan, ends_of
from grapefx.torch_compat import pytree
from grapefx.untraceable import Compiled

Loss = Callable[[Any, Any], Tensor]


class StagedModule(Compiled, nn.Module):
    """One stage of a model in each process of a pipeline.

    Every process builds the whole model and calls ``step`` with the same batch; it computes its own
    stage and fills the gradients of the stage's parameters. ``parameters()``, ``state_dict()`` and
    ``feedback_state_dict()`` are those of the stage, under the names of the whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        options: Options,
        *,
        pipeline: Any,
        microbatches: int = 1,
        stages: Any = "auto",
        data_parallel: Any = None,
        stage_timeout: float = 300.0,
    ) -> None:
        super().__init__()
        _check(method, options)
        for option, value in (("microbatches", microbatches), ("stage_timeout", stage_timeout)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise OptionError(f"{option}={value!r} must be a positive number")
        if not isinstance(microbatches, int):
            raise OptionError(f"microbatches={microbatches!r} must be a positive integer")
        self.__dict__["_original"] = model
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = model.__dict__[name]  # torch's checkpoints walk the tree
        self._options, self._method = options, method
        self._microbatches, self._stages = microbatches, stages
        self._links = Links(_group(pipeline, "pipeline"), stage_timeout)
        self._replicas = Replicas(
            None if data_parallel is None else _group(data_parallel, "data_parallel")
        )
        self._state = TrainingState(method, options)
        self._captures = Captures(model, method, options, self._run)
        self._ends: tuple[int, ...] | None = None
        self._owned: dict[str, Tensor] = {}
        self._steps: dict[tuple[int, str, int], StageStep] = {}
        self._job: _Job | None = None
        self._broken = ""

    # the stage that users see

    @property
    def original(self) -> nn.Module:
        """The whole model; only the stage's own parameters are trained here."""
        model: nn.Module = self.__dict__["_original"]
        return model

    @property
    def stage(self) -> int:
        """This process's stage."""
        return self._links.rank

    @property
    def is_last(self) -> bool:
        """Whether this process computes the loss."""
        return self.stage == len(self._links.ranks) - 1

    @property
    def ends(self) -> tuple[str, ...]:
        """The feedback points behind which stages end; known after ``prepare`` or a first step."""
        plan = self._captures.plan
        return tuple(plan.layers[k].name for k in self._ends or ()) if plan is not None else ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: a rank has a part of the model.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a stage cannot be called: it computes a part of the model only\n  remedy: train with "
            "net.step(x, target=y, loss=loss_fn); to evaluate, load a checkpoint of all stages "
            "into the plain model"
        )

    def train(self, mode: bool = True) -> StagedModule:
        """As the model's."""
        super().train(mode)
        self.original.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None:
                raise
            return getattr(original, name)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The stage's own parameters, by their names in the whole model.

        Raises:
            InputError: the stages are not known yet.
        """
        self._known()
        for name, p in self.original.named_parameters(*args, **kwargs):
            if any(p is own for own in self._owned.values()):
                yield name, p

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The stage's own parameters."""
        for _, p in self.named_parameters(recurse=recurse):
            yield p

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The stage's own parameters and buffers, with the keys of the whole model."""
        self._known()
        found = self.original.state_dict(*args, **kwargs)
        own = {t.data_ptr() for t in self._owned.values()}
        for key in [k for k, t in found.items() if isinstance(t, Tensor)]:
            if found[key].data_ptr() not in own:
                del found[key]
        return found

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the stage's own keys; others are left alone."""
        own = set(self.state_dict())
        missing = own - set(state)
        if strict and missing:
            raise StateError(f"the state dict misses {sorted(missing)[:3]} of stage {self.stage}")
        mine = {k: v for k, v in state.items() if k in own}
        return self.original.load_state_dict(mine, strict=False, assign=assign)

    def feedback_state_dict(self) -> dict[str, Any]:
        """The stage's own feedback maps by "layer/name", and the counters, equal on all stages."""
        self._known()
        saved = self._state.saved()
        return {"tensors": {k: v.clone() for k, v in saved["tensors"].items()},
                "schedule": saved["schedule"]}  # fmt: skip

    def load_feedback_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the maps of the stage's own layers, and the counters."""
        self._known()
        have = self._state.feedback.tensors
        missing = set(have) - set(state["tensors"])
        if missing:
            raise StateError(f"the feedback state misses {sorted(missing)[:3]}")
        self._state.feedback.tensors = {k: state["tensors"][k].detach().clone() for k in have}
        self._state.schedule.load(state["schedule"])

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch that begins."""
        self._state.schedule.set_epoch(epoch)

    def alignment(self) -> dict[str, dict[str, float]]:
        """Last measured cosines of the stage's own layers; see ``FeedbackModule.alignment``."""
        return self._state.alignment()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients of all stages so that their norm together is at most ``max_norm``.

        Returns the norm before. All ranks of the pipeline wait for each other here.
        """
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        shared = self._any().stages.shared
        twice = {id(self._owned[n]) for n, held in shared.items()
                 if self.stage in held[1:] and n in self._owned}  # fmt: skip
        once = [p.grad for p in self.parameters() if p.grad is not None and id(p) not in twice]
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for g in once:
            total += g.detach().double().square().sum()
        dist.all_reduce(total, group=self._links.late)
        norm = total.sqrt()
        scale = min(1.0, max_norm / (float(norm) + 1e-6))
        for g in grads:
            g.mul_(scale)
        return norm

    @property
    def _device(self) -> torch.device:
        return next(tree.parameters(self.original)).device

    def _known(self) -> None:
        if self._ends is None:
            raise InputError(
                "the stages are not known before the model was captured\n  remedy: call "
                "net.prepare(x) with a batch, on all ranks, before the optimizer is made"
            )

    def _any(self) -> StageStep:
        return next(iter(self._steps.values()))

    # steps

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Capture the model on a batch and divide it; all ranks call it. Nothing is trained."""
        self._call(_Job(None, None, True), args, kwargs)

    def step(self, *args: Any, target: Any, loss: Loss, **kwargs: Any) -> Tensor | None:
        """One training step on a batch; fills the gradients of the stage's parameters.

        Args:
            args: the model's arguments, kwargs too. Their values are read on the first stage, their
                shapes on all; the batch must be divisible by the number of microbatches.
            target: a tensor, or a nest of tensors, batch first; its values are read on the last.
            loss: ``loss(output, target)`` of a microbatch, the mean over its samples.

        Returns:
            The microbatches' losses on the last stage, None on the others.

        Raises:
            StageError: this rank or another failed; nothing of this step is committed here.
            InputError: a batch that cannot be divided.
        """
        job = _Job(target, loss, False)
        self._call(job, args, kwargs)
        return torch.stack(job.losses) if job.losses else None

    def _call(self, job: _Job, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._broken:
            raise StageError(f"this pipeline has failed before: {self._broken}")
        if not torch.is_grad_enabled():
            raise InputError("a training step needs gradients enabled; it is inside no_grad()")
        job.scope = Scope(self.original, args, kwargs, False)
        self._job = job
        try:
            self._captures.call(job.scope, self._state.feedback)
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
        kind = self._state.kind(plan)
        step = self._step(program, plan, kind, batch, given)
        outputs = self._outputs(plan)
        if job.only_prepare:
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
        ends = self._ends
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
        if self._ends is None:
            facts["parameters (differently seeded?)"] = _values(self.original)
        self._links.agree(facts)
        step = compile_stage(plan, kind, graphs, ends, self._links.rank, m)
        rank = self._links.rank
        mine = owned(self.original, plan, step.stages, given, rank)
        self._owned = {**mine, **self._owned}
        kept = self._state.feedback.tensors
        self._state.feedback.tensors = of_stage(kept, plan, ends, rank)
        self._ends = ends
        self._steps[key] = step
        return step

    def _train(
        self,
        program: Program,
        plan: Plan,
        step: StageStep,
        batch: int,
        given: list[Any],
        job: _Job,
    ) -> None:
        places = program.places
        m, size = self._microbatches, batch // self._microbatches
        fixed = {Slot(role, name): given[k] for (role, name), k in places.items()  # type: ignore[arg-type]
                 if role != "input"}  # fmt: skip
        parts = divided(plan, places, given, m)
        device = given[0].device
        renamed = program.renamed
        feedback = self._state.feedback
        inputs = Inputs(
            fixed=fixed,
            parts=parts,
            feedback=lambda name: feedback.tensors[renamed.get(name, name)],
            loss=functools.partial(self._loss, program, plan, job, size),
            seed=(self._options.seed, self._state.schedule.step),
            noise=self._options.noise,
            device=device,
            offset=self._replicas.rank * m,
        )
        written = [given[k] for k in program.written
                   if plan.captured.inputs[k].name in self._owned]  # fmt: skip
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
        quiet = not exact and self._state.schedule.step < self._options.align_warmup
        self._state.commit(changes, finite, [], [])
        for name, g in gradients.items():
            p = fixed[Slot("parameter", name)]
            g = torch.zeros_like(g) if quiet else g
            p.grad = g if p.grad is None else p.grad + g

    def _actions(
        self, step: StageStep, inputs: Inputs, fixed: dict[Slot, Any], job: _Job
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
        self, program: Program, plan: Plan, job: _Job, size: int, i: int, outs: list[Tensor]
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
        job: _Job,
    ) -> tuple[dict[str, Any], Tensor | None]:
        """New values of the training state's fields, and whether the maps could learn."""
        finite = learned.get(Slot("metric", "finite"))
        new = {renamed.get(s.name, s.name): t for s, t in learned.items() if s.role == "feedback"}
        metrics = dict(self._state.metrics)
        entries: dict[str, dict[str, Tensor]] = {}
        for slot, value in learned.items():
            name, _, layer = slot.name.partition("/")
            if slot.role == "metric" and layer:
                entries.setdefault(name, {})[layer] = value
        for name, found in entries.items():
            layers = tuple(x for x in plan.layers if x.name in found)
            metrics[name] = (torch.stack([found[x.name].float() for x in layers]), layers)
        schedule = copy.copy(self._state.schedule)
        done, cosine = step.kind == "calibration", math.nan
        if done and new:
            job.action = "agreeing that the calibration fitted"
            done, cosine = self._fitted(new, entries.get("cos_gradient", {}), finite)
        schedule.done(done, cosine)
        changes: dict[str, Any] = {"schedule": schedule, "metrics": metrics}
        if new:
            changes["feedback"] = self._state.feedback.having(new)
        return changes, finite

    def _fitted(
        self, new: dict[str, Tensor], cosines: dict[str, Tensor], finite: Tensor | None
    ) -> tuple[bool, float]:
        """Whether any stage's maps moved in this calibration, and the mean cosine of all layers."""
        old = self._state.feedback.tensors
        moved = any(not torch.equal(t, old[k]) for k, t in new.items())
        values = [float(v) for v in cosines.values() if v == v]
        ok = finite is None or bool(finite)
        found = [float(moved), float(ok), sum(values), float(len(values))]
        total = torch.tensor(found, dtype=torch.float64, device=self._device)
        dist.all_reduce(total, group=self._links.late)
        moves, fine, sums, count = total.tolist()
        auto = self._options.calib_every == "auto" and count > 0
        return moves > 0 and fine == len(self._links.ranks), sums / count if auto else math.nan


class _Job:
    """One call of ``step`` on its way."""

    def __init__(self, target: Any, loss: Loss | None, only_prepare: bool) -> None:
        self.target, self.loss, self.only_prepare = target, loss, only_prepare
        self.scope: Any = None
        self.action: object = "building the stages"
        self.began = False
        self.returning: list[Tensor] | None = None
        self.losses: list[Tensor] = []
        self.autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _check(method: Method, options: Options) -> None:
    """Raise ``MethodError`` or ``OptionError`` for what stages cannot do."""
    check_method(method)
    for name, bad in (("calib_update", "sgd"), ("calib_refit", "feedback")):
        if getattr(options, name) == bad and not method.exact:
            raise OptionError(f"{name}={bad!r} does not go with pipeline=")
    if options.mean_field is not None:
        raise OptionError(
            f"mean_field={options.mean_field!r} is a chain through all stages, which does not go "
            "with pipeline=\n  remedy: leave mean_field out"
        )
    if options.exact_rows:
        raise OptionError(
            f"exact_rows={options.exact_rows!r} is a backward chain through all stages, which does "
            "not go with pipeline=\n  remedy: leave exact_rows out"
        )


def _group(mesh: Any, name: str) -> Any:
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if hasattr(mesh, "get_group") and mesh.ndim == 1:
        return mesh.get_group()
    raise OptionError(
        f"{name}= takes one dim of a DeviceMesh, mesh['pp'], or a process group, not "
        f"{type(mesh).__name__}"
    )


def _mark(graph: torch.fx.Graph) -> int:
    text = "\n".join(
        f"{n.op} {n.target} {n.args} {getattr(n.meta.get('val'), 'shape', '')}" for n in graph.nodes
    )
    return zlib.crc32(text.encode())


def _values(model: nn.Module) -> str:
    """Names, shapes and sums of all parameters."""
    own = [
        (n, tuple(p.shape), p.detach().double().sum().item())
        for n, p in tree.named_parameters(model)
    ]
    return f"{zlib.crc32(repr(own).encode()):08x}"


__all__ = ["StagedModule"]
