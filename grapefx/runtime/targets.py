"""Class targets for methods that read them (drtp, pepita, ...): checked, and made one-hot."""

from __future__ import annotations

import torch
from torch import Tensor

from grapefx.errors import InputError, MethodError
from grapefx.passes.graph import markers
from grapefx.plan import Plan
from grapefx.torch_compat import size_expression


def one_hot(y: Tensor | None, plan: Plan, batch: int) -> Tensor:
    """Targets in the shape and dtype of the model's output (N, ..., C), for ``batch`` samples.

    ``y`` holds class indices (N, ...), of which negative ones (padding) become rows of zeros, or
    one row of class probabilities each (N, ..., C). Raises ``MethodError`` if there is none,
    ``InputError`` if it does not fit the output.
    """
    name = plan.method.name
    if y is None:
        raise MethodError(
            f"method {name!r} learns from class targets, and none were given for this step\n"
            "  remedy: call net.targets(y) before loss.backward(), with the class indices y of the "
            "batch (or rows of class probabilities)"
        )
    like = markers.find(plan.joint.gm.graph, markers.TAP)[0].meta["val"]
    classes = like.shape[-1]
    if not y.is_floating_point() and y.ndim == like.ndim - 1:
        if int(y.max() if y.numel() else 0) >= classes:
            raise InputError(
                f"a class target is {int(y.max())}, but the output has {classes} classes"
            )
        known = (y >= 0).unsqueeze(-1)
        y = torch.nn.functional.one_hot(y.long().clamp_min(0), classes) * known
    shape = tuple(_size(s, batch) for s in like.shape)
    if y.shape != shape:
        raise InputError(
            f"targets of shape {tuple(y.shape)} do not fit the output {shape}: method {name!r} "
            "needs class indices without the last dim, or one number for each class"
        )
    return y.to(like.dtype).contiguous()


def _size(size: int | torch.SymInt, batch: int) -> int:
    expr = size_expression(size)
    return int(size if expr is None else expr.subs({s: batch for s in expr.free_symbols}))
