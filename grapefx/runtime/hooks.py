"""Hooks on the modules inside a captured model: traced, or refused.

A capture runs the model once, so a forward hook runs once too: what it computes is in the graph,
what it does beside (print, append) is not done again. A backward hook would see gradients of the
backward chain, which does not exist. Hooks on the net itself and on parameters are torch's own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from grapefx.capture import module_tree
from grapefx.errors import CaptureError

FORWARD = ("_forward_hooks", "_forward_pre_hooks")
BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
# theirs only compute (weight norm, pruning) or record what the call returns; ours sets nothing
_QUIET = ("torch.", "transformers.", "grapefx.")


def _name(path: str) -> str:
    return f"the module {path!r}" if path else "the model"


def refuse_backward(model: nn.Module, *, root: bool) -> None:
    """Raise ``CaptureError`` for a backward hook on any module (``root``: on the model itself)."""
    for path, module in module_tree.named_modules(model):
        if not path and not root:
            continue
        for kind in BACKWARD:
            if getattr(module, kind):
                raise CaptureError(
                    f"{_name(path)} has a backward hook, which would never run: no gradient passes "
                    "through the modules inside\n  remedy: remove it; hooks on parameters "
                    "(p.register_hook), on the net and on its outputs work, and net.alignment() "
                    "measures gradients"
                )


def traced(model: nn.Module) -> list[str]:
    """A note for each module whose forward hooks run in captures only."""
    notes = []
    for path, module in module_tree.named_modules(model):
        found: list[Any] = [h for kind in FORWARD for h in getattr(module, kind).values()]
        if any(not _quiet(h) for h in found):
            notes.append(
                f"{_name(path)} has a forward hook: what it computes is part of the graph, but it "
                "runs only when the model is captured, with symbolic tensors, not in every step. "
                "Hooks on the net itself run in every call"
            )
    return notes


def _quiet(hook: Any) -> bool:
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return f"{module}.".startswith(_QUIET)
