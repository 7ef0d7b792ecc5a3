"""Custom autograd functions: one opaque node in a capture, the user's own code in a step graph.

``torch.export`` traces the operators inside ``Function.apply`` and loses the ``backward`` beside
them. While a model is captured, ``apply`` leaves one ``FUNCTION`` node instead (``record``). In the
joint trace ``Call`` gives the node its gradient: what autograd makes of the user's function, traced
there. Its tangent (``rules.derived.function``) is that gradient transposed, so that
straight-through functions have the derivative that they declare. ``expand`` puts the forward's
operators in place of the node, last of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

from grapefx.errors import CaptureError
from grapefx.passes.graph import meta
from grapefx.passes.graph.emit import Emitter
from grapefx.torch_compat import TorchDispatchMode, memory, pytree, written

_LIB = torch.library.Library("grapefx", "FRAGMENT")
_LIB.define("function(Tensor[] tensors, int key) -> Tensor[]")
FUNCTION = torch.ops.grapefx.function.default

APPLY = torch.autograd.Function.__dict__["apply"]  # a capture puts its own in this place


@dataclass
class _Use:
    """One call: the class, its arguments (None for a tensor), and what came back."""

    cls: type
    template: tuple[Any, ...]
    out_spec: Any = None
    out_template: tuple[Any, ...] = ()


_USES: list[_Use] = []


class _Slot:
    """Where a tensor goes."""


_TENSOR = _Slot()


def record(cls: Any, args: Sequence[Any]) -> Any:
    """Stand in for ``cls.apply(*args)`` while a model is captured.

    Raises ``CaptureError`` for what a graph cannot hold: modules and functions among the arguments
    (their weights would be lost), tensors inside containers, and, when its shapes are computed, a
    forward that writes into its arguments or draws random numbers.
    """
    name = cls.__qualname__
    for a in args:
        inner = [] if isinstance(a, Tensor) else pytree.tree_leaves(a)
        if any(isinstance(x, (Tensor, nn.Module)) or _is_code(x) for x in inner):
            raise _refusal(name, f"is given a {type(a).__name__}, whose tensors it may read")
    tensors = [a for a in args if isinstance(a, Tensor)]
    if not tensors:
        raise _refusal(name, "is given no tensor")
    _USES.append(_Use(cls, tuple(_TENSOR if isinstance(a, Tensor) else a for a in args)))
    use = _USES[-1]
    found = iter(FUNCTION(tensors, len(_USES) - 1))
    leaves = [next(found) if x is _TENSOR else x for x in use.out_template]
    return pytree.tree_unflatten(leaves, use.out_spec)


def _is_code(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _refusal(name: str, why: str) -> CaptureError:
    return CaptureError(
        f"the model calls the custom autograd function {name!r}, which {why}; a capture would lose "
        "its backward\n  remedy: write it with torch ops and .detach() (straight-through: "
        "x + (f(x) - x).detach()), or as a torch.library operator"
    )


def applied(tensors: Sequence[Tensor], key: int) -> list[Tensor]:
    """The user's function itself, with its derivative."""
    use = _USES[key]
    it = iter(tensors)
    args = [next(it) if a is _TENSOR else a for a in use.template]
    leaves, use.out_spec = pytree.tree_flatten(APPLY.__get__(None, use.cls)(*args))
    use.out_template = tuple(_TENSOR if isinstance(x, Tensor) else x for x in leaves)
    return [x for x in leaves if isinstance(x, Tensor)]


class _Watch(TorchDispatchMode):
    """Notices what goes wrong in the gradient, which runs the forward again: random numbers, which
    would be others, and writes into the memory of an argument, which would happen twice.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.random = self.writes = False
        self._given = {memory(t) for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        self.writes |= any(memory(t) in self._given for t in written(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _values(tensors: list[Tensor], key: int) -> list[Tensor]:
    """The results alone, none of them an argument or a view of one."""
    with torch.no_grad():
        return [x.clone() for x in applied(tensors, key)]


def _shapes(tensors: list[Tensor], key: int) -> list[Tensor]:
    with _Watch(tensors) as watch:
        out = _values(tensors, key)
    name = _USES[key].cls.__qualname__
    if watch.random:
        raise _refusal(name, "draws random numbers")
    if watch.writes:
        raise _refusal(name, "writes into its arguments")
    return out


_LIB.impl("function", _values, "CompositeExplicitAutograd")
torch.library.register_fake("grapefx::function", _shapes, lib=_LIB)


class Call(torch.autograd.Function):
    """``FUNCTION`` with the user's derivative; used while the joint graph is traced."""

    @staticmethod
    def forward(ctx: Any, key: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.key = key
        ctx.save_for_backward(*tensors)
        found = tuple(FUNCTION(list(tensors), key))
        ctx.mark_non_differentiable(*[x for x in found if not x.is_floating_point()])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        need = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            tensors = [
                t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, need, strict=True)
            ]
            outs = applied(tensors, ctx.key)
        pairs = [
            (o, g) for o, g in zip(outs, grads, strict=True) if o.requires_grad and g is not None
        ]
        wanted = [t for t, n in zip(tensors, need, strict=True) if n]
        if not pairs or not wanted:
            return (None,) * (1 + len(tensors))
        ys, gs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, wanted, gs, allow_unused=True))
        return (None, *[next(found) if n else None for n in need])


def expand(graph: Graph) -> int:
    """Put the forward's operators in place of every ``FUNCTION`` node; returns how many."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target is FUNCTION]
    for node in nodes:
        key: int = node.args[1]  # type: ignore[assignment]
        em = Emitter(graph)
        with em.before(node, meta.labels(node)):
            found = em.trace(lambda ts, key=key: _values(list(ts), key), list(node.args[0]))  # type: ignore[misc]
        for user in list(node.users):
            user.replace_all_uses_with(found[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)
    return len(nodes)
