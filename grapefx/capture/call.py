"""The arguments of a call as a flat list, and the sizes that a capture makes symbolic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grapefx.torch_compat import mark_dynamic, pytree


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Leaves and structure of a call. Dataclasses are taken apart too."""
    return flatten((args, kwargs))


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and structure of what a model takes or returns."""
    leaves, spec = pytree.tree_flatten(tree)
    unknown = {type(leaf) for leaf in leaves if hasattr(type(leaf), "__dataclass_fields__")}
    for cls in unknown:
        torch.export.register_dataclass(cls)
    return flatten(tree) if unknown else (leaves, spec)


def pick_hint(sizes: set[int], near: int) -> int:
    """A size to trace with that no other size equals, divides or is a multiple of."""
    hint = max(near, 3)
    while any(s > 1 and (s % hint == 0 or hint % s == 0) for s in sizes):
        hint += 1
    return hint


def resized(tensor: Tensor, sizes: dict[int, int]) -> Tensor:
    """A tensor like ``tensor`` with other sizes in some dims; a trace reads its metadata only."""
    shape = [sizes.get(d, s) for d, s in enumerate(tensor.shape)]
    with torch.inference_mode(tensor.is_inference()):
        out = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
        if _channels_last(tensor):
            out = out.to(memory_format=torch.channels_last)
        return out.requires_grad_(tensor.requires_grad)


def _channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def dense(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """The arguments with every tensor contiguous (or channels-last), so that one graph serves all
    layouts; None if they are already.
    """
    leaves, spec = flatten_call(args, kwargs)
    other = [
        i
        for i, t in enumerate(leaves)
        if isinstance(t, Tensor)
        and t.layout == torch.strided
        and not t.is_contiguous()
        and not _channels_last(t)
    ]
    if not other:
        return None
    for i in other:
        leaves[i] = leaves[i].contiguous()
    found: tuple[Any, Any] = pytree.tree_unflatten(leaves, spec)
    return found


@dataclass(frozen=True)
class Symbolic:
    """Which dims of which leaves of a call get symbols.

    ``batch``: the leaves whose batch dim is the batch. ``others``: further (leaf, dim).
    """

    batch: tuple[int, ...] = ()
    others: frozenset[tuple[int, int]] = field(default=frozenset())

    def __bool__(self) -> bool:
        return bool(self.batch or self.others)


def choices(
    leaves: Sequence[Any], batch_dim: int, others: frozenset[tuple[int, int]]
) -> Iterator[Symbolic]:
    """What may be symbolic in a call, the likeliest first and nothing last.

    The first tensor holds the batch, or else (a table, a mask) one of those that follow. All
    tensors of one length hold it, or else (a square mask whose side is the batch size by chance)
    one of them.
    """
    sizes = {
        i: t.shape[batch_dim]
        for i, t in enumerate(leaves)
        if isinstance(t, Tensor) and t.layout == torch.strided and t.ndim > batch_dim
    }
    others = frozenset((i, d) for i, d in others if i in sizes and leaves[i].shape[d] > 1)
    found = []
    if next(iter(sizes.values()), 1) > 1:
        for size in dict.fromkeys(s for s in sizes.values() if s > 1):
            carriers = tuple(i for i, s in sizes.items() if s == size)
            found.append(carriers)
            if len(carriers) > 1:
                found += [(i,) for i in carriers]
    for batch in found:
        yield Symbolic(batch, others - {(i, batch_dim) for i in batch})
    if others:
        yield Symbolic((), others)
    yield Symbolic()


def examples(
    leaves: Sequence[Any], which: Symbolic, batch_dim: int, known: set[int], *, real: bool
) -> list[Any]:
    """The leaves of a call with symbolic dims in sizes that equal no other one by chance.

    ``known``: sizes that the model has. ``real``: in the sizes of the call, where its own ask for
    another graph. Tensors of the caller are never marked: those with symbols are stand-ins.
    """
    dims: dict[int, dict[int, int]] = {}
    for i in which.batch:
        dims.setdefault(i, {})[batch_dim] = leaves[i].shape[batch_dim]
    for i, d in which.others:
        dims.setdefault(i, {})[d] = leaves[i].shape[d]
    taken = set(known)
    for i, t in enumerate(leaves):
        if isinstance(t, Tensor) and t.layout == torch.strided:
            taken |= {s for d, s in enumerate(t.shape) if d not in dims.get(i, {})}
    hints: dict[tuple[bool, int], int] = {}  # the batch, and every other length, has its own
    out = list(leaves)
    for i, sizes in dims.items():
        new = {}
        for d, size in sizes.items():
            key = (i in which.batch and d == batch_dim, size)
            if key not in hints:
                hints[key] = size if real else pick_hint(taken, size)
                taken.add(hints[key])
            new[d] = hints[key]
        out[i] = resized(leaves[i], new)
        for d in new:
            mark_dynamic(out[i], d)
    return out
