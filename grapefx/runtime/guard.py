"""The fingerprint that decides whether a captured graph still describes the module.

torch.compile guards every assumption of a trace. A capture without guards goes stale when a
submodule changes mode, a parameter is frozen or replaced by one of another layout, a child is
swapped, or a Python number on a module changes. All of that is cheap to read on every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_SCALARS = (int, float, bool, str)


class Fingerprint:
    """Reads the state of a module that its graph depends on, as one hashable value."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ignored: set[tuple[int, str]] = set()
        self._structure: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        self.refresh()

    def refresh(self) -> None:
        """Walk the module tree again."""
        self.modules = list(self.model.modules())
        self._structure = []
        self._parameters: list[tuple[dict[str, Any], str]] = []
        self._scalars: list[tuple[dict[str, Any], str]] = []
        for m in self.modules:
            self._structure.append((m._modules, tuple(m._modules.values())))
            for store in (m._parameters, m._buffers):
                self._structure.append((store, tuple(v is None for v in store.values())))  # type: ignore[arg-type]
            self._parameters += [(m._parameters, k) for k, p in m._parameters.items() if p is not None]
            for k, v in m.__dict__.items():
                if k == "training" or k.startswith("_") or (id(m), k) in self.ignored:
                    continue
                if type(v) in _SCALARS or (type(v) is tuple and all(type(i) in _SCALARS for i in v)):
                    self._scalars.append((m.__dict__, k))

    def _changed(self) -> bool:
        for store, seen in self._structure:
            if len(store) != len(seen):
                return True
            for value, old in zip(store.values(), seen, strict=True):
                if value is not old and (type(old) is not bool or (value is None) is not old):
                    return True
        return False

    def read(self) -> tuple[Any, ...]:
        """(structure generation, modes, requires_grad and layout of parameters, scalars)."""
        if self._changed():
            self.refresh()
        modes = tuple([m.training for m in self.modules])
        params = tuple([_layout(d[k]) for d, k in self._parameters])
        scalars = tuple([d.get(k) for d, k in self._scalars])
        return modes, params, scalars

    def ignore_changed(self, old: tuple[Any, ...], new: tuple[Any, ...]) -> None:
        """Stop watching scalars that differ between two readings: the graph does not use them."""
        for (store, key), a, b in zip(self._scalars, old[2], new[2], strict=True):
            if a != b:
                owner = next(m for m in self.modules if m.__dict__ is store)
                self.ignored.add((id(owner), key))
        self.refresh()


def _layout(p: torch.Tensor) -> Any:
    return (p.requires_grad, p.dtype, p.device, p.stride())


def describe_leaf(leaf: Any, batch: int | None, batch_dim: int) -> Any:
    """What a graph assumes of one argument: all but its batch size and its values."""
    if isinstance(leaf, torch.Tensor):
        shape: tuple[Any, ...] = tuple(leaf.shape)
        if len(shape) > batch_dim and shape[batch_dim] == batch:
            shape = (*shape[:batch_dim], None, *shape[batch_dim + 1 :])
        channels_last = len(shape) == 4 and not leaf.is_contiguous() and leaf.is_contiguous(
            memory_format=torch.channels_last
        )
        return (shape, leaf.dtype, leaf.device, leaf.requires_grad, channels_last)
    try:
        hash(leaf)
    except TypeError:
        return repr(leaf)
    return (type(leaf), leaf)
