"""Whether an operator joins the samples of a batch, where each should stay by itself."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.fx import Node

from grapefx.passes.graph.folds import Fold
from grapefx.passes.graph.operators import op_name

_VIEWS = {"view", "reshape", "_unsafe_view"}
# Operators that may read the batch from any dim: of others, only from the first
_ANY_DIM = {
    *_VIEWS, "t", "transpose", "expand", "clone", "_to_copy", "copy", "mm", "bmm", "addmm",
    "baddbmm", "sum", "mean", "constant_pad_nd", "cut_backward",
}  # fmt: skip
_MOVES = {"permute"}  # whose dims are an order of all of them
_DIM_OF_RESULT = {"select_backward", "stack", "unsqueeze"}
_SLICES = {"slice", "slice_scatter", "slice_backward"}
_INDEXED = {"index", "_unsafe_index", "index_put", "_unsafe_index_put"}


def mixes(node: Node, source: Node, folds: dict[Node, Fold]) -> bool:
    """Whether an operator may join the samples of a value that it reads."""
    schema = getattr(node.target, "_schema", None)
    name, dim = op_name(node), folds[source].dim
    if schema is None or not schema.name.startswith(("aten::", "prims::", "grapefx::cut")):
        return True
    given = {
        argument.name: node.args[k] if k < len(node.args) else node.kwargs.get(argument.name)
        for k, argument in enumerate(schema.arguments)
    }
    if name in _INDEXED:
        indices: Any = given.get("indices")
        at = folds[node].dim
        return not isinstance(indices, (list, tuple)) or any(
            i is not None for i in indices[at : at + 1]
        )
    if "normalized_shape" in given:
        normed: Any = given["normalized_shape"]
        return bool(dim >= source.meta["val"].ndim - len(normed))
    if "dim" in given or "dims" in given:
        if name in _MOVES or (name in _SLICES and _whole(given)):
            return False
        of = node if name in _DIM_OF_RESULT else source
        ndim, at = of.meta["val"].ndim, folds[of].dim
        dims = given.get("dim", given.get("dims"))
        listed = dims if isinstance(dims, (list, tuple)) else [dims]
        return any(isinstance(d, int) and d % ndim == at for d in listed)
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return not (dim == 0 or pointwise or name in _ANY_DIM)


def _whole(given: dict[str, Any]) -> bool:
    """Whether a slice takes everything."""
    start, end, step = given.get("start"), given.get("end"), given.get("step")
    to_end = end is None or (isinstance(end, int) and end >= sys.maxsize)
    return start in (0, None) and to_end and step in (1, None)
