"""What ``capture="export"`` compares of a module: whether its graph still describes it.

An exported graph has no guards. It goes stale when a submodule changes mode, a parameter is frozen,
tied or replaced by one of another layout, a child is swapped, a hook is added, or a Python number
on a module changes, also in a short list or dict: that is read on every call. Not read: numbers
with a leading underscore, globals, and what objects hold.
"""

from __future__ import annotations

from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from grapefx.capture import module_tree
from grapefx.passes.graph.layout import contiguous, described, strided

_SCALARS = (int, float, bool, str, FunctionType, BuiltinFunctionType, MethodType, torch.dtype)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SHORT = 64
_STORES = ("_modules", "_parameters", "_buffers")


class Fingerprint:
    """Reads the state of a module that its graph depends on, as one hashable value."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._tokens: dict[Any, int] = {}  # structures seen so far: going back finds its graph
        self.refresh()

    def refresh(self) -> None:
        """Walk the module tree again."""
        self._identity: list[int] | None = None  # set last: an interrupted walk is done again
        self.modules = list(module_tree.modules(self.model))
        self._dicts = [m.__dict__ for m in self.modules]
        self._sizes = list(map(len, self._dicts))
        self._hooks = [d[name] for d in self._dicts for name in _HOOKS]
        self._hooked = [tuple(d) for d in self._hooks if d]
        self._stores = [d[name] for d in self._dicts for name in _STORES]
        # held, so that no new object takes the identity of an old one
        self._held = [v for store in self._stores for v in store.values()]
        self._parameters = [
            (d["_parameters"], k)
            for d in self._dicts
            for k, p in d["_parameters"].items()
            if p is not None
        ]
        public = [
            (d, k, v)
            for d in self._dicts
            for k, v in d.items()
            if k != "training" and not k.startswith("_")
        ]
        self._scalars = [(d, k) for d, k, v in public if _watched(v)]
        self._others = [
            (d, k) for d, k, v in public if not _watched(v) and _plain(v) is not type(v)
        ]
        buffers = [b for d in self._dicts for b in d["_buffers"].values() if b is not None]
        first: dict[int, int] = {}
        ties = tuple([first.setdefault(id(d[n]), k) for k, (d, n) in enumerate(self._parameters)])
        # which modules and hooks there are under which names, what is tied, how buffers lie
        paths = tuple(
            [(n, type(m)) for n, m in module_tree.named_modules(self.model, remove_duplicate=False)]
        )
        token = (paths, tuple(self._hooked), ties, tuple([_layout(b) for b in buffers]))
        self.structure = self._tokens.setdefault(token, len(self._tokens))
        self._identity = list(map(id, self._held))

    def _changed(self) -> bool:
        return (
            [id(v) for store in self._stores for v in store.values()] != self._identity
            or [tuple(d) for d in self._hooks if d] != self._hooked
            or list(map(len, self._dicts)) != self._sizes
        )

    def read(self) -> tuple[Any, ...]:
        """(structure, modes, layout of parameters, scalars)."""
        if self._changed():
            self.refresh()
        modes = tuple([d["training"] for d in self._dicts])
        layouts = tuple([_layout(d[k]) for d, k in self._parameters])
        scalars = tuple([d.get(k) for d, k in self._scalars])
        if self._others:
            scalars += tuple([_plain(d.get(k)) for d, k in self._others])
        return self.structure, modes, layouts, scalars


def _watched(value: Any) -> bool:
    if type(value) is tuple:
        return all(type(i) in _SCALARS for i in value)
    return type(value) in _SCALARS


def _plain(value: Any) -> Any:
    """None, a number of another type (NumPy's), a short list or dict of numbers; else the type."""
    if isinstance(value, torch.Tensor):
        return _layout(value)
    if value is None or isinstance(value, int | float | str | Enum):
        return (type(value), value)
    if isinstance(value, list | dict) and len(value) <= _SHORT:
        items = list(value.items()) if isinstance(value, dict) else value
        if all(map(_number, items)):
            return (type(value), tuple(items))
    return type(value)


def _number(item: Any) -> bool:
    if type(item) is tuple:
        return all(map(_number, item))
    return item is None or type(item) in _SCALARS


def _layout(p: torch.Tensor) -> Any:
    return (p.requires_grad, p.dtype, p.device, p.shape, described(p))


def describe_leaf(leaf: Any, batch: int | None, batch_dim: int) -> Any:
    """What a graph assumes of one argument: all but its batch size and its values."""
    if isinstance(leaf, torch.Tensor):
        shape: tuple[Any, ...] = tuple(leaf.shape)
        if len(shape) > batch_dim and shape[batch_dim] == batch:
            shape = (*shape[:batch_dim], None, *shape[batch_dim + 1 :])
        channels_last = (
            len(shape) == 4
            and not contiguous(leaf)
            and leaf.is_contiguous(memory_format=torch.channels_last)
        )
        layout = channels_last if strided(leaf) else described(leaf)
        return (shape, leaf.dtype, leaf.device, leaf.requires_grad, layout)
    if hasattr(leaf, "tobytes") and hasattr(leaf, "dtype"):  # NumPy: a long repr is cut
        return (leaf.shape, str(leaf.dtype), leaf.tobytes())
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return (type(leaf), leaf)
