"""``inplace=True``: a model that trains through grapefx and stays the object that it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from grapefx.errors import OptionError
from grapefx.runtime.hooks import BACKWARD, FORWARD
from grapefx.torch_compat import call_of, global_hooks, plain_call, set_call

NAME = "grapefx"
_BY_ITSELF = "grapefx compiles it by itself: leave the model, or a model around it, out of"


def installed(model: nn.Module) -> Any:
    """The net (a ``FeedbackModule``) that ``model`` trains through, or None if it was not compiled
    in place.
    """
    net = model.__dict__.get(NAME)
    return net if getattr(net, "_installed", False) is True else None


def install(model: nn.Module, net: nn.Module) -> None:
    """From now on ``model(x)`` is a training step of ``net`` when gradients are enabled."""
    if hasattr(model, NAME) and model.__dict__.get(NAME, model) is not None:
        raise OptionError(f"the model has an attribute {NAME!r} already; inplace=True needs it")

    @torch.compiler.disable(reason=f"{_BY_ITSELF} torch.compile(..., fullgraph=True)")  # type: ignore
    def trained(*args: Any, **kwargs: Any) -> Any:
        hooked = any(model.__dict__[k] for k in BACKWARD + FORWARD[:1]) or global_hooks()
        if not hooked and len(model.__dict__[FORWARD[1]]) == ("_seen" in net.__dict__):  # ours
            return net.forward(*args, **kwargs)
        with _forward_of(model, net):
            return plain_call(model, *args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        # without gradients there is nothing to replace: generation loops need no capture a length,
        # and another torch.compile may have the model as it is
        return (trained if torch.is_grad_enabled() else plain_call_of)(*args, **kwargs)

    def plain_call_of(*args: Any, **kwargs: Any) -> Any:
        return plain_call(model, *args, **kwargs)

    # not a child: no key of the state dict, no module of the tree
    model.__dict__[NAME] = net
    net.__dict__.update(_installed=True, _call=call)
    set_call(model, call)
    net.__dict__["_seen"] = model.register_forward_pre_hook(_not_inlined)


@torch.compiler.disable(reason=f"{_BY_ITSELF} model.compile(fullgraph=True)")  # type: ignore
def _still_ours(model: nn.Module, net: nn.Module) -> None:
    if call_of(model) is not net.__dict__["_call"]:
        raise OptionError(
            f"model.compile() was called on this {type(model).__name__}, which grapefx compiled "
            "in place: its call would train by backpropagation\n"
            f"  remedy: {_BY_ITSELF} model.compile(); or model.grapefx.restore(), which undoes "
            "grapefx's part"
        )


def _not_inlined(model: nn.Module, args: Any) -> None:
    """Another compiler that runs the model's own forward with gradients, and so backpropagation,
    is refused here: ``nn.Module.compile`` puts its call where grapefx's was.
    """
    net = model.__dict__.get(NAME)
    if net is not None and torch.is_grad_enabled():  # a copy of the model is a plain one
        _still_ours(model, net)


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
    if call_of(model) is net.__dict__.pop("_call"):
        set_call(model, None)
    traced(model)
    del model.__dict__[NAME]
    net.__dict__["_installed"] = False
    return model


@contextlib.contextmanager
def _forward_of(model: nn.Module, net: nn.Module) -> Iterator[None]:
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
