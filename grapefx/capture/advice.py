"""What to do where a capture fails for a reason that the call or the model's modules show."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from grapefx.capture import module_tree
from grapefx.errors import CaptureError, GrapefxError, InputError


def advised(
    error: CaptureError, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> GrapefxError:
    """The error with the remedy for its reason; ``error`` itself where none is known."""
    said = str(error)
    named = {f"argument {k!r}": v for k, v in [*enumerate(args), *kwargs.items()]}
    for name, value in [*named.items(), *_buffers(model)]:
        layout = getattr(value, "layout", torch.strided)
        if layout != torch.strided and "wrap sparse" in said:
            return InputError(
                f"the {name} is sparse ({layout}), and Dynamo traces no sparse tensors\n"
                "  remedy: capture='export'"
            )
        if layout not in (torch.strided, torch.sparse_coo, torch.sparse_csr):
            return InputError(
                f"the {name} is sparse in the layout {layout}, with which torch cannot trace what "
                f"the model does: {said.splitlines()[0]}\n"
                "  remedy: pass it as .to_sparse_csr() or .to_sparse_coo()"
            )
    remedy = ""
    for name, value in named.items():
        if isinstance(value, torch.Generator):
            remedy = (
                f"the {name} is a torch.Generator, which no graph can hold: draw outside and pass "
                "the tensor, or let the model draw from torch's own generator (torch.manual_seed)"
            )
        elif isinstance(value, PackedSequence):
            remedy = (
                f"the {name} is a PackedSequence, whose rows belong to no sample: pass the padded "
                "tensor (nn.utils.rnn.pad_packed_sequence) and mask, or gather, what follows"
            )
    parts = [(n, m) for n, m in module_tree.named_modules(model) if _fake_quantize(m)]
    if not remedy and "ctc_loss" in said:
        remedy = (
            "CTC loss reads its lengths as numbers: return the log-probabilities and compute the "
            "loss outside the model"
        )
    elif not remedy and parts:
        remedy = (
            f"{parts[0][0]!r} is a FakeQuantize, which a trace cannot follow: use "
            "torch.ao.quantization.FusedMovingAvgObsFakeQuantize (the default of QAT configs), "
            "which is one operator, with capture='export'"
        )
    if not remedy:
        return error
    lines = said.splitlines()
    kept = lines[:-1] if len(lines) > 1 else lines
    return CaptureError("\n".join([*kept, f"  remedy: {remedy}"]))


def no_tensor(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a call without a tensor cannot be captured: an argument is missing, or there is none."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as e:
        return f"the call does not fit {type(model).__name__}.forward: {e}"
    except ValueError:  # no signature
        pass
    return (
        "the call has no tensor argument, and without one there is no batch to learn from\n"
        "  remedy: pass what the model starts from as a tensor with the batch in its first "
        "dimension (batch_dim= names another one)"
    )


def _buffers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(f"buffer {n!r}", b) for n, b in module_tree.named_buffers(model)]


def _fake_quantize(module: nn.Module) -> bool:
    return any(c.__name__ == "FakeQuantize" for c in type(module).__mro__)
