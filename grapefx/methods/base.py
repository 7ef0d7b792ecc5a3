"""What a method may declare. One small file a method; passes read the declaration, never a name.

A method answers three questions about each feedback point: what its state is at the start
(``init``), what replaces the incoming gradient there (``cotangent``), and how the state learns
(``learn``, ``refit``). All are ordinary torch code on rows (see ``grapefx.maps``); they are traced
into the step graph, where the compiler sees them beside the model's own operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.errors import OptionError, is_number, nearest

# What ``cotangent`` and ``learn`` may read; the graph is checked against the declaration.
READS = frozenset(
    {
        "next_delta",  # the gradient that arrives at the cut from the layer above (sequential)
        "error",  # e, the cotangent at the error tap
        "target",  # class targets, given by the user beside the inputs
        "tangent",  # v at the cut and d at the tap, from the forward-mode pass
        "value",  # h_l itself
        "output",  # the value at the error tap
        "noise",  # v at the cut (or at the weight) alone, without its tangent
    }
)

# How gradients arise. A pass serves each; none knows which methods use it.
MECHANISMS = (
    "points",  # ``cotangent`` fills every cut
    "weights",  # ``weight`` stands in for each weight of the backward products
    "parameters",  # noise at every parameter; the gradient is (e . d) times that noise
    "two_forwards",  # a second forward on a changed input; differences of the two passes
)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """What a method may read at one feedback point, as rows. Fields not declared are None.

    error (R, C); incoming (R, n); value (R, n); output (R, C); noise (R', n) and tangent (R', C) on
    the samples that carry tangents (in ``learn`` only if the method is ``per_sample``: then R' goes
    over all streams that hold the layer); target (R, C) one-hot; estimate (C, n): J^ = mean over
    rows of d v^T. tokens: how many consecutive rows belong to one sample, None for one row each.
    classes: with ``target``, the size of the output's last dim where C holds several positions.
    """

    state: State
    error: Tensor | None = None
    incoming: Tensor | None = None
    value: Tensor | None = None
    noise: Tensor | None = None
    tangent: Tensor | None = None
    target: Tensor | None = None
    output: Tensor | None = None
    estimate: Tensor | None = None
    tokens: int | None = None
    classes: int | None = None


@dataclass(frozen=True)
class Method:
    """Base class. Subclasses are frozen dataclasses whose fields are the method's options.

    ``reads``: what ``cotangent`` uses. ``learns_from``: what ``learn`` uses (empty: it never
    learns). ``refits``: whether a calibration batch may set its map. ``project_after_learn``: the
    cotangent uses the state after this step's ``learn`` (algorithm 1 of GrAPE 2026, of FDFA 2024).
    ``mechanism``: one of ``MECHANISMS``. ``state_at``: what has a state, and which shape ``init``
    gets: each feedback "point" (C, n), each "weight" (its shape) or the "input" (n_0, C).
    ``transparent``: the incoming gradient passes every point unchanged. ``per_sample``: ``learn``
    gets the rows of noise and tangent. ``full_tangents``: every sample must carry one.
    ``tangents_from``: "all" points, or the "last" (those with no other between them and the tap).
    ``paper``: the options of ``preset="paper"``, where they differ from the defaults.
    """

    name: ClassVar[str] = ""
    reads: ClassVar[frozenset[str]] = frozenset()
    learns_from: ClassVar[frozenset[str]] = frozenset()
    refits: ClassVar[bool] = False
    project_after_learn: ClassVar[bool] = True
    mechanism: ClassVar[str] = "points"
    state_at: ClassVar[str] = "point"
    transparent: ClassVar[bool] = False
    per_sample: ClassVar[bool] = False
    full_tangents: ClassVar[bool] = False
    tangents_from: ClassVar[str] = "all"
    paper: ClassVar[dict[str, Any]] = {}

    @property
    def sequential(self) -> bool:
        """Whether a layer's update waits for another layer's."""
        return "next_delta" in self.reads or self.mechanism == "two_forwards"

    @property
    def feedback(self) -> bool:
        """Whether the method keeps any state at a feedback point."""
        return self.state_at == "point" and self.keeps_state

    @property
    def keeps_state(self) -> bool:
        """Whether the method keeps any state at all."""
        return type(self).init is not Method.init

    @property
    def exact(self) -> bool:
        """Whether every step is plain backpropagation."""
        return self.transparent and self.mechanism == "points"

    @property
    def weight_decay(self) -> float:
        """L2 that a feedback step adds to the gradient of each weight W behind a point."""
        return 0.0

    @property
    def fixed(self) -> bool:
        """Whether its maps never learn and can be made from uniform numbers alone."""
        return not self.learns_from and type(self).from_uniform is not Method.from_uniform

    def needs_tangents(self) -> bool:
        """Whether a step without tangents can use this method at all."""
        return "tangent" in self.reads

    def aligns(self) -> bool:
        """Whether it learns from tangents."""
        return "tangent" in self.learns_from

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        """The state at the start, on the generator's device; for ``shape`` see ``state_at``."""
        return {}

    def from_uniform(self, u: Tensor) -> State:
        """The state that ``init`` gives, from numbers U(-1, 1) of the shape (C, n)."""
        raise NotImplementedError

    def cotangent(self, rows: Rows) -> Tensor:
        """What replaces the incoming gradient at the cut: (R, n)."""
        raise NotImplementedError

    def weight(self, state: State, w: Tensor, noise: Tensor | None) -> Tensor:
        """What stands in for the weight ``w`` in backward products (mechanism "weights").

        ``noise`` is N(0, 1), shaped like ``w`` and new in every step, if the method reads it.
        """
        raise NotImplementedError

    def second_input(
        self, state: State, x: Tensor, output: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The second pass's input (N, n_0) and the last layer's error (mechanism "two_forwards").

        ``x`` (N, n_0), ``output`` and one-hot ``target`` (N, C) are those of the first pass.
        """
        raise NotImplementedError

    def learn(self, rows: Rows) -> State:
        """The state after one learning step."""
        return rows.state

    def refit(self, state: State, fitted: Tensor) -> State:
        """The state after a calibration batch fitted B (C, n) by ridge regression."""
        return {**state, "B": fitted}


def choose(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Refuse an option's value that is not one of the valid ones."""
    if value not in valid:
        raise OptionError(f"{name}={value!r}.{nearest(str(value), valid)}")


def positive(name: str, value: float) -> None:
    """Refuse an option's value that is not above 0."""
    if not is_number(value) or not value > 0:
        raise OptionError(f"{name}={value!r} must be a positive number")


def he_bound(n: int) -> float:
    """sqrt(6 / n)."""
    return float((6.0 / n) ** 0.5)


def he_uniform(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """U(-sqrt(6/n), sqrt(6/n)) on (C, n)."""
    bound = he_bound(shape[1])
    out = torch.empty(shape, device=generator.device, dtype=dtype)
    return out.uniform_(-bound, bound, generator=generator)


def unit_columns(b: Tensor, eps: float = 1e-12) -> Tensor:
    """Every column (a C-vector) rescaled to norm 1; a zero column stays zero."""
    norms: Tensor = b.norm(dim=0, keepdim=True).clamp_min(eps)
    return b / norms
