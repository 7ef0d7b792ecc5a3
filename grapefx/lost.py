"""Objects among a model's outputs that hold tensors of the trace: they cannot be filled in a step.

A distribution or a cache keeps its tensors where a flat list of outputs does not reach. Whoever
ignores it (a cache, in training) loses nothing; whoever uses it is told.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from grapefx.errors import CaptureError
from grapefx.torch_compat import FakeTensor, size_expression

_DEPTH = 4


class _LostError(CaptureError, AttributeError):
    """``hasattr`` is answered with no; anybody else reads why."""


class Lost:
    """In the place of such an object; any use of it raises ``CaptureError``."""

    _kind = "object"

    def __init__(self, kind: str) -> None:
        self.__dict__["_kind"] = kind

    def __repr__(self) -> str:
        return f"<{self._kind}, not filled by grapefx>"

    def _refuse(self, *_: Any) -> Any:
        raise _LostError(
            f"the model returns an object of type {self._kind}, whose tensors a captured step "
            "cannot fill\n  remedy: return the tensors (a distribution's logits) and make the "
            "object of them outside; dataclasses and named tuples of tensors are fine"
        )

    def __bool__(self) -> bool:
        return True

    __getattr__ = __setattr__ = __getitem__ = __iter__ = __len__ = __call__ = _refuse


def without_lost(leaf: Any) -> Any:
    """A leaf of a traced output as it is, or a ``Lost``."""
    return Lost(type(leaf).__qualname__) if _holds(leaf, _DEPTH) else leaf


def _holds(value: Any, depth: int) -> bool:
    """Whether an object that is no tensor holds tensors or sizes of a trace."""
    if isinstance(value, nn.Module | type) or not depth:
        return False
    if isinstance(value, dict):
        inside: Any = value.values()
    elif isinstance(value, list | tuple | set):
        inside = value
    else:
        inside = getattr(value, "__dict__", {}).values()
    return any(
        isinstance(v, FakeTensor)
        or size_expression(v) is not None
        or (not isinstance(v, Tensor) and _holds(v, depth - 1))
        for v in inside
    )


def refuse_only_lost(template: list[Any], tensor: Any) -> None:
    """Raise ``CaptureError`` where there is such an object among the leaves and no tensor."""
    lost = next((leaf for leaf in template if isinstance(leaf, Lost)), None)
    if lost is not None and not any(leaf is tensor for leaf in template):
        lost._refuse()


__all__ = ["Lost", "refuse_only_lost", "without_lost"]
