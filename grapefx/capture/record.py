"""What a front end makes of one call: a graph, when it holds, and how it stands in for the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from grapefx.ir import Captured
from grapefx.torch_compat import batch_symbol


@dataclass(frozen=True)
class Scope:
    """One call of a model. ``inner``: the model's own ``forward``, without the hooks around it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inner: bool = False

    def names(self) -> dict[str, Any]:
        """The call as Dynamo's guards look at it."""
        return {"model": self.model, "args": self.args, "kwargs": self.kwargs}


# Takes the graph's inputs in the order of ``Captured.inputs``; returns its computed outputs.
Run = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Capture:
    """One captured call.

    ``captured``: the forward graph. ``examples``: a tensor for each of its inputs, as traced.
    ``batch_size``: of the call that was captured. ``holds(scope)``: whether the graph is the
    model's for a call. ``broken(scope)``: what of it does not hold, in words.
    ``changed(scope)``: the integer that is to blame, to be given a symbol, or "".
    ``bind(run)``: the call itself, ``scope -> what the model returns``, with ``run`` instead of
    the graph.
    """

    captured: Captured
    examples: tuple[Tensor, ...]
    batch_size: int
    holds: Callable[[Scope], bool]
    broken: Callable[[Scope], str]
    changed: Callable[[Scope], str]
    bind: Callable[[Run], Callable[[Scope], Any]]

    def bound(self) -> Capture:
        """The record of a call that is bound, without what was needed for that.

        The stand-ins of a batch are as large as one, and traces refer weakly to parameters.
        """
        return replace(self, examples=(), bind=_no_more)

    def symbols(self) -> dict[Any, tuple[int, int]]:
        """Where each size symbol of the graph is read: (index of an input, dim)."""
        where: dict[Any, tuple[int, int]] = {}
        for k, node in enumerate(self.captured.placeholders()):
            for dim, size in enumerate(node.meta["val"].shape):
                expr = batch_symbol(size)
                if expr is not None and expr.is_Symbol:
                    where.setdefault(expr, (k, dim))
        return where


def _no_more(run: Run) -> Any:
    raise AssertionError("a capture is bound once")


def keeps_batch(batch: Any, outputs: Sequence[Any]) -> bool:
    """Whether a batch symbol reaches an output (a scalar loss may stand for it)."""
    wide = [v for v in outputs if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim]
    exprs = [batch_symbol(s) for v in wide for s in v.shape]
    return not wide or any(e is not None and batch in e.free_symbols for e in exprs)


def fixed_lead(inputs: Sequence[Tensor], outputs: Sequence[Any], batch_dim: int) -> int:
    """The input that holds the batch where it has no symbol: as long as an output is."""
    wide = [v for v in outputs if isinstance(v, torch.Tensor) and v.is_floating_point()]
    found = [v.shape[batch_dim] for v in wide if v.ndim > batch_dim]
    sizes = {i: t.shape[batch_dim] for i, t in enumerate(inputs) if t.ndim > batch_dim}
    return next((i for i, s in sizes.items() if s in found), next(iter(sizes), 0))
