"""What one training call leaves for its backward, and how a finished backward is committed."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from grapefx.errors import InputError
from grapefx.passes.feedback.late_rows import is_late
from grapefx.runtime import distributed
from grapefx.runtime.program import CompiledStep, Program
from grapefx.runtime.targets import one_hot
from grapefx.runtime.training_state import TrainingState

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


class TrainingCall:
    """One training call: what its forward leaves for its backward, and how that is committed.

    ``differentiable``: which outputs of the model carry a gradient.
    """

    __slots__ = (
        "batch",
        "calibration",
        "device",
        "differentiable",
        "given",
        "layers",
        "plan",
        "program",
        "seconds",
        "state",
        "took_targets",
        "weights",
    )

    def __init__(
        self,
        state: TrainingState,
        program: Program,
        calibration: bool,
        batch: int,
        given: list[Any],
        device: str,
    ) -> None:
        assert program.plan is not None
        self.state = state
        self.plan = program.plan
        self.differentiable = program.plan.differentiable
        self.layers = program.plan.layers
        self.calibration = calibration
        self.batch = batch
        self.given: list[Any] | None = given  # the graph's inputs, until the forward has run
        self.program = program
        self.device = device
        self.took_targets = False
        self.seconds: dict[str, float] = {}  # by graph, while steps are recorded
        self.weights: dict[str, Tensor] = {}  # for a calibration that takes its own step
        if calibration and state.options.calib_update == "sgd":
            self.weights = {n: given[k] for (r, n), k in program.places.items() if r == "parameter"}

    def late_input(self, role: str, name: str) -> Tensor:
        """A feedback tensor as it is now, or the class targets of this step."""
        if role == "target":
            self.took_targets = True
            return one_hot(self.state.targets, self.plan, self.batch)
        return self.state.feedback.tensors[self.program.renamed.get(name, name)]

    def run_forward(self, step: CompiledStep, arguments: list[Any]) -> Any:
        """The forward graph; buffers that it writes are as before if it fails."""
        given, self.given = self.given, None
        assert given is not None
        timed = self.state.history.timed(self.seconds, "forward", self.device)
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
        timed = self.state.history.timed(self.seconds, "update", self.device)
        with autocast_off(self.device), timed:
            return step.update(inputs)

    def commit(self, step: CompiledStep, results: Any, unused: frozenset[int]) -> list[Any]:
        """Take over what the step learned, all or nothing; return the gradients in order.

        ``unused``: the cotangents that the loss did not give. What depends on no other one has no
        gradient, as in eager mode.
        """
        state = self.state
        renamed = self.program.renamed
        gradients: dict[tuple[str, str], Any] = {}
        learned: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        for (role, name), value in zip(step.results, results, strict=True):
            if role == "feedback":
                # a compiler may choose strides; the next step was compiled for none but these
                learned[renamed.get(name, name)] = value.contiguous()
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
        tensors, warmup = state.feedback.tensors, state.options.align_warmup
        exact = self.calibration and state.options.calib_refit != "feedback"
        warms = not exact and state.schedule.step < warmup
        if state.options.exact_late:  # of a frozen parameter, or of zeros: the next step has none
            learned |= {
                k: torch.zeros_like(t)
                for k, t in tensors.items()
                if is_late(k) and (warms or k not in learned)
            }
        if (learned or metrics) and distributed.parallel():
            refits = self.calibration and state.method.refits
            learned, metrics = distributed.agree(
                learned,
                tensors,
                metrics,
                state.method if refits else None,
                state.options.ridge,
            )
        if warms:
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
        state, options = self.state, self.state.options
        measured = {**state.metrics, **{k: (v, self.layers) for k, v in metrics.items()}}
        finite = measured.pop("finite", (None,))[0]
        cosine = math.nan
        if self.calibration and options.calib_every == "auto" and "cos_gradient" in measured:
            cosine = float(measured["cos_gradient"][0].nanmean())
        # one that fitted nothing (not finite, no gradient yet): the next step tries again
        ok = finite is None or finite.device.type != "cpu" or bool(finite)
        schedule = copy.copy(state.schedule)
        schedule.done(self.calibration and ok and self._fitted(learned, step, found), cosine)
        changes: dict[str, Any] = {"schedule": schedule, "metrics": measured}
        if learned:
            changes["feedback"] = state.feedback.having(learned)
        if self.took_targets:
            changes["targets"] = None  # used up: old targets never train a new batch
        weights: list[Tensor] = []
        momenta: dict[str, Tensor] = {}
        if self.calibration and options.calib_update == "sgd":
            weights, momenta, found = self._own_sgd(step, found)
            changes["momentum"] = {**state.momentum, **momenta}
        state.commit(changes, finite, weights, list(momenta.values()))
        was = schedule.step - 1
        state.history.note(was, schedule.epoch, step.kind, self.layers, metrics, self.seconds)
        return found

    def _fitted(self, learned: dict[str, Tensor], step: CompiledStep, found: list[Any]) -> bool:
        """Whether a calibration had a true gradient to fit maps to: it moved one, or found none
        to move (the same batch and weights again).
        """
        old = self.state.feedback.tensors
        maps = {k: t for k, t in learned.items() if not is_late(k)}
        if not maps or any(not torch.equal(t, old[k]) for k, t in maps.items()):
            return True
        behind = {p for layer in self.layers for p in layer.parameters}
        exact = self.state.options.calib_refit != "feedback"
        return exact and any(
            g is not None and name in behind and bool(g.any())
            for (_, name), g in zip(step.gradients, found, strict=True)
        )

    def _own_sgd(
        self, step: CompiledStep, found: list[Any]
    ) -> tuple[list[Tensor], dict[str, Tensor], list[Any]]:
        """GrAPE 2026 appendix E: calibration by its own SGD(0.01, momentum 0.9), leaving grad None.

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
            old = self.state.momentum.get(name)
            momenta[name] = grad.clone() if old is None else old * 0.9 + grad
            weights.append(self.weights[name])
        return weights, momenta, [None if k in own else g for k, g in enumerate(found)]
