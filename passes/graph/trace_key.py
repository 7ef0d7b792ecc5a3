"""When two traces of a Python function give the same nodes: the keys of ``Emitter``'s caches.

Layers of one shape get the same alignment, projection and refit nodes; tracing a function costs
about 20 ms, splicing a graph that is known already less than one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from grapefx.torch_compat import batch_symbol, pytree

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


class _Same:
    """Equal to itself alone; keeps the object, so that its id is not used again."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def trace_key(fn: Callable[..., Any], spec: Any, flat: Sequence[Any], nodes: Sequence[Node]) -> Any:
    """A key that is equal for calls whose traces are equal; None where that cannot be told.

    The key holds the function's code and all that it closes over, the structure of the call, its
    constants, and shape, strides and dtype of its tensors. An object in a closure counts by a
    ``trace_key`` of its own where it has one, else by identity: it must not change meanwhile.
    """
    slots = {n: i for i, n in enumerate(nodes)}
    try:
        call = tuple(("node", slots[a]) if isinstance(a, Node) else _constant(a) for a in flat)
        return (_function(fn), repr(spec), call, tuple(_value(n.meta["val"]) for n in nodes))
    except (_UnknownError, ValueError):  # ValueError: a closure's cell is still empty
        return None


def call_key(op: Any, args: Any, kwargs: Any) -> Any:
    """A key that is equal for calls of one operator whose results have equal metadata, or None."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    try:
        call = tuple(
            ("node", _value(a.meta["val"])) if isinstance(a, Node) else _constant(a) for a in flat
        )
        return (_Same(op), spec, call)
    except _UnknownError:
        return None


class _UnknownError(Exception):
    """Something that cannot be compared."""


def _function(fn: Any) -> Any:
    if not isinstance(fn, types.FunctionType):
        return _Same(fn)
    cells = tuple(_constant(c.cell_contents) for c in fn.__closure__ or ())
    defaults = tuple(_constant(d) for d in fn.__defaults__ or ())
    named = tuple((k, _constant(v)) for k, v in (fn.__kwdefaults__ or {}).items())
    return (fn.__code__, cells, defaults, named)


def _constant(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        raise _UnknownError
    if type(value) in _PLAIN:
        return (type(value), value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(value), value.node.expr)
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(_constant(v) for v in value))
    if isinstance(value, dict):
        return (dict, tuple((_constant(k), _constant(v)) for k, v in value.items()))
    if isinstance(value, types.FunctionType):
        return _function(value)
    own = getattr(value, "trace_key", None)
    return (type(value), own) if own is not None and not callable(own) else _Same(value)


def _value(val: Any) -> Any:
    if isinstance(val, torch.Tensor):
        if val.layout != torch.strided:
            raise _UnknownError
        sizes = tuple(_size(s) for s in val.shape)
        return (sizes, tuple(_size(s) for s in val.stride()), val.dtype, val.device)
    if isinstance(val, (tuple, list)):
        return tuple(_value(v) for v in val)
    if isinstance(val, (torch.SymInt, int)):
        return _size(val)
    if val is None:
        return None
    raise _UnknownError


def _size(size: Any) -> Any:
    expr = batch_symbol(size)
    return int(size) if expr is None else expr
