"""Brings a front end's graph into the form that steps are made of.

Regions of ``no_grad``, which a decomposition forgets, become ``detach``; assertions go, since a
step cannot make them; numbers read from tensors are refused.
"""

from __future__ import annotations

import torch

from grapefx.errors import CaptureError
from grapefx.passes.graph.source import quoted
from grapefx.torch_compat import from_data

aten = torch.ops.aten


def keep_no_grad(gm: torch.fx.GraphModule) -> None:
    """Decomposition inlines ``no_grad`` regions and forgets them: detach their outputs."""
    for module in list(gm.modules()):
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            if node.op != "call_function" or "set_grad_enabled" not in str(node.target):
                continue
            if not node.args or node.args[0] is not False:
                continue
            for item in list(node.users):
                value = item.meta.get("val")
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    continue
                with module.graph.inserting_after(item):
                    stop = module.graph.call_function(aten.detach.default, (item,))
                stop.meta = dict(item.meta)
                item.replace_all_uses_with(stop, delete_user_cb=lambda u, stop=stop: u is not stop)
        module.recompile()


def passes_gradient(node: torch.fx.Node) -> bool:
    """Whether an output depends on a value otherwise than through ``detach`` (or ``no_grad``)."""
    seen: set[torch.fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n.op == "output":
            return True
        if n not in seen and n.target is not aten.detach.default:
            seen.add(n)
            stack.extend(n.users)
    return False


def _refuse_data(graph: torch.fx.Graph) -> None:
    """Drop what checks numbers read from tensors; ``CaptureError`` where an output needs one."""
    checks = ("_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")
    for node in list(graph.nodes):
        if getattr(node.target, "overloadpacket", None) in [getattr(aten, c) for c in checks]:
            graph.erase_node(node)
    needed = {graph.output_node()}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    for node in list(graph.nodes):
        if node not in needed or not from_data(node.meta.get("val")):
            continue
        raise CaptureError(
            f"{node.target} (node {node.name!r}) makes a number or a size of the values of a "
            f"tensor, which a graph made once cannot follow{quoted(node)}\n"
            "  remedy: compute with tensors of fixed sizes: leave .item() out, use torch.where or "
            "a product with the mask instead of indexing by it, or do it outside the model"
        )
    graph.eliminate_dead_code()


def canonicalize(gm: torch.fx.GraphModule, notes: list[str]) -> None:
    """Drop assertions: on dtypes and devices (each call is compared with the capture), on values.

    A model without weights (device meta) is laid out for the CPU, see ``fake_tensor``.
    """
    meta, cpu = torch.device("meta"), torch.device("cpu")
    parts = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]  # no_grad regions
    for node in [n for m in parts for n in m.graph.nodes]:
        if node.target is aten._assert_tensor_metadata.default:
            node.graph.erase_node(node)
        elif getattr(node.target, "overloadpacket", None) is aten._assert_async:
            text = repr(node.args[1]) if len(node.args) > 1 else "torch._assert_async"
            notes.append(f"the model's assertion on values is not checked in a step: {text}")
            node.graph.erase_node(node)
        elif meta in node.args or meta in node.kwargs.values():
            node.args = tuple(cpu if a == meta else a for a in node.args)
            node.kwargs = {k: cpu if a == meta else a for k, a in node.kwargs.items()}
    if any("unbacked_bindings" in n.meta for n in gm.graph.nodes):
        _refuse_data(gm.graph)
    for m in parts:
        m.recompile()
