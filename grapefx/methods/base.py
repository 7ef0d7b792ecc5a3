"""What a method may declare. One small file a method; passes read the declaration, never a name.

A method answers three questions about each feedback point: what its state is at the start
(``init``), what replaces the incoming gradient there (``cotangent``), and how the state learns
(``learn``, ``refit``). All are ordinary torch code on rows (see ``grapefx.maps``); they are traced
into the step graph, where the compiler sees them beside the model's own operators.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.errors import OptionError, nearest

# What ``cotangent`` and ``learn`` may read; the graph is checked against the declaration.
READS = frozenset(
    {
        "next_delta",  # the gradient that arrives at the cut from the layer above (sequential)
        "error",  # e, the cotangent at the error tap
        "target",  # class targets, given by the user beside the inputs
        "tangent",  # v at the cut and d at the tap, from the forward-mode pass
        "value",  # h_l itself
    }
)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """What a method may read at one feedback point, as rows. Fields not declared are None.

    error (R, C); incoming (R, n); value (R, n); noise (R', n) and tangent (R', C) on the samples
    that carry tangents; target (R, C) one-hot; estimate (C, n): J^ = mean over rows of d v^T.
    """

    state: State
    error: Tensor | None = None
    incoming: Tensor | None = None
    value: Tensor | None = None
    noise: Tensor | None = None
    tangent: Tensor | None = None
    target: Tensor | None = None
    estimate: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """Base class. Subclasses are frozen dataclasses whose fields are the method's options.

    ``reads``: what ``cotangent`` uses. ``learns_from``: what ``learn`` uses (empty: it never
    learns). ``refits``: whether a calibration batch may set its map. ``project_after_learn``: the
    cotangent uses the state after this step's ``learn`` (001 algorithm 1, 003 algorithm 1).
    """

    name: ClassVar[str] = ""
    reads: ClassVar[frozenset[str]] = frozenset()
    learns_from: ClassVar[frozenset[str]] = frozenset()
    refits: ClassVar[bool] = False
    project_after_learn: ClassVar[bool] = True
    paper: ClassVar[dict[str, Any]] = {}

    @property
    def sequential(self) -> bool:
        """Whether a layer's update waits for the layer above."""
        return "next_delta" in self.reads

    @property
    def feedback(self) -> bool:
        """Whether the method keeps any state at a feedback point."""
        return type(self).init is not Method.init

    def needs_tangents(self) -> bool:
        """Whether a step without tangents can use this method at all."""
        return "tangent" in self.reads

    def aligns(self) -> bool:
        """Whether it learns from tangents."""
        return "tangent" in self.learns_from

    def init(
        self, shape: tuple[int, int], generator: torch.Generator, dtype: torch.dtype
    ) -> State:
        """The state of one layer at the start, on the generator's device. Shape is (C, n)."""
        return {}

    def cotangent(self, rows: Rows) -> Tensor:
        """What replaces the incoming gradient at the cut: (R, n)."""
        raise NotImplementedError

    def learn(self, rows: Rows) -> State:
        """The state after one learning step."""
        return rows.state

    def refit(self, state: State, fitted: Tensor) -> State:
        """The state after a calibration batch fitted B (C, n) by ridge regression."""
        return {**state, "B": fitted}


def build(cls: type[Method], options: dict[str, Any]) -> Method:
    """A method from its options; unknown ones are refused by name."""
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in options:
        if key not in fields:
            raise OptionError(f"method {cls.name!r} has no option {key!r}.{nearest(key, fields)}")
    return cls(**options)


def option_names(method: Any) -> frozenset[str]:
    """The option names of a method given by name (none for an instance or an unknown name)."""
    from grapefx.methods import BUILTIN

    cls = BUILTIN.get(method) if isinstance(method, str) else None
    return frozenset(f.name for f in dataclasses.fields(cls)) if cls else frozenset()


def he_uniform(
    shape: tuple[int, int], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """U(-sqrt(6/n), sqrt(6/n)) on (C, n)."""
    bound = (6.0 / shape[1]) ** 0.5
    out = torch.empty(shape, device=generator.device, dtype=dtype)
    return out.uniform_(-bound, bound, generator=generator)


def unit_columns(b: Tensor, eps: float = 1e-12) -> Tensor:
    """Every column (a C-vector) rescaled to norm 1; a zero column stays zero."""
    return b / b.norm(dim=0, keepdim=True).clamp_min(eps)


__all__ = ["READS", "Method", "Rows", "State", "build", "field", "he_uniform", "unit_columns"]
