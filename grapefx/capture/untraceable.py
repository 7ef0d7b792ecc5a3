"""Modules that no capture can follow, refused before anything is made of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from grapefx.capture import module_tree
from grapefx.errors import OptionError


class Compiled:
    """The base of what ``grapefx.compile`` returns, which cannot be compiled once more."""


def refuse_untraceable(model: nn.Module) -> None:
    """Raise ``OptionError`` naming a part that is compiled already, TorchScript or lazy."""
    for name, part in module_tree.named_modules(model):
        found = _untraceable(part)
        if found is not None:
            raise OptionError(f"{f'{name!r} of the model' if name else 'the model'} {found}")


def _untraceable(part: nn.Module) -> str | None:
    """Why a module cannot be captured, with the remedy."""
    if isinstance(part, Compiled):
        return "is compiled by grapefx already"
    if isinstance(part, torch.jit.ScriptModule):
        return "is a TorchScript module, which cannot be traced: use the Python module"
    if type(part).__name__ == "OptimizedModule" and hasattr(part, "_orig_mod"):
        return "was compiled by torch.compile: use the module inside (._orig_mod)"
    own = [*part._parameters.values(), *part._buffers.values()]
    if distributed_tensor(own):
        return (
            "holds parameters that are spread over processes (DTensor, from fully_shard or "
            "distribute_tensor), which no capture can follow: compile first and shard the result, "
            "fully_shard(grapefx.compile(model)), or use DistributedDataParallel"
        )
    if any(nn.parameter.is_lazy(t) for t in own if t is not None):
        return "has no sizes yet (a lazy module): run the model once before compiling it"
    return None


def distributed_tensor(values: Iterable[Any]) -> bool:
    """Whether one of these is a ``DTensor``; torch's module for them is not imported to see it."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and any(isinstance(v, kind) for v in values)
