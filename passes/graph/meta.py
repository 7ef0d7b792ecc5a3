"""Names what grapefx notes on the nodes of a graph, beside torch's own ``node.meta["val"]``.

Every note is an entry of ``Node.meta``, so that copying a node's meta copies it.
"""

from __future__ import annotations

from typing import Any, TypedDict

from torch.fx import Node

from grapefx.ir import Phase, Role

PHASE = "grapefx_phase"  # what the node is for: one of ``ir.PHASES``
LAYER = "grapefx_layer"  # the name of the layer that it belongs to
ROLE = "grapefx_role"  # of a placeholder: its slot's role
NAME = "grapefx_name"  # of a placeholder: its slot's name
FOLD = "grapefx_fold"  # of a noise placeholder: where the batch is, as (dim, outer, inner)
NOISE_OF = "grapefx_noise_of"  # of noise at a feedback point: its (stream, layer index)
TANGENT_OF = "grapefx_tangent_of"  # of a tangent at the error tap: its (stream, tap index)
EDGE = "grapefx_edge"  # put on every edge into a weight layer (``residual="leak"``)
REDUCE = "grapefx_reduce"  # how the values of all microbatches become one

# what a retraced graph keeps
KEPT = (PHASE, LAYER, ROLE, NAME, FOLD)


class Labels(TypedDict, total=False):
    """Phase and layer as keyword arguments; the layer may be None."""

    phase: Phase
    layer: str | None


def phase(node: Node) -> Phase | None:
    """What a node is for; None before ``annotate``, where no pass has said so."""
    return node.meta.get(PHASE)


def layer(node: Node) -> str | None:
    """The name of the layer that a node belongs to; None for none."""
    return node.meta.get(LAYER)


def role(node: Node) -> Role | None:
    """The role of the slot that a placeholder is; None for other nodes."""
    return node.meta.get(ROLE)


def notes(node: Node) -> dict[str, Any]:
    """Everything that grapefx has noted on a node."""
    return {k: v for k, v in node.meta.items() if k.startswith("grapefx_")}


def labels(node: Node) -> dict[str, Any]:
    """The phase and layer noted on a node, where they are."""
    return {k: node.meta[k] for k in (PHASE, LAYER) if k in node.meta}


def entries(given: Labels) -> dict[str, Any]:
    """Phase and layer as entries of ``Node.meta``."""
    out: dict[str, Any] = {}
    if "phase" in given:
        out[PHASE] = given["phase"]
    if "layer" in given:
        out[LAYER] = given["layer"]
    return out
