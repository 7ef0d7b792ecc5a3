"""``tensor.data = value`` and ``tensor.set_(value)`` in a forward: refused, with the user's line.

They give a tensor other memory. A functional graph has values and no memory, so that the write
would be lost, or meet tensors that share the old memory.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from grapefx.capture.hidden_writes import hidden_write, written_operand
from grapefx.errors import CaptureError
from grapefx.passes.graph.source import PACKAGE, quoted
from grapefx.torch_compat import memory

_NAMES = ("shallow_copy_data_", "set_")  # Dynamo writes the first for .data, torch 2.11 the second
_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_READ = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def refuse_data_writes(gm: GraphModule) -> None:
    """Raise ``CaptureError`` for such a write in Dynamo's graph, or in a graph inside it."""
    for part in gm.modules():
        for n in part.graph.nodes if isinstance(part, GraphModule) else ():
            if n.op.startswith("call_") and _name(n.target) in _NAMES:
                raise _error(quoted(n))


class DataWritesRefused(TorchFunctionMode):
    """Inside, such a write raises ``CaptureError``: for a forward that runs while it is traced.

    So does a write into an activation that autograd does not see (``hidden_writes.py``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.activations: dict[int, Tensor] = {}  # by their memory, which they keep alive

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _DATA or _name(func) in _NAMES:
            raise _error(_here())
        if func == _READ:
            return args[0].detach()  # which export can follow
        target = written_operand(func, args, kwargs or {})
        if isinstance(target, Tensor) and memory(target) in self.activations:
            hidden = not (torch.is_grad_enabled() and target.requires_grad)
            if hidden or _name(func) == "detach_":
                raise hidden_write(_here())
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.requires_grad and not found.is_leaf:
            self.activations.setdefault(memory(found), found)
        return found


def _here() -> str:
    """The line of the user's that runs now, or ''."""
    for f in reversed(traceback.extract_stack()):
        if "/torch/" not in f.filename and not f.filename.startswith(PACKAGE):
            return f"\n  at {f.filename}:{f.lineno}, in {f.name}: {f.line}"
    return ""


def _name(target: Any) -> str:
    """``set_`` for the method's name, for ``torch.Tensor.set_`` and for an overload of aten's."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return str(name).partition(".")[0]


def _error(where: str) -> CaptureError:
    return CaptureError(
        "the model cannot be captured: its forward gives a tensor other memory "
        f"(tensor.data = ..., tensor.set_(...)){where}\n"
        "  remedy: for a buffer, write its values, self.name.copy_(value), or assign a new tensor, "
        "self.name = value; for an activation or an argument, go on with a new one, x = value; for "
        "a parameter, write behind the optimizer's step, under torch.no_grad()"
    )
