"""The drop-in: an ``nn.Module`` that shares everything with the user's and trains by feedback."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grapefx.capture import Scope, flatten_call, module_tree
from grapefx.capture.untraceable import Compiled
from grapefx.errors import BackwardError, CaptureError, InputError, OptionError
from grapefx.methods import Method
from grapefx.options import Options
from grapefx.plan import Plan
from grapefx.plan.recommend import reason
from grapefx.runtime import inplace, names
from grapefx.runtime.call import TrainingCall, autocast_off, kept_buffers
from grapefx.runtime.captures import Captures
from grapefx.runtime.function import DUAL, Step
from grapefx.runtime.program import Program
from grapefx.runtime.training_state import TrainingState
from grapefx.torch_compat import dual, in_dual_level, transforming

if TYPE_CHECKING:
    from grapefx.report import Report
    from grapefx.report.training import TrainingReport
    from grapefx.report.training_records import StepRecord

# what Python looks up on the class: len(net), net[0], for layer in net
_CONTAINER = ("__len__", "__getitem__", "__iter__", "__contains__")
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip
_SHARED = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


class FeedbackModule(Compiled, nn.Module):
    """The result of ``grapefx.compile``.

    It shares parameters, buffers and children with the wrapped module, so ``state_dict()`` has the
    plain model's keys, inside a parent module too. Attributes and methods of the wrapped module are
    reachable through it. Where a name is grapefx's (``runtime.names``), ``original`` has the
    model's.
    """

    _original: nn.Module
    _method: Method
    _options: Options
    _state: TrainingState
    _captures: Captures
    _installed: bool
    _begun: frozenset[str]

    def __new__(cls, model: nn.Module, *_: Any) -> FeedbackModule:
        """An instance whose ``forward`` has the signature of ``model``'s: trainers read it."""
        return super().__new__(_class_for(type(model)))  # type: ignore[arg-type]

    def __init__(self, model: nn.Module, method: Method, options: Options) -> None:
        super().__init__()
        self.__dict__["_original"] = model
        for name in _SHARED:
            self.__dict__[name] = model.__dict__[name]
        self.__dict__.update(
            _method=method,
            _options=options,
            _state=TrainingState(method, options),
            _installed=False,
        )
        self.__dict__["_captures"] = Captures(model, method, options, self._run)
        self.__dict__["_begun"] = frozenset({*self.__dict__, "_begun"})

    # the module that users see

    @property
    def training(self) -> bool:
        """The wrapped module's mode."""
        return self._original.training

    @training.setter
    def training(self, mode: bool) -> None:
        original = self.__dict__.get("_original")
        if original is not None:  # nn.Module.__init__ comes first
            original.training = mode

    def train(self, mode: bool = True) -> FeedbackModule:
        """As the wrapped module's."""
        self._original.train(mode)
        return self

    def eval(self) -> FeedbackModule:
        """As the wrapped module's."""
        self._original.eval()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> FeedbackModule:
        if torch.__future__.get_swap_module_params_on_conversion():
            self._captures.forget()
            gc.collect()  # graphs refer to themselves
        self._original._apply(*args, **kwargs)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The plain model's, key for key. The learning state is in ``feedback_state_dict``."""
        return self._original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The plain model's."""
        return self._original.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._original._load_from_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None:
                raise
            return getattr(original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        original = self.__dict__.get("_original")
        if original is None or self._keeps(name):
            super().__setattr__(name, value)
        else:
            setattr(original, name, value)

    def __delattr__(self, name: str) -> None:
        original = self.__dict__.get("_original")
        if original is None or self._keeps(name):
            super().__delattr__(name)
        else:
            delattr(original, name)

    def _keeps(self, name: str) -> bool:
        """Whether an attribute is written on the wrapper, not on the model."""
        original = self.__dict__["_original"]
        if name in names.public(FeedbackModule) or (
            name in self.__dict__.get("_begun", ()) and names.has(original, name)
        ):
            raise AttributeError(
                f"{name!r} is grapefx's own on the compiled module and cannot be set or deleted\n"
                f"  remedy: net.original.{name} is the model's"
            )
        # a new forward (accelerate puts autocast around it) is one of the wrapper
        if name in ("training", "forward") or name in self.__dict__:
            return True
        # trainers leave notes under private names; those that the model has are the model's
        return name.startswith("_") and not names.has(original, name)

    def _get_name(self) -> str:
        return "FeedbackModule"

    def extra_repr(self) -> str:
        """The method and what wraps what."""
        return f"{type(self._original).__name__} trained by {self._method.name}"

    def __deepcopy__(self, memo: dict[int, Any]) -> FeedbackModule | None:
        if self._installed and id(self._original) in memo:
            return None  # the copy of a model that was compiled in place is a plain model
        new = FeedbackModule(copy.deepcopy(self._original, memo), self._method, self._options)
        memo[id(self)] = new
        new._restore(*copy.deepcopy((self._state.saved(), self._set_by_user()), memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._installed:
            return type(None), ()
        own = (self._original, self._method, self._options)
        return _rebuild, (*own, self._state.saved(), self._set_by_user())

    def _set_by_user(self) -> dict[str, Any]:
        """Hooks on the net itself, and attributes that it did not begin with."""
        names = {k for k in self.__dict__ if k not in self._begun} | set(_HOOKS)
        return {k: self.__dict__[k] for k in names - {"_compiled_call_impl", "forward"}}

    def _restore(self, saved: dict[str, Any], more: dict[str, Any]) -> None:
        self.__dict__.update(more)
        self._state.restore(saved)

    # training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One call. With gradients enabled it is a training step: backward fills ``p.grad``."""
        if transforming():
            raise BackwardError(
                "torch.func transforms (grad, vmap, jvp) cannot pass through a grapefx module: its "
                "gradients are not the derivative of a graph. Use the plain model for it."
            )
        if torch.compiler.is_exporting():
            raise CaptureError(
                "torch.export of a grapefx module would be a module that backpropagates\n"
                "  remedy: export net.original, the plain model"
            )
        if in_dual_level() and dual(flatten_call(args, kwargs)[0], self._original_tensors()):
            raise BackwardError(DUAL)
        scope = Scope(self._original, args, kwargs, self._installed)
        return self._captures.call(scope, self._state.feedback)

    def _original_tensors(self) -> Iterator[Any]:
        for module in module_tree.modules(self._original):
            yield from module._parameters.values()
            yield from module._buffers.values()

    def _run(self, program: Program, given: list[Any]) -> Any:
        """The graphs of one call; ``given`` are the captured graph's inputs."""
        return self._infer(program, given) if program.plan is None else self._train(program, given)

    def _infer(self, program: Program, given: list[Any]) -> Any:
        device = self._captures.device_type
        with autocast_off(device):
            compiled = program.infer(program.batch(given))
        arguments = [given[ref] for _, ref in compiled.sources]
        with autocast_off(device), torch.no_grad(), kept_buffers(program, given):
            return compiled.forward(arguments)

    def _train(self, program: Program, given: list[Any]) -> Any:
        plan = program.plan
        assert plan is not None
        self._state.schedule.tell_once()
        kind = self._state.kind(plan)
        device = self._captures.device_type
        if kind == "calibration" and self._options.calib_update == "sgd":
            own = "calib_update='sgd' steps by itself, with gradients that it would have scaled"
            _refuse_scaled(device, own, "calib_update='grad'")
        if self._options.exact_late:
            late = "exact_late=True adds a correction that has the scale of the step before"
            _refuse_scaled(device, late, "exact_late=False")
        batch = program.batch(given)
        with autocast_off(device):
            step = program.step(kind, batch)
        drawn = self._state.noise(step, plan.rows(batch), program.sizes(given), given[0].device)
        arguments = [given[ref] if role == "given" else drawn[ref] for role, ref in step.sources]
        call = TrainingCall(self._state, program, kind == "calibration", batch, given, device)
        with autocast_off(device):
            return Step.apply(call, step, arguments, *[given[k] for k in step.leaves])

    # what users ask

    @property
    def skipped_updates(self) -> int:
        """Steps whose feedback update was skipped because a value was not finite."""
        return self._state.skipped

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch that begins (as ``DistributedSampler.set_epoch``).

        A model's own ``set_epoch`` is called as well.
        """
        self._state.read_flags()
        self._state.schedule.set_epoch(epoch)
        own = getattr(self._original, "set_epoch", None)
        if callable(own) and not self._installed:
            own(epoch)  # in place, the model's own is where it was

    def targets(self, y: Tensor) -> None:
        """Give the class targets of the next ``backward``, for methods that read them.

        ``y``: class indices (N, ...) of an output (N, ..., C), negative where there is none, or one
        row of class probabilities each. They hold for one backward.
        """
        self._state.targets = y.detach()

    @contextlib.contextmanager
    def calibration(self) -> Iterator[None]:
        """Every training step inside is a calibration step."""
        self._state.schedule.forced += 1
        try:
            yield
        finally:
            self._state.schedule.forced -= 1

    def alignment(self) -> dict[str, dict[str, float]]:
        """Last measured cosines by layer name.

        ``cos_jacobian``: cos_F(B, J^) of the last aligned step (GrAPE 2026 eq. 5).
        ``cos_gradient``: the cosine between the feedback gradient and the true gradient of the
        layer's parameters at the last calibration step. A key is absent while unknown.
        """
        return self._state.alignment()

    def feedback_state_dict(self) -> dict[str, Any]:
        """The learning state: feedback maps, their optimizer, counters; beside ``state_dict``."""
        return self._state.state_dict(self._original)

    def load_feedback_state_dict(self, state: dict[str, Any]) -> None:
        """Take the learning state over; ``StateError``, and nothing changed, if it does not fit."""
        feedback = self._state.checked(state, self._original)
        self._captures.ensure_states(feedback)
        self._state.load(state, feedback)

    def explain(self, **choices: Any) -> Report:
        """What was decided for this model and what it costs, as ``grapefx.inspect`` says it.

        Printed: layers, feedback maps, what runs when, the proof that updates are independent,
        work, span, critical path. ``choices``: ``device``, ``workers``, ``batch`` of ``inspect``;
        ``passes=True`` also lists what each compiler pass did.

        Raises:
            InputError: there is no plan yet, because no training batch has come.
        """
        from grapefx.report.inspect import explain

        if self.plan is None:
            raise InputError(
                "nothing to explain yet: the plan is made at the first training call, net(x)\n"
                "  without one: grapefx.inspect(model, example)"
            )
        name = type(self._original).__name__
        graph, points = self.plan.joint.gm.graph, len(self.plan.layers)
        chosen = reason(self._method, self._options, graph, points)
        return explain(self.plan, name, lowered=self._captures.lowered(), chosen=chosen, **choices)

    def record(self, steps: int | None = 10_000) -> None:
        """Keep what each training step measures, for ``history`` and ``report()``.

        Calibrations are kept without asking. ``steps``: how many of the others, the latest ones;
        None stops. Recording reads a clock four times a step, and on an accelerator waits for it
        as often.
        """
        if steps is None:
            self._state.history.stop()
        elif isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"record(steps={steps!r}): a positive integer, or None to stop")
        else:
            self._state.history.start(steps)

    @property
    def history(self) -> tuple[StepRecord, ...]:
        """The steps that were kept, oldest first: calibrations, and what ``record()`` asked for.

        It belongs to this object: checkpoints and copies begin a new one.
        """
        return self._state.history.records()

    @property
    def calibrations(self) -> int:
        """How many calibration steps there were, over checkpoints."""
        return self._state.schedule.calibrations

    def report(self) -> TrainingReport:
        """What happened in training: alignment over time, times, calibrations, memory, skips.

        Print it, or open ``report().html()``; a notebook shows the page. Without ``record()``
        before training it knows calibrations only.

        Raises:
            InputError: there was no training step yet.
        """
        from grapefx.report.training import training_report

        programs = self._captures.programs.values()
        compiled = [s.seconds for p in programs for s in p.steps.values()]
        compiled += [f.seconds for p in programs for f in p.forwards.values()]
        return training_report(
            model=type(self._original).__name__,
            method=self._method.name,
            steps=self._state.schedule.step,
            epoch=self._state.schedule.epoch,
            history=self.history,
            layers=[layer.name for layer in self.plan.layers] if self.plan is not None else [],
            calibration_count=self.calibrations,
            compile_seconds=sum(compiled),
            state=self.feedback,
            skipped=self.skipped_updates,
            explain=self.explain,
        )

    def restore(self) -> nn.Module:
        """Undo ``compile(..., inplace=True)``: the model runs its own forward again.

        Returns it. The learning state stays here. Raises ``OptionError`` for a wrapper.
        """
        return inplace.uninstall(self._original)

    @property
    def original(self) -> nn.Module:
        """The model that was compiled: for those of its attributes that a name here hides."""
        return self._original

    @property
    def plan(self) -> Plan | None:
        """The plan of the last training capture; None before the first training call."""
        return self._captures.plan

    @property
    def feedback(self) -> dict[str, Tensor]:
        """The feedback tensors by "layer/name" (read-only view of the present values)."""
        return dict(self._state.feedback.latest())


def _refuse_scaled(device: str, what: str, remedy: str) -> None:
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.float16:
        raise InputError(
            f"float16 needs a GradScaler, and {what}\n"
            f"  remedy: {remedy}, or autocast to bfloat16 without a GradScaler"
        )


def _rebuild(
    model: nn.Module,
    method: Method,
    options: Options,
    saved: dict[str, Any],
    more: dict[str, Any],
) -> FeedbackModule:
    new = FeedbackModule(model, method, options)
    new._restore(saved, more)
    return new


@functools.lru_cache(maxsize=256)
def _class_for(model: type[nn.Module]) -> type[FeedbackModule]:
    """``FeedbackModule`` for models of one class, under its name: trainers look at both."""
    plain = FeedbackModule.forward
    forward = types.FunctionType(plain.__code__, plain.__globals__, plain.__name__)
    with contextlib.suppress(TypeError, ValueError):
        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
    forward.__doc__ = plain.__doc__
    members = names.delegated(model, FeedbackModule)
    members |= {name: _delegated(name) for name in _CONTAINER if hasattr(model, name)}
    members["forward"] = torch.compiler.disable(forward, reason="grapefx compiles it by itself")
    return type(f"Feedback{model.__name__}", (FeedbackModule,), members)


def _delegated(name: str) -> Any:
    def method(self: FeedbackModule, *args: Any) -> Any:
        return getattr(self._original, name)(*args)

    method.__name__ = name
    return method
