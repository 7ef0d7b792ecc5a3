"""Everything that training changes beside the model: one object, replaced field by field at once.

A step hands all its changes to ``commit``, which takes them over in one assignment: an interrupt
finds all of them or none.
"""

from __future__ import annotations

import copy
import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn

from grapefx.errors import InputError, StateError, tell
from grapefx.ir import Layer
from grapefx.methods import Method
from grapefx.options import Options
from grapefx.passes.feedback.normal_equations import MEMORY
from grapefx.plan import Plan
from grapefx.runtime import distributed
from grapefx.runtime.history import History
from grapefx.runtime.noise import draw, seed_of
from grapefx.runtime.program import CompiledStep
from grapefx.runtime.schedule import CalibrationSchedule
from grapefx.runtime.state import VERSION, FeedbackState, architecture, check_architecture
from grapefx.torch_compat import subtraction

_SAVED = {"version", "method", "architecture", "tensors", "schedule", "momentum", "skipped"}


class TrainingState:
    """What one compiled module has learned and counted.

    ``feedback``: the maps. ``schedule``: steps, epochs, when to calibrate. ``momentum``: of a
    calibration's own SGD, by parameter. ``targets``: given for the next backward. ``metrics``: the
    last cosines, by name: (values, their layers). ``history``: what steps measured, for reports; it
    is no part of copies and checkpoints.
    """

    def __init__(self, method: Method, options: Options) -> None:
        self.method = method
        self.options = options
        memory = frozenset(MEMORY if options.calib_forget is not None else ())
        self.feedback = FeedbackState(
            method,
            options.seed,
            memory,
            isinstance(options.mean_field, int),
            options.exact_late,
        )
        self.schedule = CalibrationSchedule(
            options.calib_every,
            options.calib_unit,
            options.starts,
            options.steps_per_epoch,
            options.calib_threshold,
            options.calib_budget,
            options.calib_growth,
            options.calib_gap,
        )
        self.momentum: dict[str, Tensor] = {}
        self.metrics: dict[str, tuple[Tensor, tuple[Layer, ...]]] = {}
        self.targets: Tensor | None = None
        self.history = History()
        self._unread: tuple[Tensor, ...] = ()  # flags on an accelerator, read with the metrics
        self._skipped = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    # a step

    def kind(self, plan: Plan) -> str:
        """Which of a plan's kinds of step comes next."""
        kinds = plan.kinds()
        if kinds == ("calibration",) or self.schedule.due():
            return "calibration"
        step, options = self.schedule.step, self.options
        if not self._begun(plan):
            return "start"
        if "mean_field" in kinds and step % int(options.mean_field or 1) == 0:
            return "mean_field"
        if "align" in kinds and (
            "update" not in kinds or step < options.align_warmup or step % options.align_every == 0
        ):
            return "align"
        return "update"

    def _begun(self, plan: Plan) -> bool:
        """Whether there are means, or a start, that the plan's maps come from."""
        wanted = plan.options.mean_field
        if wanted is not None and plan.mean_field is None and self.schedule.step == 0:
            raise InputError(
                f"mean_field={wanted!r} takes its maps from the first training batch, which has "
                "one sample here\n  remedy: begin with a batch of more"
            )
        if plan.mean_field is None:
            return True
        once = plan.mean_field.every == 0
        return self.schedule.step > 0 if once else plan.means in self.feedback.tensors

    def noise(
        self, step: CompiledStep, rows: int, sizes: dict[Any, int], device: torch.device
    ) -> dict[int, Tensor]:
        """The random inputs of a step, by their index; drawn from (seed, rank, step) alone."""
        if not step.noise and not step.random:
            return {}
        options = self.options
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        generator.manual_seed(seed_of(options.seed, distributed.rank(), self.schedule.step))
        drawn: dict[int, Tensor] = {}
        if step.noise:
            shapes = [n.sized(rows, sizes) for n in step.noise]
            tensors = draw(shapes, step.noise[0].dtype, device, generator, options.noise)
            drawn = {n.index: t for n, t in zip(step.noise, tensors, strict=True)}
        for r in step.random:
            (drawn[r.index],) = draw([r.shape], r.dtype, device, generator, "gaussian")
        return drawn

    def commit(
        self,
        changes: dict[str, Any],
        finite: Tensor | None,
        weights: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """Take over a finished step: ``changes`` are new values of fields.

        ``weights`` lose 0.01 times ``steps`` in the same instant. ``finite``: whether the maps
        learned, None where nothing was asked.
        """
        unread, ok = self._unread, True
        if finite is not None and finite.device.type == "cpu":
            ok = bool(finite)
        elif finite is not None:
            unread = (*unread, finite)  # reading a flag there would wait for it
        take = functools.partial(self.__dict__.update, changes, _unread=unread)
        if weights:
            write = subtraction(weights, steps, 0.01)
            with torch.no_grad():
                # called from C: Python looks for signals between its own instructions only
                list(map(operator.call, (write, take)))  # type: ignore[arg-type]
        else:
            take()
        self._note_finite(ok)
        if len(unread) >= 256:
            self.read_flags()

    def read_flags(self) -> None:
        """Look at what steps on an accelerator left unread."""
        flags, self._unread = self._unread, ()
        for ok in torch.stack(flags).tolist() if flags else ():
            self._note_finite(ok)

    def _note_finite(self, ok: bool) -> None:
        if ok:
            return
        self._skipped += 1
        if self._skipped == 1:
            tell(
                "the output error, a tangent or a late correction is not finite: the learning "
                "state keeps its values for this step (net.skipped_updates counts such steps)"
            )

    @property
    def skipped(self) -> int:
        """Steps whose feedback update was skipped because a value was not finite."""
        self.read_flags()
        return self._skipped

    def alignment(self) -> dict[str, dict[str, float]]:
        """Last measured cosines by layer name; see ``FeedbackModule.alignment``."""
        self.read_flags()
        out: dict[str, dict[str, float]] = {}
        for name in ("cos_jacobian", "cos_gradient"):
            values, layers = self.metrics.get(name, (None, ()))
            for layer, v in zip(layers, [] if values is None else values.tolist(), strict=True):
                if v == v:
                    out.setdefault(layer.name, {})[name] = v
        return out

    # copies and checkpoints

    def saved(self) -> dict[str, Any]:
        """What a copy needs; the tensors are not copied."""
        return {
            "tensors": self.feedback.latest(),
            "readings": self.feedback.latest_readings(),
            "schedule": self.schedule.state(),
            "momentum": self.momentum,
            "skipped": self.skipped,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over ``saved`` of a state of the same model and method."""
        self.feedback.tensors = dict(saved["tensors"])
        self.feedback.readings = dict(saved["readings"])
        self.schedule.load(saved["schedule"])
        self.momentum, self._skipped = saved["momentum"], saved["skipped"]

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """A checkpoint, with what it belongs to; tensors are copied."""
        saved = self.saved()
        return {
            **saved,
            "version": VERSION,
            "method": self.method.name,
            "architecture": architecture(model),
            "seed": self.options.seed,
            "tensors": {k: v.detach().clone() for k, v in saved["tensors"].items()},
            "momentum": {k: v.clone() for k, v in self.momentum.items()},
        }

    def checked(self, state: Any, model: nn.Module) -> FeedbackState:
        """The maps of a checkpoint, for ``load``.

        Raises:
            StateError: the checkpoint does not fit; nothing has changed.
        """
        if not isinstance(state, dict) or _SAVED - set(state):
            raise StateError(
                "this is not a feedback state dict (made by net.feedback_state_dict())"
            )
        if state["version"] != VERSION:
            raise StateError(
                f"feedback state version {state['version']}, this grapefx reads {VERSION}"
            )
        if state["method"] != self.method.name:
            raise StateError(
                f"the feedback state was learned by {state['method']!r}, this module uses "
                f"{self.method.name!r}"
            )
        check_architecture(state["architecture"], model)
        feedback = copy.copy(self.feedback)
        feedback.load(state["tensors"], state.get("readings", {}))
        return feedback

    def load(self, state: dict[str, Any], feedback: FeedbackState) -> None:
        """Take a checkpoint over, whose maps are ``checked``."""
        self.schedule.load(state["schedule"])
        self.feedback = feedback
        self.momentum = {k: v.clone() for k, v in state["momentum"].items()}
        self._skipped = state["skipped"]
