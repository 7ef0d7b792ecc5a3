"""Writes that autograd does not see become values, in Dynamo's graph.

``with torch.no_grad(): h.mul_(2)``, ``h.detach().clamp_(max=1)`` and ``h.data[mask] = 0`` change
what an activation holds and leave its gradient alone: for autograd, the new value is the old one.
A functional graph has no memory: there, the write would be an operation through which no gradient
passes. Such a write is therefore done on a copy, and the activation goes on as

    h' = (h - h.detach()) + copy

which has the copy's values (h must be finite) and h's gradient. Views of the same memory are made
again from it. ``h.detach_()`` becomes ``h.detach()``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from grapefx.errors import CaptureError
from grapefx.passes.graph.source import quoted
from grapefx.torch_compat import memory

_OPERATORS = (
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
)
_IN_PLACE = {"setitem", "__setitem__"}.union(*({f"i{n}", f"__i{n}__"} for n in _OPERATORS))
_PLAIN = "grapefx_plain"  # mark of a node without gradient, whatever its example says
_NO_WRITE = ("requires_grad_",)


@dataclass
class _Memory:
    """One activation's memory behind a write.

    ``old``: the nodes that lay in it before, and ``roots`` those of all of it. ``copy`` holds the
    new values; ``value`` has the gradient too, and is missing until the ``no_grad`` region ends.
    ``views``: what was made again, by the node that it replaces and by whether it has a gradient.
    """

    old: set[Node]
    roots: set[Node]
    source: Node
    copy: Node
    value: Node | None = None
    views: dict[tuple[Node, bool], Node] = field(default_factory=dict)


def show_writes(graph: Graph) -> None:
    """Rewrite such writes in a graph of Dynamo's, or of a checkpointed part of one.

    Raises:
        CaptureError: a view of the written memory cannot be made again from it.
    """
    for n in graph.nodes:
        target = _target(n)
        first = target[0] if isinstance(target, list | tuple) and target else target
        value = first.meta.get("example_value") if isinstance(first, Node) else None
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            _Writes(graph).run()  # not for a counter of batches
            return


class _Writes:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: dict[Any, list[Node]] = {}  # those in each memory, its maker first
        self.memory: dict[Any, _Memory] = {}
        self.written_by: dict[Node, Node] = {}  # an in-place operation -> what it returns
        self.renamed: dict[Node, Node] = {}  # detached in place
        self.off = False

    def run(self) -> None:
        for n in list(self.graph.nodes):
            if n.op == "call_function" and n.target is torch._C._set_grad_enabled:
                self.off = n.args[0] is False
                if not self.off:
                    for memory in self.memory.values():
                        if memory.value is None:
                            self._with_gradient(memory, n)
                continue
            inputs = {a: self._current(a, n) for a in n.all_input_nodes}
            target = _target(n)
            if n.op == "call_method" and n.target == "detach_":
                n.target = "detach"
                self.renamed[n.all_input_nodes[0]] = n
            elif isinstance(target, Node):
                self.written_by[n] = target
                self._write(n, target, inputs)
            elif isinstance(target, list | tuple) and any(map(self._hidden, target)):
                raise hidden_write(quoted(n), ", several in one call")
            for a, now in inputs.items():
                if now is not a:
                    n.replace_input_with(a, now)
            if (key := _storage(n)) is not None:
                self.nodes.setdefault(key, []).append(n)

    def _hidden(self, target: Any) -> Node | None:
        """The activation that a write into ``target`` changes out of autograd's sight, or None."""
        key = _storage(target) if isinstance(target, Node) else None
        if key is None or key not in self.nodes:
            return None
        known = self.memory.get(key)
        root = self.nodes[key][0] if known is None else known.value
        if root is None:
            return None  # a copy already, in this region
        if root.op not in ("call_function", "call_method"):
            return None  # a parameter, a buffer or an argument: the write itself must last
        return root if _has_gradient(root) and (self.off or not _has_gradient(target)) else None

    def _write(self, n: Node, target: Node, inputs: dict[Node, Node]) -> None:
        """Let ``n`` write into a copy, if autograd does not see that it writes."""
        root = self._hidden(target)
        if root is None:
            return
        key = _storage(target)
        known = self.memory.get(key)
        with self.graph.inserting_before(n):
            plain = self.graph.call_method("detach", (root,))
            copy = self.graph.call_method("clone", (plain,))
        for new in (plain, copy):
            new.meta = {**root.meta, _PLAIN: True}
        roots = {self.nodes[key][0], root, *(() if known is None else (known.copy, *known.roots))}
        memory = self.memory[key] = _Memory(set(self.nodes[key]), roots, root, copy)
        inputs.update({a: self._current(a, n) for a in inputs if _storage(a) == key})
        if not self.off:
            self._with_gradient(memory, n)

    def _with_gradient(self, memory: _Memory, behind: Node) -> None:
        """Insert the activation's new value behind a node."""
        root = memory.source
        with self.graph.inserting_after(behind):
            plain = self.graph.call_method("detach", (root,))
        with self.graph.inserting_after(plain):
            zero = self.graph.call_function(torch.sub, (root, plain))
        with self.graph.inserting_after(zero):
            memory.value = self.graph.call_function(torch.add, (zero, memory.copy))
        plain.meta = dict(memory.copy.meta)
        zero.meta, memory.value.meta = dict(root.meta), dict(root.meta)

    def _current(self, a: Node, at: Node) -> Node:
        """What node ``at`` reads for ``a``."""
        a = self.renamed.get(a, a)
        memory = self.memory.get(_storage(a))
        if memory is None or a not in memory.old:
            return a
        graded = memory.value is not None and _has_gradient(a)
        return self._again(memory, a, graded, at)

    def _again(self, memory: _Memory, a: Node, graded: bool, at: Node) -> Node:
        """The view ``a`` of the memory, made of its new values."""
        if a in memory.roots:
            return memory.value if graded and memory.value is not None else memory.copy
        if a in self.written_by:
            return self._again(memory, self.written_by[a], graded, at)
        if (a, graded) not in memory.views:
            own = [b for b in a.all_input_nodes if _storage(b) == _storage(a)]
            if len(own) != 1 or a.op not in ("call_method", "call_function"):
                raise hidden_write(quoted(at), ", and reads a view of it that cannot be made again")
            base = self._again(memory, own[0], graded, at)
            with self.graph.inserting_before(at):
                new = self.graph.node_copy(a, lambda b: base if b is own[0] else b)
            memory.views[a, graded] = new
        return memory.views[a, graded]


def _target(n: Node) -> Any:
    """What a node writes into, or None."""
    if n.op not in ("call_function", "call_method"):
        return None
    return written_operand(n.target, n.args, n.kwargs)


def written_operand(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call writes into, or None; ``op`` is a function, or a method's name."""
    name = op if isinstance(op, str) else getattr(op, "__name__", "")
    if kwargs.get("out") is not None:
        return kwargs["out"]
    in_place = name in _IN_PLACE or (
        name.endswith("_") and not name.endswith("__") and name not in _NO_WRITE
    )
    return args[0] if args and (in_place or _inplace_option(op, args, kwargs)) else None


def _inplace_option(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``inplace=True`` is given, as ``torch.nn.functional`` takes it."""
    if "inplace" in kwargs:
        return kwargs["inplace"] is True
    if getattr(op, "__module__", "") != "torch.nn.functional":
        return False
    names = list(inspect.signature(op).parameters)
    place = names.index("inplace") if "inplace" in names else len(args)
    return place < len(args) and args[place] is True


def _storage(n: Node | None) -> Any:
    """A key of the memory that a node's value, or the first of its values, lies in."""
    value = n.meta.get("example_value") if n is not None else None
    if isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    return memory(value)


def _has_gradient(n: Node) -> bool:
    value = n.meta.get("example_value")
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return isinstance(value, Tensor) and value.requires_grad and _PLAIN not in n.meta


def hidden_write(where: str, why: str = "") -> CaptureError:
    """The refusal of such a write at the place ``where``."""
    return CaptureError(
        "the model cannot be captured: its forward writes into an activation out of autograd's "
        f"sight{why}{where}\n"
        "  remedy: go on with a new tensor, h = h + (new - h).detach(), which has the new values "
        "and the old gradient"
    )
