"""Says which operators are products, which hold weights, and what an operator is called.

Tables of overloads (``aten.mm.default``) are for graphs that are taken apart to core operators;
tables of names (``"mm"``) also hold the composite operators of a captured graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

# A layer's product with its weight: operator -> positions of the data and of the weight.
LAYER_PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.convolution.default: (0, 1),
}

# A product of the backward pass: operator -> positions of the operands that may be a weight.
BACKWARD_PRODUCTS: dict[Any, tuple[int, ...]] = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.mv.default: (0,),
    aten.convolution_backward.default: (2,),
}

# Products of one matrix for all rows: what a linear layer becomes.
LINEAR = frozenset({"linear", "addmm", "mm", "matmul"})

# Operators whose parameters make a layer of their own.
HEAVY = LINEAR | {
    "bmm", "baddbmm", "einsum", "bilinear", "addmv", "mv",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "_sparse_addmm", "_sparse_mm", "convolution", "embedding", "embedding_bag", "_embedding_bag",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell",
}  # fmt: skip

# Attention as one kernel of a device, and every form of it.
FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
ATTENTION = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    *FUSED_ATTENTION,
)
ATTENTION_BACKWARD = tuple(f"{name}_backward" for name in FUSED_ATTENTION)

# Where branches of a network meet: sums, choices, and products of two values.
MERGE = frozenset(
    {
        "add", "sub", "rsub", "where", "maximum", "minimum",
        "mm", "bmm", "baddbmm", "matmul", "einsum", *ATTENTION,
    }
)  # fmt: skip


def draws(node: Node) -> bool:
    """Whether a node's operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def op_name(node: Node) -> str:
    """The name of a node's operator: "add" for ``aten.add.Tensor``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def qualified_name(target: Any) -> str:
    """The name with its namespace: "aten::add"; of anything else, module and name."""
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return str(schema.name)
    if isinstance(target, str):
        return target
    name = getattr(target, "__name__", None) or str(target)
    return f"{getattr(target, '__module__', '') or 'python'}::{name}".lstrip("_")
