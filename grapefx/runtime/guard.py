"""The fingerprint that decides whether a captured graph still describes the module.

torch.compile guards every assumption of a trace. A capture without guards goes stale when a
submodule changes mode, a parameter is frozen, tied or replaced by one of another layout, a child is
swapped, a hook is added, or a Python number on a module changes, also in a short list or dict. All
of that is cheap to read on every call. Numbers with a leading underscore (training frameworks write
theirs each step) and in other objects are read where a capture read them. Not read: globals, and
objects in objects.
"""

from __future__ import annotations

from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from grapefx import tree
from grapefx.layout import contiguous, described, strided
from grapefx.torch_compat import pytree

_SCALARS = (int, float, bool, str, FunctionType, BuiltinFunctionType, MethodType, torch.dtype)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RESTLESS = 8  # captures for one reason before it is named
_SHORT = 64
_STORES = ("_modules", "_parameters", "_buffers")


class Fingerprint:
    """Reads the state of a module that its graph depends on, as one hashable value."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._tokens: dict[Any, int] = {}  # structures seen so far: going back finds its graph
        self._last: tuple[Any, ...] | None = None
        self._counts: dict[str, int] = {}
        self._more: list[tuple[dict[str, Any], str]] = []  # see ``watch``
        self.refresh()

    def refresh(self) -> None:
        """Walk the module tree again."""
        self._identity: list[int] | None = None  # set last: an interrupted walk is done again
        self.modules = list(tree.modules(self.model))
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
            [(n, type(m)) for n, m in tree.named_modules(self.model, remove_duplicate=False)]
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
        if self._more:
            scalars += tuple([_contents(d.get(k)) for d, k in self._more])
        return self.structure, modes, layouts, scalars

    @staticmethod
    def trains(reading: tuple[Any, ...]) -> bool:
        """Whether any parameter was trainable."""
        return any(layout[0] for layout in reading[2])

    def watch(self, read: tuple[tuple[str, str], ...]) -> tuple[Any, ...]:
        """Read these (module, attribute) too; returns what each reading ends in from now on."""
        modules = dict(tree.named_modules(self.model))
        known = {(id(d), k) for d, k in self._more}
        held = {id(d.get(k)) for d, k in self._more if _holder(d.get(k))}
        new = []
        for path, name in read:
            store = modules[path].__dict__
            value = store.get(name)
            if (id(store), name) in known or id(value) in held:
                continue  # many modules share one configuration
            if _holder(value):
                held.add(id(value))
            new.append((store, name))
        self._more += new
        return tuple([_contents(d.get(k)) for d, k in new])

    def restless(self, reading: tuple[Any, ...]) -> str:
        """At a capture: the attribute that has caused one for the eighth time, or ''."""
        last, self._last = self._last, reading
        if last is None or last[:3] != reading[:3] or len(last[3]) != len(reading[3]):
            return ""
        watched = [*self._scalars, *self._others, *self._more]
        for (store, key), a, b in zip(watched, last[3], reading[3], strict=True):
            if a != b:
                path = next(n for n, m in tree.named_modules(self.model) if m.__dict__ is store)
                name = f"{path}.{key}".lstrip(".")
                self._counts[name] = self._counts.get(name, 0) + 1
                return name if self._counts[name] == _RESTLESS else ""
        return ""


class Calls:
    """Counts captures that one argument of the calls was the reason for."""

    def __init__(self) -> None:
        self._last: dict[Any, tuple[Any, ...]] = {}
        self._counts: dict[Any, int] = {}

    def restless(self, call: tuple[Any, ...], spec: Any, training: bool) -> str:
        """At a capture, for ``describe_leaf`` of all leaves: what to tell the user, or ''."""
        last = self._last.get((spec, training))
        self._last[spec, training] = call
        if last is None:
            return ""
        changed = [i for i, (a, b) in enumerate(zip(last, call, strict=True)) if a != b]
        if not changed:
            return ""
        where = (spec, training, changed[0])
        self._counts[where] = self._counts.get(where, 0) + 1
        if self._counts[where] != _RESTLESS:
            return ""
        name, new = _argument(spec, changed[0]), call[changed[0]]
        if new[0] is float or new[0] is int:
            return (
                f"{name} of the calls keeps changing, and each new number needs a new capture: "
                "pass it as a tensor"
            )
        return (
            f"{name} of the calls keeps changing in shape or kind, and each new one is captured "
            "and compiled: pad to a few lengths"
        )


def _argument(spec: Any, index: int) -> str:
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    for name, value in [*enumerate(args), *kwargs.items()]:
        if index in pytree.tree_leaves(value):
            return f"the argument {name!r}"
    return "an argument"


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


def _holder(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, Enum | torch.Tensor)


def _contents(value: Any) -> Any:
    """What of an attribute is compared: a number, or the public numbers of an object."""
    if not _holder(value):
        return _plain(value)
    public = [(k, v) for k, v in vars(value).items() if not k.startswith("_")]
    return (type(value), tuple([(k, _plain(v)) for k, v in public]))


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
