"""What one training call leaves for its backward, and how a finished backward is committed."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grapefx.errors import InputError
from grapefx.runtime import distributed
from grapefx.runtime.program import CompiledStep, Program
from grapefx.runtime.targets import one_hot
from grapefx.torch_compat import subtraction

if TYPE_CHECKING:
    from grapefx.runtime.module import FeedbackModule

_NOTHING: Callable[[], Any] = contextlib.nullcontext


def autocast_off(device: str) -> Any:
    """A context in which autocast does not act: graphs hold their own casts."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING()


@contextlib.contextmanager
def kept_buffers(program: Program, given: list[Any]) -> Iterator[None]:
    """The forward inside writes buffers in place: all of them, or none if it fails."""
    if not program.written:
        yield
        return
    buffers = [given[k] for k in program.written]
    kept = program.keep(buffers)
    try:
        yield
    except BaseException:
        program.put_back(buffers, kept)
        raise


class Owner:
    """What one training call leaves for its backward: the runtime and the program's wiring."""

    __slots__ = (
        "batch",
        "calibration",
        "differentiable",
        "given",
        "layers",
        "module",
        "plan",
        "program",
        "seconds",
        "took_targets",
        "weights",
    )

    def __init__(
        self,
        module: FeedbackModule,
        program: Program,
        calibration: bool,
        batch: int,
        given: list[Any],
    ) -> None:
        assert program.plan is not None
        self.module = module
        self.plan = program.plan
        self.differentiable = program.plan.differentiable
        self.layers = program.plan.layers
        self.calibration = calibration
        self.batch = batch
        self.given: list[Any] | None = given  # the graph's inputs, until the forward has run
        self.program = program
        self.took_targets = False
        self.seconds: dict[str, float] = {}  # by graph, while steps are recorded
        self.weights: dict[str, Tensor] = {}  # for a calibration that takes its own step
        if calibration and module._options.calib_update == "sgd":
            self.weights = {n: given[k] for (r, n), k in program.places.items() if r == "parameter"}

    def late_input(self, role: str, name: str) -> Tensor:
        """A feedback tensor as it is now, or the class targets of this step."""
        if role == "target":
            self.took_targets = True
            return one_hot(self.module._targets, self.plan, self.batch)
        return self.module._feedback.tensors[self.program.renamed.get(name, name)]

    def run_forward(self, step: CompiledStep, arguments: list[Any]) -> Any:
        """The forward graph; buffers that it writes are as before if it fails."""
        given, self.given = self.given, None
        assert given is not None
        module = self.module
        timed = module._history.timed(self.seconds, "forward", module._captures.device_type)
        with kept_buffers(self.program, given), timed:
            try:
                return step.forward(arguments)
            except RuntimeError as e:
                if any(isinstance(a, Tensor) and a.numel() == 0 for a in arguments):
                    raise InputError(
                        f"no step can be taken on a batch of no samples: {str(e).splitlines()[0]}\n"
                        "  remedy: leave empty batches out"
                    ) from e
                raise

    def run_update(self, step: CompiledStep, inputs: list[Any]) -> Any:
        """The update graph, with autocast off: the graph holds its own casts."""
        device = self.module._captures.device_type
        timed = self.module._history.timed(self.seconds, "update", device)
        with autocast_off(device), timed:
            return step.update(inputs)

    def commit(self, step: CompiledStep, results: Any, unused: frozenset[int]) -> list[Any]:
        """Take over what the step learned, all or nothing; return the gradients in order.

        ``unused``: the cotangents that the loss did not give. What depends on no other one has no
        gradient, as in eager mode.
        """
        module = self.module
        renamed = self.program.renamed
        gradients: dict[tuple[str, str], Any] = {}
        learned: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for (role, name), value in zip(step.results, results, strict=True):
            if role == "feedback":
                learned[renamed.get(name, name)] = value
            elif role == "metric":
                metrics[name] = value
            else:
                gradients[role, name] = value
        found = [
            None if needs and needs <= unused else gradients.get(slot)
            for slot, needs in zip(step.gradients, step.needs, strict=True)
        ]
        if not any(role == "gradient" for role, _ in step.gradients):
            return found  # all is frozen: not a step of training
        if (learned or metrics) and distributed.parallel():
            refits = self.calibration and module._method.refits
            learned, metrics = distributed.agree(
                learned, module._feedback.tensors, metrics, module._method if refits else None
            )
        exact = self.calibration and module._options.calib_refit != "feedback"
        if not exact and module._schedule.step < module._options.align_warmup:
            # zeros, not None: DistributedDataParallel and GradScaler wait for a gradient
            found = [
                torch.zeros_like(g) if role == "gradient" and g is not None else g
                for (role, _), g in zip(step.gradients, found, strict=True)
            ]
        return self._finish(step, learned, metrics, found)

    def _finish(
        self,
        step: CompiledStep,
        learned: dict[str, Tensor],
        metrics: dict[str, Tensor],
        found: list[Any],
    ) -> list[Any]:
        """Everything that a step changes, in one assignment: an interrupt finds all or nothing."""
        module, options = self.module, self.module._options
        new = {**module._metrics, **{k: (v, self.layers) for k, v in metrics.items()}}
        cosine = math.nan
        if self.calibration and options.calib_every == "auto" and "cos_gradient" in new:
            cosine = float(new["cos_gradient"][0].nanmean())
        ok = True
        flag = new.pop("finite", (None,))[0]
        if flag is not None and flag.device.type == "cpu":
            ok = bool(flag)
        elif flag is not None:
            # reading a flag on an accelerator would wait for it: it is read with the metrics
            new["unread"] = (*new.get("unread", ()), flag)
        schedule = copy.copy(module._schedule)
        # one that fitted nothing (not finite, no gradient yet): the next step tries again
        schedule.done(self.calibration and ok and self._fitted(step, learned, found), cosine)
        state: dict[str, Any] = {"_schedule": schedule, "_metrics": new}
        if learned:
            state["_feedback"] = module._feedback.having(learned)
        if self.took_targets:
            state["_targets"] = None  # used up: old targets never train a new batch
        if self.calibration and options.calib_update == "sgd":
            weights, momenta, found = self._own_sgd(step, found)
            state["_momentum"] = {**module._momentum, **momenta}
            write = subtraction(weights, list(momenta.values()), 0.01)
            take = functools.partial(module.__dict__.update, state)
            with torch.no_grad():
                # called from C: Python looks for signals between its own instructions only
                list(map(operator.call, (write, take)))  # type: ignore[arg-type]
        else:
            module.__dict__.update(state)
        was = schedule.step - 1
        module._history.note(was, schedule.epoch, step.kind, self.layers, metrics, self.seconds)
        module._note_finite(ok)
        if len(new.get("unread", ())) >= 256:
            module._read_flags()
        return found

    def _fitted(self, step: CompiledStep, learned: dict[str, Tensor], found: list[Any]) -> bool:
        """Whether a calibration had a true gradient to fit maps to: it moved one, or found none
        to move (the same batch and weights again).
        """
        old = self.module._feedback.tensors
        if not learned or any(not torch.equal(t, old[k]) for k, t in learned.items()):
            return True
        behind = {p for layer in self.layers for p in layer.parameters}
        exact = self.module._options.calib_refit != "feedback"
        return exact and any(
            g is not None and name in behind and bool(g.any())
            for (_, name), g in zip(step.gradients, found, strict=True)
        )

    def _own_sgd(
        self, step: CompiledStep, found: list[Any]
    ) -> tuple[list[Tensor], dict[str, Tensor], list[Any]]:
        """001 appendix E: calibration by its own SGD(0.01, momentum 0.9), leaving grad None.

        Returns the weights, their new momenta, and what is left of ``found``.
        """
        own = [
            k
            for k, ((role, _), g) in enumerate(zip(step.gradients, found, strict=True))
            if role == "gradient" and g is not None
        ]
        grads = [found[k] for k in own]
        if distributed.parallel():  # nobody else averages them: they never reach p.grad
            grads = distributed.averaged(grads)
        weights, momenta = [], {}
        for k, grad in zip(own, grads, strict=True):
            name = step.gradients[k][1]
            old = self.module._momentum.get(name)
            momenta[name] = grad.clone() if old is None else old * 0.9 + grad
            weights.append(self.weights[name])
        return weights, momenta, [None if k in own else g for k, g in enumerate(found)]
