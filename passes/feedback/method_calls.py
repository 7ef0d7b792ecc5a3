"""Calls of a method's own code while a step is traced: what it is given, and what went wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from grapefx.errors import GrapefxError, MethodError
from grapefx.maps import FeedbackMap
from grapefx.methods.base import Method, Rows, State


def rows_of(
    m: FeedbackMap, state: State, found: dict[str, Tensor], dtype: torch.dtype | None = None
) -> Rows:
    """What a method reads at a point; the error and the like in ``dtype`` if it is given."""
    values = {k: m.value_rows(t) if k == "value" else t for k, t in found.items()}
    if dtype is not None:
        values = {k: t.to(dtype) for k, t in values.items()}
    return Rows(state, tokens=m.tokens, classes=m.classes, **values)


@contextlib.contextmanager
def authored(method: Method, part: str, m: FeedbackMap) -> Iterator[None]:
    """A method's own code inside: what goes wrong is said with the method, and what it may read."""
    try:
        yield
    except GrapefxError:
        raise
    except Exception as e:
        said = str(e).strip().splitlines()
        reads = method.reads if part == "cotangent" else method.learns_from
        raise MethodError(
            f"{part} of method {method.name!r} fails at layer {m.layer.name!r}: "
            f"{type(e).__name__}: {said[0] if said else ''}\n"
            f"  it may read {sorted(reads) or 'nothing'}, as declared; all else in rows is None"
        ) from e


def refitted(method: Method, m: FeedbackMap, parts: list[Tensor], state: State) -> State:
    """The method's state for the fitted map of each group."""
    like = state["B"].dtype
    if len(parts) == 1:
        return method.refit(state, parts[0].to(like))
    made = [method.refit(m.state_part(state, g), p.to(like)) for g, p in enumerate(parts)]
    return m.joined(made, state)
