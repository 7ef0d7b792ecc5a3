"""Runs one stage's actions. Nothing that lasts changes here: the module commits what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from grapefx.analysis.pipelines import Action, Do
from grapefx.ir import Slot
from grapefx.passes.divide.commit import reduced, reduction_of
from grapefx.passes.divide.stages import SEND
from grapefx.runtime.noise import draw, seed_of
from grapefx.runtime.stages.compiled import StageStep
from grapefx.torch_compat import memory


class Wires(Protocol):
    """How values travel between the ranks of a pipeline."""

    def send(self, action: Action, value: Tensor) -> None:
        """Start a transfer."""

    def recv(self, action: Action) -> Tensor:
        """Wait for a value."""


class Gather(Protocol):
    """How contributions of data-parallel ranks become one."""

    def __call__(self, how: str, value: Tensor) -> Tensor:
        """As ``passes.divide.commit.reduced``, over ranks."""


@dataclass(frozen=True)
class Inputs:
    """What a step reads that does not come from other stages.

    ``fixed``: parameters, buffers and constants. ``parts``: for each microbatch the model's own
    inputs. ``feedback``: the state by name. ``loss``: on the last stage, takes a microbatch's
    number and its outputs and gives the loss and the cotangents, by name. ``seed``: of this step;
    ``offset``: the number of its first microbatch among those of all data-parallel ranks.
    """

    fixed: dict[Slot, Any]
    parts: Sequence[dict[Slot, Any]]
    feedback: Callable[[str], Tensor]
    loss: Callable[[int, list[Tensor]], tuple[Tensor, dict[str, Tensor]]]
    seed: tuple[int, ...]
    noise: str
    device: torch.device
    offset: int = 0


@dataclass
class _Held:
    """One microbatch on its way: what arrived, what was saved, what the parts made."""

    values: dict[Slot, Any] = field(default_factory=dict)
    saved: list[Any] = field(default_factory=list)
    made: dict[int, Any] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    memories: set[int] = field(default_factory=set)  # of tensors that a gradient may be a view of


class Engine:
    """One step of one stage: ``do`` each action of the schedule, then read what it found.

    ``gradients``: sums over microbatches, by parameter. ``learned``: new states and metrics.
    """

    def __init__(self, step: StageStep, inputs: Inputs, wires: Wires, gather: Gather) -> None:
        self.step, self.inputs, self.wires, self.gather = step, inputs, wires, gather
        self.held: dict[int, _Held] = {}
        self.gradients: dict[str, Tensor] = {}
        self.contributions: dict[Slot, list[Tensor]] = {}
        self.learned: dict[Slot, Tensor] = {}
        self.losses: list[Tensor] = []
        self._vals = {c.name: c.val for c in step.stages.channels}

    def do(self, action: Action) -> None:
        """Run one action."""
        if action.do == "recv":
            name = f"{action.kind}:{action.value}"
            slot = Slot("input" if action.kind == "recv" else "cotangent", name)
            self._of(action.microbatch).values[slot] = self.wires.recv(action)
        elif action.do == "send":
            self.wires.send(action, self._sent(action))
        elif action.do == "forward":
            self._forward(action.microbatch)
        elif action.do == "learn":
            self._learn()
        else:
            if action.do == "error":
                self._loss(action.microbatch)
            self._part(action.do, action.microbatch)

    def _of(self, m: int) -> _Held:
        return self.held.setdefault(m, _Held())

    def _forward(self, m: int) -> None:
        step, held = self.step, self._of(m)
        drawn = {d.slot: self._noise(d.slot, d.shape, d.dtype, m) for d in step.draws}
        known = {**self.inputs.fixed, **self.inputs.parts[m], **drawn, **held.values}
        arguments = [known[slot] for slot in step.takes]
        if step.random:
            devices = [] if self.inputs.device.type == "cpu" else [self.inputs.device]
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed_of(*self.inputs.seed, self.inputs.offset + m, step.index))
                results = list(step.forward(arguments))
        else:
            results = list(step.forward(arguments))
        count = len(step.gives)
        for slot, value in zip(step.gives, results[:count], strict=True):
            if slot.name.startswith(SEND):
                held.values[slot] = value
            else:
                held.outputs.append(value)
        held.saved = results[count:]

    def _noise(self, slot: Slot, shape: tuple[int, ...], dtype: torch.dtype, m: int) -> Tensor:
        """The draw of a step, a microbatch and an input, whatever stage makes it."""
        generator = torch.Generator(self.inputs.device)
        number = self.inputs.offset + m
        generator.manual_seed(seed_of(*self.inputs.seed, number, *slot.name.encode()))
        kind = "gaussian" if slot.role == "random" else self.inputs.noise
        (made,) = draw([shape], dtype, self.inputs.device, generator, kind)
        return made

    def _loss(self, m: int) -> None:
        held = self._of(m)
        loss, cotangents = self.inputs.loss(m, held.outputs)
        held.outputs = []
        self.losses.append(loss)
        for name, value in cotangents.items():
            like = self.step.cotangents.get(name)
            held.values[Slot("cotangent", name)] = value if like is None else laid_out(value, like)

    def _part(self, do: Do, m: int) -> None:
        """Run the part of the update that an action stands for, and take its results."""
        step, held = self.step, self._of(m)
        index = next((k for k, t in enumerate(step.tasks.tasks) if t.name == do), None)
        if index is not None:
            reads = step.tasks.tasks[index].reads
            held.made[index] = step.calls[index]([self._value(ref, held) for ref in reads])
        for (slot, part), ref in zip(step.results, step.tasks.results, strict=True):
            if part == do and ref is not None:
                self._take(slot, self._value(ref, held), held)
        if do == "update":
            del self.held[m]

    def _value(self, ref: tuple[int, int], held: _Held) -> Any:
        task, index = ref
        if task >= 0:
            return held.made[task][index]
        if index < self.step.saved:
            return held.saved[index]
        slot = self.step.late[index - self.step.saved]
        if slot.role == "feedback":
            found = self.learned.get(slot)
            return self.inputs.feedback(slot.name) if found is None else found
        return held.values[slot]

    def _take(self, slot: Slot, value: Tensor, held: _Held) -> None:
        if slot.role == "gradient":
            old = self.gradients.get(slot.name)
            added = self._own(value, held) if old is None else old.add_(value)
            self.gradients[slot.name] = added
        elif slot.name.startswith(SEND):
            held.values[slot] = value
        elif slot.role == "saved":
            self.contributions.setdefault(slot, []).append(value)

    def _own(self, value: Tensor, held: _Held) -> Tensor:
        """A gradient in memory of its own: a graph may return a view of what it keeps."""
        if not held.memories:
            kept = (*held.saved, *held.values.values(), *self.inputs.fixed.values())
            held.memories.update(memory(t) for t in kept if isinstance(t, Tensor))
        where = memory(value)
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        if where in held.memories or not whole:
            return value.clone()
        held.memories.add(where)
        return value

    def _sent(self, action: Action) -> Tensor:
        held = self._of(action.microbatch)
        for role in ("output", "saved"):
            found = held.values.get(Slot(role, SEND + action.value))  # type: ignore[arg-type]
            if isinstance(found, Tensor):  # as the receiver's graph was compiled for
                return laid_out(found, self._vals[action.value])
        raise AssertionError(f"{action} before it is computed")

    def _learn(self) -> None:
        commit = self.step.commit
        if commit is None:
            return
        values = []
        for slot in commit.reads:
            how = reduction_of(slot)
            values.append(self.gather(how, reduced(how, self.contributions.pop(slot))))
        states = [self.inputs.feedback(slot.name) for slot in commit.states]
        found = commit.gm.forward(*values, *states)
        self.learned = dict(zip(commit.outputs, found, strict=True))


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A value in the strides of a fake one of the same shape."""
    if value.stride() == like.stride():
        return value
    out = torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device)
    return out.copy_(value)
