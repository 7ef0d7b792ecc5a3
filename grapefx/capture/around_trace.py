"""What is put in place of parts of torch while a model is traced, and taken back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from grapefx.capture import module_tree
from grapefx.errors import CaptureError
from grapefx.passes.graph import custom_functions as functions


@contextlib.contextmanager
def as_parameters(model: nn.Module) -> Iterator[None]:
    """Tensors that ``torch.func.functional_call`` put in the places of parameters become ones."""
    held: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    made: dict[int, nn.Parameter] = {}
    for module in module_tree.modules(model):
        values: dict[str, Any] = module.__dict__["_parameters"]
        for name, t in values.items():
            if t is None or isinstance(t, nn.Parameter):
                continue
            held.append((values, name, t))
            made.setdefault(id(t), nn.Parameter(t.detach(), requires_grad=t.requires_grad))
    for store, name, t in held:
        store[name] = made[id(t)]
    try:
        yield
    finally:
        for store, name, t in held:
            store[name] = t


@contextlib.contextmanager
def custom_functions() -> Iterator[None]:
    """Keep a user's autograd.Function as one node: export would silently drop its backward."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if (cls.__module__, cls.__name__) == ("torch.utils.checkpoint", "CheckpointFunction"):
            # it runs its function under no_grad: a capture would cut every gradient
            raise CaptureError(
                "the model calls torch.utils.checkpoint with use_reentrant=True, whose backward a "
                "capture would lose\n  remedy: checkpoint(..., use_reentrant=False); it changes "
                "nothing here, since a step graph decides by itself what to recompute"
            )
        if cls.__module__.startswith("torch."):
            return original.__get__(None, cls)(*args, **kwargs)
        if kwargs:
            return original.__get__(None, cls)(*args, **kwargs)  # which refuses them
        return functions.record(cls, args)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
