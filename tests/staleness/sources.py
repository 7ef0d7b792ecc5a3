"""Every kind of thing that a forward may read, as a small object that can be changed between calls.

A ``Source`` makes a model that reads one thing, and changes that thing. Numbers can be *used* in
several ways (a factor, a branch, a loop, a slice), and the suite makes the product of both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class Reader(nn.Module):
    """Two layers; ``read`` returns what the source is about, ``use`` applies it between them."""

    use: Callable[[Tensor, Any], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def read(self, *extra: Any, **named: Any) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor, *extra: Any, **named: Any) -> Any:
        h = torch.tanh(self.first(x))
        return self.last(type(self).use(h, self.read(*extra, **named)))


def factor(h: Tensor, n: Any) -> Tensor:
    """A float, or a tensor, multiplies."""
    return h * n


def integer(h: Tensor, n: Any) -> Tensor:
    """An integer multiplies: the second time it gets a symbol, as a size does."""
    return h * n


def branch(h: Tensor, n: Any) -> Tensor:
    """A number decides which operators run."""
    if n > 2.5:
        return torch.relu(h)
    return h.sin()


def loop(h: Tensor, n: Any) -> Tensor:
    """A number says how often."""
    for _ in range(n):
        h = torch.tanh(h + 1)
    return h


def width(h: Tensor, n: Any) -> Tensor:
    """A number is a length in a slice."""
    return h + h[:, :n].sum(1, keepdim=True)


@dataclass(frozen=True)
class Use:
    """How a number is used, and the numbers that it takes before and after the change."""

    name: str
    apply: Callable[[Tensor, Any], Tensor]
    values: tuple[Any, Any]


USES = (
    Use("factor", factor, (2.0, 3.0)),
    Use("branch", branch, (2.0, 3.0)),
    Use("loop", loop, (2, 3)),
    Use("width", width, (2, 3)),
    Use("integer", integer, (2, 3)),
)
AS_IS = Use("as-is", factor, (False, True))  # for what is no number: unchanged, changed


def _nothing(_: Any) -> Any:
    return None


def _no_args(_: nn.Module) -> tuple[Any, ...]:
    return ()


def _no_kwargs(_: nn.Module) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Made:
    """A model and how it is handled.

    ``change(model, value)`` changes what it reads. ``args`` and ``kwargs`` make what a call gets
    beside the input. ``around`` is entered for each call. ``seen`` is what the model has left
    behind, to be compared. ``restore`` undoes what would outlive the test.
    """

    model: nn.Module
    change: Callable[[nn.Module, Any], object]
    args: Callable[[nn.Module], tuple[Any, ...]] = _no_args
    kwargs: Callable[[nn.Module], dict[str, Any]] = _no_kwargs
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    seen: Callable[[Any], Any] = _nothing
    restore: Callable[[], object] = field(default=lambda: None)


@dataclass(frozen=True)
class Source:
    """One thing that a forward reads. ``make(use)`` builds a model of its own each time."""

    kind: str
    name: str
    make: Callable[[Use], Made]
    uses: tuple[Use, ...]


SOURCES: list[Source] = []


def number(kind: str, uses: tuple[Use, ...] = USES, **attributes: Any) -> Callable[[Any], Any]:
    """Register a source of numbers.

    The decorated function returns ``(read, change)``, with keywords for ``Made`` as an optional
    third: ``read(self, *extra)`` becomes the model's method.
    """

    def register(build: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[Any, ...]]:
        def make(use: Use) -> Made:
            read, change, *more = build()
            cls = type("Model", (Reader,), {"read": read, "use": staticmethod(use.apply)})
            return Made(cls(), change, **(more[0] if more else {}))

        _add(kind, build.__name__, make, uses)
        return build

    return register


def tensor(kind: str = "tensors") -> Callable[[Any], Any]:
    """Register a source of tensors, which multiply; ``change`` gets False, True, False."""
    return number(kind, (AS_IS,))


def whole(kind: str) -> Callable[[Any], Any]:
    """Register a source that builds a whole ``Made``; ``change`` gets False, True, False."""

    def register(build: Callable[[], Made]) -> Callable[[], Made]:
        _add(kind, build.__name__, lambda _: build(), (AS_IS,))
        return build

    return register


def _add(kind: str, name: str, make: Callable[[Use], Made], uses: tuple[Use, ...]) -> None:
    name = name.strip("_").replace("_", "-")
    assert all((s.kind, s.name) != (kind, name) for s in SOURCES), (kind, name)
    SOURCES.append(Source(kind, name, make, uses))


__all__ = ["AS_IS", "SOURCES", "USES", "Made", "Reader", "Source", "Use"]
