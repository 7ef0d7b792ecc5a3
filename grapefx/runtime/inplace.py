"""``inplace=True``: a model that trains through grapefx and stays the object that it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from grapefx.errors import OptionError
from grapefx.runtime.hooks import BACKWARD, FORWARD
from grapefx.torch_compat import global_hooks, plain_call, set_call

NAME = "grapefx"


def installed(model: nn.Module) -> Any:
    """The net that ``model`` trains through, if it was compiled in place."""
    net = model.__dict__.get(NAME)
    return net if getattr(net, "_installed", False) is True else None


def install(model: nn.Module, net: Any) -> None:
    """From now on ``model(x)`` is a training step of ``net`` when gradients are enabled."""
    if hasattr(model, NAME) and model.__dict__.get(NAME, model) is not None:
        raise OptionError(f"the model has an attribute {NAME!r} already; inplace=True needs it")

    def call(*args: Any, **kwargs: Any) -> Any:
        # without gradients there is nothing to replace: generation loops need no capture a length
        if not torch.is_grad_enabled():
            return plain_call(model, *args, **kwargs)
        hooked = any(model.__dict__[k] for k in BACKWARD + FORWARD[:1]) or global_hooks()
        if not hooked and len(model.__dict__[FORWARD[1]]) == ("_seen" in net.__dict__):  # ours
            return net.forward(*args, **kwargs)
        with _forward_of(model, net):
            return plain_call(model, *args, **kwargs)

    # not a child: no key of the state dict, no module of the tree
    model.__dict__[NAME] = net
    net.__dict__["_installed"] = True
    set_call(model, torch.compiler.disable(call, reason="grapefx compiles it by itself"))
    net.__dict__["_seen"] = model.register_forward_pre_hook(_not_inlined)


@torch.compiler.disable(reason="grapefx compiles it by itself")  # type: ignore
def _ours() -> None:
    pass


def _not_inlined(model: nn.Module, args: Any) -> None:
    """Another ``torch.compile`` would trace the model's own forward, and so backpropagation: it
    stops here, and calls the model.
    """
    if model.__dict__.get(NAME) is not None:  # a copy of the model is a plain one
        _ours()


def traced(part: nn.Module) -> None:
    """From now on the model is part of a larger one that is captured as a whole."""
    net = installed(part)
    if net is not None and "_seen" in net.__dict__:
        net.__dict__.pop("_seen").remove()


def uninstall(model: nn.Module) -> nn.Module:
    """Undo ``install``; returns the model."""
    net = installed(model)
    if net is None:
        raise OptionError("this model was not compiled by grapefx in place")
    set_call(model, None)
    traced(model)
    del model.__dict__[NAME]
    net.__dict__["_installed"] = False
    return model


@contextlib.contextmanager
def _forward_of(model: nn.Module, net: Any) -> Iterator[None]:
    """The model's own hooks run around the net: torch runs them around ``self.forward``."""
    held = model.__dict__.get("forward", ...)

    def forward(*args: Any, **kwargs: Any) -> Any:
        _put(model, held)  # torch has read it: from here on the model is itself again
        return net.forward(*args, **kwargs)

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        _put(model, held)


def _put(model: nn.Module, forward: Any) -> None:
    if forward is ...:
        model.__dict__.pop("forward", None)
    else:
        model.__dict__["forward"] = forward
