"""Which captured call serves a call, and the new capture where none does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grapefx import tree
from grapefx.batch_facts import holds, same_graph
from grapefx.capture import capture
from grapefx.constants import tensor_attributes
from grapefx.errors import InputError, tell
from grapefx.layout import contiguous
from grapefx.methods import Method
from grapefx.options import Options
from grapefx.plan import Plan, build_forward, build_plan
from grapefx.runtime import hooks, inplace
from grapefx.runtime.building import building
from grapefx.runtime.guard import Calls, Fingerprint, describe_leaf
from grapefx.runtime.program import Program, module_slots
from grapefx.runtime.state import FeedbackState


class Captures:
    """The programs of one module, by what they are valid for.

    ``plan``: of the last training capture. ``slots``: where each parameter and buffer of the model
    lives now. ``device_type``: of its parameters, known with the first capture.
    """

    def __init__(self, model: nn.Module, method: Method, options: Options) -> None:
        self.model = model
        self.method = method
        self.options = options
        self.programs: dict[Any, Program] = {}
        self.plan: Plan | None = None
        self.slots: dict[str, tuple[dict[str, Any], str]] = {}
        self.device_type = "cpu"
        self.fingerprint: Fingerprint | None = None
        self._listed: Any = None  # the modules that ``slots`` was made from
        self._leads: dict[Any, int] = {}
        self._told_hooks: set[str] = set()
        self._calls = Calls()

    def program(
        self,
        args: Any,
        kwargs: Any,
        leaves: list[Any],
        spec: Any,
        training: bool,
        feedback: FeedbackState,
    ) -> Program:
        """The program that serves a call; captured anew where none does.

        ``feedback``: where a new capture finds or puts its layers' tensors.

        Raises:
            GrapefxError: the model cannot be captured, or the method is not defined on it.
        """
        if self.fingerprint is None:
            self.fingerprint = Fingerprint(self.model)
        fingerprint = self.fingerprint
        reading = fingerprint.read()
        if training and not fingerprint.trains(reading):
            training = any(isinstance(t, Tensor) and t.requires_grad for t in leaves)
        key, batch = self._key(leaves, spec, reading, training)
        found = self._find(key, batch)
        if found is None or not _settled(found, batch):
            with building():
                found = self._find(key, batch)  # another thread may have been first
                if found is None or not self._serves(found, batch, args, kwargs, training):
                    fixed = found is not None
                    found = self._capture(
                        args, kwargs, leaves, spec, key[0], training, feedback, fixed=fixed
                    )
        if self._listed is not fingerprint.modules:
            self.slots = module_slots(self.model)
            self._listed = fingerprint.modules
        return found

    def _find(self, key: Any, batch: int | None) -> Program | None:
        return self.programs.get((key, batch)) or self.programs.get(key)

    def _serves(
        self, program: Program, batch: int | None, args: Any, kwargs: Any, training: bool
    ) -> bool:
        """Whether a program's graph is the model's for a batch size.

        One that the model's branches on sizes, or a single sample, may treat otherwise is traced
        alone, once, and compared.
        """
        if _settled(program, batch):
            return True
        captured = program.captured
        assert captured is not None and batch is not None
        right = holds(captured, batch)
        if batch == 1 or not right:
            with inplace.untouched(self.model), torch.set_grad_enabled(training):
                alone = capture(
                    self.model, args, kwargs, batch_dim=self.options.batch_dim, fixed=True
                )
            right = same_graph(captured, alone, batch)
        if right:
            program.sizes.add(batch)
        return right

    def batch_size(self, program: Program, inputs: list[Tensor]) -> int:
        """Samples in a call."""
        dim, lead = self.options.batch_dim, inputs[program.lead]
        return lead.shape[dim] if lead.ndim > dim else 1

    def value(self, role: str, ref: Any, inputs: list[Tensor], program: Program) -> Tensor:
        """An argument of a program's graphs: an input, a constant, a parameter or a buffer."""
        if role == "input":
            x = inputs[ref]
            if contiguous(x) or (
                x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
            ):
                return x
            return x.contiguous()
        if role == "constant" and ref not in program.attributes:
            return program.constants[ref]
        store, key = program.attributes[ref] if role == "constant" else self.slots[ref]
        return store[key]

    def ensure_states(self, feedback: FeedbackState) -> None:
        """Feedback tensors for every program, after other ones were loaded."""
        for program in self.programs.values():
            if program.plan is not None:
                program.renamed = self._ensure(program.plan, feedback)

    def _key(
        self, leaves: list[Any], spec: Any, reading: Any, training: bool
    ) -> tuple[tuple[Any, ...], int | None]:
        """What a program is valid for (but for the batch size), and the batch size."""
        dim = self.options.batch_dim
        lead = self._leads.get(spec) if self._leads else None
        if lead is not None:  # not the first tensor: a table or a mask comes before the batch
            batch = leaves[lead].shape[dim]
        else:
            batch = next(
                (t.shape[dim] for t in leaves if isinstance(t, Tensor) and t.ndim > dim), None
            )
        call = tuple([describe_leaf(leaf, batch, dim) for leaf in leaves])
        device = self.device_type
        cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return (reading, call, spec, training, cast), batch

    def _capture(
        self,
        args: Any,
        kwargs: Any,
        leaves: list[Any],
        spec: Any,
        reading: Any,
        training: bool,
        feedback: FeedbackState,
        *,
        fixed: bool = False,
    ) -> Program:
        self._check_devices(leaves)
        key, batch = self._key(leaves, spec, reading, training)
        if batch == 0 and training and not self.method.exact:
            raise InputError(
                "no step can be taken on a batch of no samples\n  remedy: leave empty batches out"
            )
        options = self.options
        backend = (
            options.backend, options.backend_options, options.dynamic, options.parallel
        )  # fmt: skip
        with inplace.untouched(self.model):
            self._check_hooks(training)
            if training:
                plan = build_plan(
                    self.model, args, kwargs, method=self.method, options=options, fixed=fixed
                )
            else:
                captured, step = build_forward(self.model, args, kwargs, options, fixed=fixed)
        if training:
            captured = plan.captured
            program = Program(plan, None, captured.out_spec, captured.constants, *backend)
            program.renamed = self._ensure(plan, feedback)
            # not that of a model that is frozen for now
            if any(s.role == "gradient" for s in plan.joint.outputs):
                self.plan = plan
        else:
            program = Program(None, step, captured.out_spec, captured.constants, *backend)
        for note in plan.notes if training else captured.notes:
            tell(note)
        program.captured = captured
        program.lead = captured.lead
        places = tensor_attributes(self.model) if captured.constants else {}
        program.attributes = {k: places[k] for k in captured.constants if k in places}
        program.written = captured.mutated
        assert self.fingerprint is not None
        restless = self.fingerprint.restless(reading)
        if restless:
            tell(
                f"the attribute {restless!r} of the model keeps changing, and each new value needs "
                "a new capture: make it a buffer (a tensor), or pass it as a tensor argument"
            )
        if note := self._calls.restless(key[1], spec, training):
            tell(note)
        if more := self.fingerprint.watch(captured.read):
            # what is known did not read them: it holds at their present values
            self.programs = {_longer(k, more): p for k, p in self.programs.items()}
            reading = _longer((reading,), more)[0]
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        dim = options.batch_dim
        if any(leaves[i].ndim > dim for i in tensors[: captured.lead]):
            self._leads[spec] = tensors[captured.lead]
        key, batch = self._key(leaves, spec, reading, training)  # with the device and lead known
        # an input that only happened to be as long as the batch was captured at that length
        chance = any(
            leaves[i].ndim > dim and leaves[i].shape[dim] == batch and k not in captured.dynamic
            for k, i in enumerate(tensors)
        )
        if batch is not None:
            program.sizes.add(batch)
        self.programs[(key, batch) if captured.batch is None or chance else key] = program
        single = self.programs.get((key, 1))
        known = single.captured if single is not None and not chance else None
        if captured.batch is not None and known is not None and same_graph(captured, known, 1):
            # a first batch of one sample was captured as it was: one graph serves both
            program.sizes.add(1)
            del self.programs[key, 1]
        return program

    def _ensure(self, plan: Plan, feedback: FeedbackState) -> dict[str, str]:
        """Feedback tensors for every layer of a plan; returns those that go by another key."""
        specs = plan.state_specs()
        if not specs:
            return {}
        parameter = next(p for p in tree.parameters(self.model) if p.requires_grad)
        dtype = torch.promote_types(parameter.dtype.to_real(), torch.float32)
        return feedback.ensure(specs, dtype, parameter.device)

    def _check_hooks(self, training: bool) -> None:
        if training:
            hooks.refuse_backward(self.model)
        for note in hooks.traced(self.model):
            if note not in self._told_hooks:
                self._told_hooks.add(note)
                tell(note)

    def _check_devices(self, leaves: list[Any]) -> None:
        parameter = next(tree.parameters(self.model), None)
        if parameter is None:
            return
        self.device_type = parameter.device.type
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.device != parameter.device and leaf.ndim > 0:
                raise InputError(
                    f"an input is on {leaf.device}, the parameters are on {parameter.device}: move "
                    "one of them (x.to(device) or net.to(device))"
                )


def _longer(key: tuple[Any, ...], more: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key of ``programs`` whose reading ends in more values."""
    if len(key) == 2:  # with a batch size
        return (_longer(key[0], more), key[1])
    (*first, scalars), *rest = key
    return ((*first, scalars + more), *rest)


def _settled(program: Program, batch: int | None) -> bool:
    """Whether a program is known to be right for a batch size."""
    captured = program.captured
    return batch is None or batch in program.sizes or captured is None or captured.batch is None


__all__ = ["Captures"]
