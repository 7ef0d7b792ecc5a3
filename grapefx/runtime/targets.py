"""Class targets for methods that read them (drtp, pepita, ...): checked, and made one-hot."""

from __future__ import annotations

import torch
from torch import Tensor

from grapefx.errors import InputError, MethodError
from grapefx.passes import markers
from grapefx.plan import Plan


def one_hot(y: Tensor | None, plan: Plan) -> Tensor:
    """Targets in the shape and dtype of the model's output (N, ..., C).

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
    fixed = [k for k, size in enumerate(like.shape) if isinstance(size, int)]
    if y.ndim != like.ndim or any(y.shape[k] != like.shape[k] for k in fixed):
        shape = ", ".join("N" if not isinstance(s, int) else str(s) for s in like.shape)
        raise InputError(
            f"targets of shape {tuple(y.shape)} do not fit the output ({shape}): method {name!r} "
            "needs class indices without the last dim, or one number for each class"
        )
    return y.to(like.dtype).contiguous()
