"""Holds the tangent rules, one function an operator: how its derivative along a direction is made.

``rule(em, node)`` returns the tangent node of ``node`` (for an operator that returns a tuple, a
dict by result index; None for a symbolic zero). ``em.t(arg)`` is an argument's tangent or None,
``em.p(arg)`` the primal operand to use beside it (cut down to the sub-batch when tangents are
taken on one), ``em.call`` emits one ATen call, ``em.trace`` a Python function of tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from grapefx.passes.differentiate.rules import (
    attention,
    derived,
    indexing,
    linear,
    norms,
    pointwise,
    products,
    reductions,
)
from grapefx.passes.differentiate.rules.context import Rule
from grapefx.passes.differentiate.rules.derived import derive
from grapefx.passes.differentiate.rules.derived import pointwise as derived_pointwise

aten = torch.ops.aten


_MODULES = (linear, products, pointwise, norms, attention, indexing, reductions, derived)
_RULES: dict[Any, Rule] = {op: rule for m in _MODULES for op, rule in m.RULES.items()}


def rules() -> dict[Any, Rule]:
    """Every rule, by operator overload."""
    return _RULES


def lookup(node: Node) -> Rule | None:
    """The rule of a node's operator; pointwise operators need none of their own."""
    target = node.target
    found = rules().get(target)
    if found is not None or not isinstance(target, torch._ops.OpOverload):
        return found
    return derived_pointwise if _is_pointwise(target) else None


def _is_pointwise(op: torch._ops.OpOverload) -> bool:
    tags = op.tags
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def kind(op: Any) -> str:
    """How an operator's tangent is made: ``rule``, ``pointwise`` or ``derived``."""
    if op in rules():
        return "rule"
    pointwise = isinstance(op, torch._ops.OpOverload) and _is_pointwise(op)
    return "pointwise" if pointwise else "derived"


def rules_table() -> dict[str, str]:
    """Operator -> ``rule`` or ``pointwise``. Every other operator is ``derived``."""
    table = {str(op): "rule" for op in rules()}
    for name in dir(aten):
        packet = getattr(aten, name)
        if not isinstance(packet, torch._ops.OpOverloadPacket) or name.startswith("__"):
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if op not in rules() and _is_pointwise(op) and _functional(op):
                table[str(op)] = "pointwise"
    return dict(sorted(table.items()))


def _functional(op: torch._ops.OpOverload) -> bool:
    schema = op._schema
    return not schema.is_mutable and not op._overloadname.endswith("out")


__all__ = ["Rule", "derive", "derived_pointwise", "kind", "lookup", "rules", "rules_table"]
