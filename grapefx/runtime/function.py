"""The one autograd.Function: forward runs the forward graph, backward the update graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grapefx.errors import BackwardError
from grapefx.passes.graph.layout import contiguous
from grapefx.runtime.call import TrainingCall
from grapefx.runtime.program import CompiledStep
from grapefx.torch_compat import clear_saved_tensors, dual

DUAL = (
    "forward-mode derivatives (torch.autograd.forward_ad, a dual tensor) cannot pass through a "
    "grapefx module: the tangent would be lost\n  remedy: use the plain model for it (net.original)"
)


class Step(torch.autograd.Function):
    """``apply(call, step, arguments, *differentiable inputs)``; see ``runtime/call.py``."""

    @staticmethod
    def forward(
        ctx: Any, call: TrainingCall, step: CompiledStep, arguments: list[Any], *leaves: Tensor
    ) -> Any:
        results = call.run_forward(step, arguments)
        # h and h.detach() are one value of the graph, but two outputs
        kept = zip(results[: step.outputs], call.differentiable, strict=True)
        outs = tuple([o if keep else o.detach() for o, keep in kept])
        saved = results[step.outputs :]
        ctx.save_for_backward(*[saved[i] for i in step.saved_tensors])
        ctx.sizes = [saved[i] for i in step.saved_sizes]
        ctx.call = call
        ctx.step = step
        ctx.used = False
        ctx.set_materialize_grads(False)  # which outputs the loss uses shows in what is None
        ctx.outputs = [(o.shape, None if contiguous(o) else o.stride(), o.dtype, o.device)
                       for o in outs]  # fmt: skip
        fixed = [o for o, keep in zip(outs, call.differentiable, strict=True) if not keep]
        if fixed:
            ctx.mark_non_differentiable(*fixed)
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        step: CompiledStep = ctx.step
        if torch.is_grad_enabled():
            raise BackwardError(
                "double backward (create_graph=True) has no meaning for a grapefx module: its "
                "gradients are not the derivative of a graph. Use the plain model for it."
            )
        if dual(grads):
            raise BackwardError(DUAL)
        if ctx.used:
            raise BackwardError(
                "backward was called twice on one forward: its saved values are gone, and feedback "
                "maps have learned from it. Sum the losses and call backward once, or run the "
                "forward again."
            )
        tensors = ctx.saved_tensors
        inputs: list[Any] = [None] * (len(step.saved_tensors) + len(step.saved_sizes))
        for i, t in zip(step.saved_tensors, tensors, strict=True):
            inputs[i] = t
        for i, s in zip(step.saved_sizes, ctx.sizes, strict=True):
            inputs[i] = s
        call: TrainingCall = ctx.call
        given = [
            (g, output)
            for g, output, keep in zip(grads, ctx.outputs, call.differentiable, strict=True)
            if keep
        ]
        unused = frozenset(i for i, (g, _) in enumerate(given) if g is None)
        wanted = [_laid_out(g, *output) for g, output in given]
        for role, ref in step.late:
            inputs.append(wanted[ref] if role == "cotangent" else call.late_input(role, ref))
        del tensors, wanted
        clear_saved_tensors(ctx)
        results = call.run_update(step, inputs)
        found = call.commit(step, results, unused)
        ctx.used = True
        return (None, None, None, *found)


def _laid_out(
    grad: Tensor | None,
    shape: torch.Size,
    layout: tuple[int, ...] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The cotangent in the strides that the graph was compiled for (a loss may hand stride 0)."""
    if grad is None:
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        return zeros if layout is None else _laid_out(zeros, shape, layout, dtype, device)
    if layout is None:
        return grad if grad.layout is not torch.strided else grad.contiguous()
    if grad.stride() == layout:
        return grad
    return torch.empty_strided(grad.shape, layout, dtype=grad.dtype, device=grad.device).copy_(grad)
