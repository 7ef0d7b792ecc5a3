"""Which attributes of its modules a forward reads, beside those that are always watched.

A trace takes their values for granted: numbers with a leading underscore, and objects that hold
numbers (a configuration). Those that nobody reads may change, as training frameworks' do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from grapefx import tree

_OWN = frozenset(nn.Module().__dict__)
_COMMON = frozenset((int, float, bool, str, tuple, list, dict, type(None), MethodType))
_FOREIGN = frozenset(
    ("abc", "builtins", "collections", "enum", "functools", "numpy", "threading", "torch", "typing")
)


@contextlib.contextmanager
def recording(model: nn.Module, found: dict[tuple[str, str], None]) -> Iterator[None]:
    """What runs inside adds (path of the module, attribute) to ``found``."""
    paths = {id(m): name for name, m in tree.named_modules(model)}

    def read(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name[0] == "_":
            wanted = name not in _OWN and name[:2] != "__" and _number(self, value)
        else:
            wanted = type(value) not in _COMMON and _object(value)
        if wanted and id(self) in paths and name in object.__getattribute__(self, "__dict__"):
            found[paths[id(self)], name] = None
        return value

    before = nn.Module.__dict__.get("__getattribute__")
    nn.Module.__getattribute__ = read  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        if before is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = before  # type: ignore[method-assign]


def _number(module: nn.Module, value: Any) -> bool:
    plain = value is None or isinstance(value, int | float | str | tuple | list | dict | Tensor)
    return plain and not type(module).__module__.startswith("torch.")


def _object(value: Any) -> bool:
    if isinstance(value, SimpleNamespace):
        return True
    kind = type(value)
    if isinstance(value, nn.Module | Tensor | type) or kind.__module__.split(".")[0] in _FOREIGN:
        return False
    return hasattr(value, "__dict__") and not callable(value)


__all__ = ["recording"]
