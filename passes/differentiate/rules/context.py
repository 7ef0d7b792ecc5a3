"""Declares what a tangent rule is, and what it may ask of the pass that calls it.

A *primal* is a value of the model's forward pass, its *tangent* the derivative of that value along
one direction, computed beside it. None stands for a tangent that is zero everywhere, for which no
node is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from torch.fx import Node

from grapefx.passes.graph.folds import Fold

T = TypeVar("T")

# The tangent of an operator that returns a tuple: by the index of the result.
Items = dict[int, Node | None]
# What a rule returns; a sequence where torch derives an operator that returns a tuple.
Result = Node | Items | Sequence[Node | None] | None


class RuleContext(Protocol):
    """What a rule sees of the tangent pass (``propagate.TangentEmitter``)."""

    @property
    def rows(self) -> Node | None:
        """How many samples carry tangents, as a node of the graph; None for all of them."""

    @property
    def batch(self) -> Any:
        """The batch size's symbol, or None where the graph holds one batch size."""

    @property
    def batch_size(self) -> int:
        """The example's batch size."""

    @property
    def batch_stats(self) -> str:
        """ "full" where tangents go through the statistics of a batch norm, else "frozen"."""

    @property
    def folds(self) -> dict[Node, Fold]:
        """Where the batch is in each value; empty where all samples carry tangents."""

    def t(self, arg: Any) -> Node | None:
        """The tangent of an argument; None is a symbolic zero."""

    def p(self, tree: T) -> T:
        """Primal operands: nodes cut down to the samples that carry tangents, the rest as it is."""

    def count(self, multiple: int) -> Node:
        """``multiple`` times the number of samples that carry tangents, as a node."""

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        """Emit one operator; arguments are nodes or plain values."""

    def get(self, node: Node, index: int) -> Node:
        """Emit ``node[index]`` for an operator that returns a tuple."""

    def trace(self, fn: Callable[..., Any], *args: Any, reuse: Node | None = None) -> Any:
        """Emit a Python function of tensors; returns nodes in the structure of its results.

        Where it repeats the call of ``reuse``, its value in the graph is taken instead.
        """

    def after(self, node: Node) -> AbstractContextManager[None]:
        """Emit behind ``node`` while the context lasts."""


# Returns the tangent of a node, given the context and the node.
Rule = Callable[[RuleContext, Node], Result]
