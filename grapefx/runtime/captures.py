"""Which captured call serves a call, and the new capture where none does."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grapefx.capture import Scope, dense, flatten_call, module_tree
from grapefx.capture.untraceable import distributed_tensor
from grapefx.errors import InputError, tell
from grapefx.methods import Method
from grapefx.options import Options
from grapefx.passes.runner import PassRun
from grapefx.plan import Plan, build_forward, plan_call
from grapefx.runtime import hooks, inplace
from grapefx.runtime.building import building
from grapefx.runtime.program import Program
from grapefx.runtime.state import FeedbackState
from grapefx.torch_compat import global_hooks, prepare_inductor, without_trackers

_RESTLESS = 8  # captures for one reason before it is named

Runner = Callable[[Program, list[Any]], Sequence[Any]]


class Captures:
    """The programs of one module; each knows the calls that it is valid for.

    ``plan``: of the last training capture. ``device_type``: of the parameters.
    """

    def __init__(self, model: nn.Module, method: Method, options: Options, run: Runner) -> None:
        self.model = model
        self.method = method
        self.options = options
        self.plan: Plan | None = None
        self.device_type = "cpu"
        self._run = run
        self._programs: tuple[Program, ...] = ()  # the one used last comes first
        self._lengths = _Lengths(options.batch_dim)
        self._numbers: frozenset[str] = frozenset()  # integers that change between calls
        self._reasons: dict[str, int] = {}
        self._told_hooks: set[str] = set()

    @property
    def programs(self) -> dict[int, Program]:
        """Everything captured so far, in order of use (the last first)."""
        return dict(enumerate(self._programs))

    def call(self, scope: Scope, feedback: FeedbackState) -> Any:
        """What the model returns for a call; captured anew where no program holds for it.

        ``feedback``: where a new capture finds or puts its layers' tensors.

        Raises:
            GrapefxError: the model cannot be captured, or the method is not defined on it.
        """
        if global_hooks():
            with without_trackers():
                return self._call(scope, feedback)
        return self._call(scope, feedback)

    def _call(self, scope: Scope, feedback: FeedbackState) -> Any:
        program = self._find(scope)
        if program is None and (other := dense(scope.args, scope.kwargs)) is not None:
            scope = replace(scope, args=other[0], kwargs=other[1])
            program = self._find(scope)
        if program is None:
            with building():
                program = self._find(scope)  # another thread may have been first
                if program is None:
                    program = self._capture(scope, feedback)
                    self._programs = (program, *self._programs)
        return program.call(scope)

    def _find(self, scope: Scope) -> Program | None:
        known = self._programs
        for k, program in enumerate(known):
            if program.capture.holds(scope):
                if k:
                    self._programs = (program, *known[:k], *known[k + 1 :])
                return program
        return None

    def forget(self) -> None:
        """Drop all programs: they hold weak references, with which torch swaps no parameter."""
        self._programs = ()
        if self.plan is not None:
            self.plan.capture = replace(self.plan.capture, holds=lambda scope: False)

    def ensure_states(self, feedback: FeedbackState) -> None:
        """Feedback tensors for every program, after other ones were loaded."""
        for program in self._programs:
            if program.plan is not None:
                program.renamed = self._ensure(program.plan, feedback)

    def _capture(self, scope: Scope, feedback: FeedbackState) -> Program:
        leaves, spec = flatten_call(scope.args, scope.kwargs)
        if distributed_tensor(leaves):
            raise InputError(
                "an argument is a DTensor, and the model's graph is one of local tensors\n"
                "  remedy: pass x.to_local()"
            )
        self._check_devices(leaves)
        if self.options.backend == "inductor" and self.device_type == "cpu":
            prepare_inductor()
        training = torch.is_grad_enabled() and (
            any(p.requires_grad for p in module_tree.parameters(self.model))
            or any(isinstance(t, Tensor) and t.requires_grad for t in leaves)
        )
        self._check_batch(leaves, training)
        options = self.options
        others = self._lengths.moving(leaves, (spec, training))
        if self._programs:
            self._look_at_changes(scope, training)
        self._check_hooks(scope, training)
        if training:
            plan = plan_call(scope, self.method, options, others, self._numbers)
            found = plan.capture
            program = Program(found, plan, None, options, self._ensure(plan, feedback))
            # not that of a model that is frozen for now
            if any(s.role == "gradient" for s in plan.joint.outputs):
                self.plan = plan
            notes: Sequence[str] = plan.notes
        else:
            found, step = build_forward(scope, options, others, self._numbers)
            program = Program(found, None, step, options, {})
            notes = found.captured.notes
        if others and len(found.symbols()) == (found.captured.batch is not None):
            self._lengths.stay((spec, training), others)
        for note in notes:
            tell(note)
        program.call = found.bind(functools.partial(self._run, program))
        program.capture = found.bound()
        if program.plan is not None:
            program.plan.capture = program.capture
        return program

    def _look_at_changes(self, scope: Scope, training: bool) -> None:
        """Why a new capture is needed: an integer gets a symbol the second time, as sizes do; what
        has been the reason for the eighth time is told once.
        """
        same = [p for p in self._programs if (p.plan is not None) == training]
        reason = same[0].capture.broken(scope) if same else ""
        if same and (name := same[0].capture.changed(scope)):
            self._numbers |= {name}
        kind = re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", reason.partition("#")[0]).strip()
        self._reasons[kind] = self._reasons.get(kind, 0) + 1
        if reason and self._reasons[kind] == _RESTLESS:
            tell(
                f"something that the model reads keeps changing, and each new value needs a new "
                f"capture: {reason}\n  remedy: make it a buffer, or pass it as a tensor"
            )

    def lowered(self) -> dict[str, tuple[PassRun, ...]]:
        """The passes in front of the compiler that ran for the last plan, by kind of step."""
        own = [p for p in self._programs if p.plan is self.plan]
        return {kind: step.passes for p in own for (kind, _), step in p.steps.items()}

    def _ensure(self, plan: Plan, feedback: FeedbackState) -> dict[str, str]:
        """Feedback tensors for every layer of a plan; returns those that go by another key."""
        specs = plan.state_specs()
        if not specs and not plan.late:
            return {}
        parameter = next(p for p in module_tree.parameters(self.model) if p.requires_grad)
        dtype = torch.promote_types(parameter.dtype.to_real(), torch.float32)
        return feedback.ensure(specs, dtype, parameter.device, plan.late)

    def _check_batch(self, leaves: Sequence[Any], training: bool) -> None:
        dim = self.options.batch_dim
        batch = next((t.shape[dim] for t in leaves if isinstance(t, Tensor) and t.ndim > dim), None)
        if batch == 0 and training and not self.method.exact:
            raise InputError(
                "no step can be taken on a batch of no samples\n  remedy: leave empty batches out"
            )

    def _check_hooks(self, scope: Scope, training: bool) -> None:
        for part in module_tree.modules(self.model):
            if part is not self.model:
                inplace.traced(part)
        if training or self.options.capture == "dynamo":
            hooks.refuse_backward(self.model, root=not scope.inner)
        if self.options.capture == "dynamo":
            return  # what a hook does runs in every call
        if not self._programs:
            tell(
                "capture='export' watches the module tree, modes, hooks, layouts and plain numbers "
                "on modules and in arguments: other changes of what the forward reads, and what it "
                "does beside computing, are not seen after the capture"
            )
        for note in hooks.traced(self.model):
            if note not in self._told_hooks:
                self._told_hooks.add(note)
                tell(note)

    def _check_devices(self, leaves: Sequence[Any]) -> None:
        parameter = next(module_tree.parameters(self.model), None)
        if parameter is None:
            return
        self.device_type = parameter.device.type
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.device != parameter.device and leaf.ndim > 0:
                raise InputError(
                    f"an input is on {leaf.device}, the parameters are on {parameter.device}: move "
                    "one of them (x.to(device) or net.to(device))"
                )


class _Lengths:
    """Which dims beside the batch have changed between captures: they get symbols, as in
    ``torch.compile``, the second time.
    """

    def __init__(self, batch_dim: int) -> None:
        self._batch_dim = batch_dim
        self._last: dict[Any, list[tuple[int, ...] | None]] = {}
        self._moved: dict[Any, set[tuple[int, int]]] = {}
        self._fixed: dict[Any, set[tuple[int, int]]] = {}

    def moving(self, leaves: Sequence[Any], key: Any) -> frozenset[tuple[int, int]]:
        """At a capture: (leaf, dim) of each dim that is known to change in calls like this one."""
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves]
        last, self._last[key] = self._last.get(key), shapes
        moved = self._moved.setdefault(key, set())
        if last is not None:
            dim = self._batch_dim
            batch = next((s[dim] for s in shapes if s is not None and len(s) > dim), None)
            for i, (a, b) in enumerate(zip(last, shapes, strict=True)):
                if a is None or b is None or len(a) != len(b):
                    continue
                moved |= {
                    (i, d)
                    for d, (m, n) in enumerate(zip(a, b, strict=True))
                    if m != n and not (d == dim and n == batch)
                }
        return frozenset(moved - self._fixed.get(key, set()))

    def stay(self, key: Any, dims: frozenset[tuple[int, int]]) -> None:
        """These could not be symbolic: each new length is a capture of its own."""
        self._fixed.setdefault(key, set()).update(dims)
