"""What the cost rules see of a value: sizes as plain ints, or as sympy expressions of the batch."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import Graph, Node

from grapefx.errors import InputError
from grapefx.torch_compat import batch_symbol, size_hint

# int, or a sympy expression of the batch size in symbolic mode (sympy is untyped)
Size: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Meta:
    """One tensor: its shape, its elements, and how many of them are distinct in memory.

    ``distinct`` leaves out the dims of stride 0: an expanded tensor is read from its small storage.
    """

    shape: tuple[Size, ...]
    numel: Size
    distinct: Size
    itemsize: int
    dtype: torch.dtype

    @property
    def bytes(self) -> Size:
        """Bytes of the distinct elements."""
        return self.distinct * self.itemsize


def product(sizes: Sequence[Size]) -> Size:
    """The product of sizes; 1 for none."""
    out: Size = 1
    for s in sizes:
        out = out * s
    return out


def expression_sum(counts: Mapping[Size, int]) -> Any:
    """The expanded sympy sum of sizes times how often each occurs."""
    return sympy.expand(sympy.Add(*(sympy.sympify(e) * n for e, n in counts.items())))


class SizeReader:
    """Turns fake tensors into :class:`Meta` records.

    ``values`` maps a symbol's name to the number to use for it; other symbols take the hint that
    the graph was captured with. With ``symbolic=True`` sizes stay sympy expressions.
    """

    def __init__(self, values: Mapping[str, int] | None = None, *, symbolic: bool = False) -> None:
        self._names = dict(values or {})
        self._symbolic = symbolic
        self._memo: dict[Any, Size] = {}
        self._metas: dict[Any, Meta] = {}

    def size(self, value: Any) -> Size:
        """One size (int or SymInt) as an int, or as an expression in symbolic mode."""
        expr = batch_symbol(value)
        if expr is None:
            return int(value)
        found = self._memo.get(expr)
        if found is None:
            found = self._memo[expr] = expr if self._symbolic else self._number(value, expr)
        return found

    def _number(self, value: Any, expr: Any) -> int:
        free = expr.free_symbols
        if not any(s.name in self._names for s in free):
            return size_hint(value)
        # symbols carry assumptions, so they are matched by name
        out = expr.xreplace(
            {s: sympy.Integer(self._names[s.name]) for s in free if s.name in self._names}
        )
        if out.free_symbols:
            raise InputError(f"no value for the size symbols {sorted(map(str, out.free_symbols))}")
        return int(out)

    def meta(self, tensor: torch.Tensor) -> Meta:
        """The record of one (fake) tensor."""
        shape = tuple(self.size(s) for s in tensor.shape)
        strides: Sequence[Any] = ()
        if tensor.layout == torch.strided:
            strides = tensor.stride()
        stored = [
            s
            for s, st in zip(shape, strides, strict=False)
            if not (isinstance(st, int) and st == 0)
        ]
        distinct_shape = tuple(stored) if strides else shape
        key = (shape, distinct_shape, tensor.dtype)
        found = self._metas.get(key)
        if found is None:
            numel = product(shape)
            distinct = numel if distinct_shape == shape else product(distinct_shape)
            found = Meta(shape, numel, distinct, tensor.dtype.itemsize, tensor.dtype)
            self._metas[key] = found
        return found

    def read(self, value: Any) -> Any:
        """``value`` with every tensor replaced by its :class:`Meta`, sizes by :meth:`size`."""
        if isinstance(value, torch.Tensor):
            return self.meta(value)
        if isinstance(value, (tuple, list)):
            return tuple(self.read(v) for v in value)
        if isinstance(value, torch.SymInt):
            return self.size(value)
        return value


def size_symbols(graph: Graph) -> list[str]:
    """Names of the size symbols that the graph's inputs introduce, in order of appearance."""
    seen: dict[str, None] = {}
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for s in sizes:
            expr = batch_symbol(s) if isinstance(s, torch.SymInt) else None
            for symbol in sorted(getattr(expr, "free_symbols", ()), key=str):
                seen.setdefault(symbol.name)
    return list(seen)


def batch_values(graph: Graph, batch: int | None) -> dict[str, int]:
    """The values that set the graph's batch size to ``batch``.

    Raises:
        InputError: the graph holds one batch size only, or several symbols.
    """
    if batch is None:
        return {}
    symbols = size_symbols(graph)
    if len(symbols) == 1:
        return {symbols[0]: int(batch)}
    if not symbols:
        raise InputError(
            f"batch={batch} was asked for, but the graph was captured for one batch size only; "
            "capture it with an example input of that size"
        )
    raise InputError(
        f"the graph has several size symbols ({', '.join(symbols)}); name them one "
        "by one with values={...}"
    )


def is_size(node: Node) -> bool:
    """True for nodes that compute sizes: they are known before the step starts and cost nothing."""
    if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True
    name = getattr(node.target, "_schema", None)
    if name is not None:
        return name.name in (
            "aten::sym_size",
            "aten::sym_stride",
            "aten::sym_numel",
            "aten::sym_storage_offset",
        )
    # operator.getitem picks tensors; every other builtin in a functional graph works on sizes
    return (
        node.op == "call_function"
        and node.target is not operator.getitem
        and getattr(node.target, "__module__", "") in ("_operator", "math")
        and not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
    )
