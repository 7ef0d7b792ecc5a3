"""Fused attention: the forward stays fused, the tangent recomputes the softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.passes.rules.common import Rule, argument, output, refuse

aten = torch.ops.aten


def _like_heads(x: Tensor | None, heads: Any) -> Tensor | None:
    """Grouped keys and values: one head for several queries."""
    if x is None or x.shape[-3] == heads:
        return x
    return x.repeat_interleave(heads // x.shape[-3], dim=-3)


def attention_tangent(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, bias: Tensor | None,
    tq: Tensor | None, tk: Tensor | None, tv: Tensor | None, tbias: Tensor | None,
    causal: bool, scale: float | None,
) -> Tensor | None:  # fmt: skip
    """``(P * dlogits) V - rowsum(P * dlogits) out + P dV``."""
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    heads = q.shape[-3]
    k, v = _like_heads(k, heads), _like_heads(v, heads)  # type: ignore[assignment]
    tk, tv = _like_heads(tk, heads), _like_heads(tv, heads)
    # the scale goes on the small operand, as the fused kernels do
    scaled = q * factor
    logits = torch.matmul(scaled, k.transpose(-2, -1))
    if bias is not None:
        logits = logits + bias
    if causal:
        rows, cols = q.shape[-2], k.shape[-2]
        keep = torch.ones(rows, cols, dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~keep, -math.inf)
    p = torch.softmax(logits, -1)
    # a row without any key: the fused kernels return zeros there
    if bias is not None:
        p = p.masked_fill((logits == -math.inf).all(-1, keepdim=True), 0.0)
    change = None
    if tq is not None:
        change = torch.matmul(tq * factor, k.transpose(-2, -1))
    if tk is not None:
        term = torch.matmul(scaled, tk.transpose(-2, -1))
        change = term if change is None else change + term
    if tbias is not None:
        change = tbias.expand(p.shape) if change is None else change + tbias
    total = None
    if change is not None:
        weighted = p * change
        total = torch.matmul(weighted, v) - weighted.sum(-1, keepdim=True) * out
    if tv is not None:
        term = torch.matmul(p, tv)
        total = term if total is None else total + term
    return None if total is None else total.to(out.dtype)


def attention(em: Any, node: Node) -> Any:
    """All fused kernels: result 0 is the output."""
    q, k, v = node.args[:3]
    if argument(node, "dropout_p", 0.0):
        raise refuse(
            node,
            "attention dropout happens inside the fused kernel, and its mask is not in the graph",
            "set the attention's dropout to 0, run the model under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or use a method without tangents",
        )
    bias = argument(node, "attn_mask", argument(node, "attn_bias"))
    causal, scale = bool(argument(node, "is_causal", False)), argument(node, "scale")
    made = em.trace(
        attention_tangent,
        em.p(q), em.p(k), em.p(v), output(em, node, 0), em.p(bias),
        em.t(q), em.t(k), em.t(v), em.t(bias), causal, scale,
    )  # fmt: skip
    return None if made is None else {0: made}


_NAMES = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math",
)

RULES: dict[Any, Rule] = {
    getattr(aten, name).default: attention for name in _NAMES if hasattr(aten, name)
}
