"""Tensors that a model reads and does not register: attributes are inputs, others constants."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn

from grapefx.capture import module_tree
from grapefx.errors import CaptureError


def tensor_attributes(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each tensor that is a plain attribute of a module lives: (dict, key) by full name."""
    found = {}
    for path, module in module_tree.named_modules(model):
        for key, value in module.__dict__.items():
            if isinstance(value, Tensor):
                found[f"{path}.{key}".lstrip(".")] = (module.__dict__, key)
    return found


def refuse_unregistered(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Raise ``CaptureError`` for a constant that is a trainable tensor: it would never learn."""
    own = {p.untyped_storage().data_ptr() for p in module_tree.parameters(model) if not p.is_meta}
    place = 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
    if place in own:
        return  # p.data, p.detach()
    if tensor.requires_grad or (place and _trainable_at(place)):
        raise CaptureError(
            f"the model reads a trainable tensor of shape {tuple(tensor.shape)} ({name!r}) that it "
            "does not register, and that would get no gradient\n  remedy: make it an nn.Parameter "
            "attribute, or put the layer that holds it into an nn.ModuleList"
        )


def _trainable_at(place: int) -> bool:
    """Whether a tensor anywhere shares this memory and wants a gradient (captures detach it)."""
    kinds = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    return any(
        t.requires_grad
        and t.is_leaf
        and t.layout == torch.strided
        and not t.is_meta
        and t.untyped_storage().data_ptr() == place
        for t in kinds
    )
