"""Inductor's decompositions, applied in front of the split.

In: a step graph. Out: the same step in Inductor's own small operators, at fixed sizes if they are
given. What is worth saving between forward and update shows only there: one-byte pooling offsets
instead of indices, batch norm's statistics instead of its output. For "eager" sizes are put in, no
more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from grapefx.ir import StepGraph
from grapefx.passes.graph import meta
from grapefx.passes.graph.order import dead_code
from grapefx.torch_compat import concrete, decomposed, inductor_options, native_random, pytree


def decompose(
    step: StepGraph,
    sizes: dict[Any, int] | None,
    *,
    inductor: bool,
    options: dict[str, Any] | None = None,
) -> StepGraph:
    """The step in smaller operators.

    ``sizes``: a number for each size symbol; None leaves them symbols. ``options`` are Inductor's.
    """
    work = step.copy()
    before = work.placeholders()
    example = [n.meta["val"] for n in before]
    if sizes is not None:
        example = concrete(example, sizes)
    device = next((v.device.type for v in example if isinstance(v, torch.Tensor)), "cpu")
    with torch.autocast(device, enabled=False), inductor_options(options):
        gm = decomposed(work.gm, example, meta.KEPT, inductor=inductor)
        if inductor:
            native_random(gm)
    after = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for old, new in zip(before, after, strict=True):
        new.meta.update({k: old.meta[k] for k in meta.KEPT if k in old.meta})
    out = gm.graph.output_node()
    results = iter(pytree.tree_leaves(out.args[0], is_leaf=lambda x: x is None))
    out.args = (tuple(results),)
    dead_code(gm.graph)
    return replace(work, gm=gm)
