"""What ``preset="recommended"`` adds to the defaults, by the kind of network.

A network without normalisation loses the scale of its activations where feedback maps are stale
(docs/theory.md). It gets calibrations at growing gaps, which remember earlier ones, and the radial
correction: on MNIST with 32 layers of 256 this is what brings direct feedback alignment to
backpropagation's accuracy (``tools/reproduce/learning_32x256.yaml``). With normalisation layers
calibrations that remember were worse than one an epoch, and so they were, with the radial
correction, on a CNN without norms (``cifar10_subset_cnn.yaml``); on a transformer they changed
little, and recurrent layers were not measured. Those networks keep the defaults. What measured
better for some of them has a chain on a part of the batch, so ``explain`` names it and the user
decides.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Graph

from grapefx.capture import module_tree
from grapefx.methods import Method
from grapefx.options import Options
from grapefx.passes.graph.operators import ATTENTION, op_name

CHOICE: dict[str, Any] = {
    "calib_every": "geometric",
    "calib_gap": 250,
    "calib_forget": 0.7,
    "radial": "auto",
}
# who names one of these decides about calibration; the others stay as the options' defaults say
_DECIDES = frozenset(CHOICE) | {
    "calib_unit", "calib_init", "calib_refit", "calib_update", "calib_threshold", "calib_budget",
    "calib_growth", "ridge", "mean_field",
}  # fmt: skip


# a CNN of 4 layers with batch norms is at backpropagation's accuracy by the defaults
_MANY = 8

# feedback points from which on exact rows were worse than the radial correction alone
_DEEP = 16
_SHALLOW = (
    ". Up to 16 layers calib_every='geometric', calib_forget=0.7, exact_rows=0.125, "
    "exact_pick='largest' and exact_weight=1.0 together were a few tenths of a point better, also "
    "with exact_late=True, where no update waits for their chain (learning_8x512.yaml)"
)

# where one calibration an epoch was better or nearly as good, or nothing was measured (recurrent)
_OTHERS = ("norm", "conv", "attention", "transformer", "lstm", "gru", "rnn")


def recommended(model: nn.Module, method: Method, choices: dict[str, Any]) -> dict[str, Any]:
    """The options to add to what the user gave; none where the user decided or others are found."""
    if _DECIDES & set(choices) or not method.refits or _others(model):
        return {}
    return dict(CHOICE)


def reason(method: Method, options: Options, graph: Graph, points: int) -> str:
    """Why a network has these options, or what measured better, for ``explain``; may be empty.

    ``graph``: its joint graph, with so many feedback points.
    """
    if all(getattr(options, name) == value for name, value in CHOICE.items()):
        return (
            "recommended for linear layers without normalisation: calibrations at growing gaps "
            "that remember earlier ones (calib_every='geometric', calib_gap=250, "
            "calib_forget=0.7), and the radial correction (radial='auto'); calib_every=1 is one "
            "calibration an epoch without them" + (_SHALLOW if points < _DEEP else "")
        )
    decided = options.calib_every != 1 or options.exact_rows or options.mean_field is not None
    if decided or not method.refits:
        return ""
    names = {op_name(n) for n in graph.nodes if n.op == "call_function"}
    written_out = "bmm" in names and bool(names & {"_softmax", "_safe_softmax"})
    if written_out or names & set(ATTENTION):
        better = (
            "with attention, exact_rows=0.334, exact_weight=3.0 and granularity='block' were much "
            "nearer to backpropagation (learning_transformer.yaml): a token's map knows nothing of "
            "the errors of the tokens that attend to it"
        )
    elif points > _MANY and any("batch_norm" in n for n in names):
        better = (
            "with many layers and batch norms, exact_rows=0.334, exact_weight=3.0 (an unbiased "
            "gradient) and granularity='block' were nearer to backpropagation "
            "(learning_resnet14.yaml)"
        )
    else:
        return ""
    return f"the options' defaults; {better}. exact_rows makes a chain on that part of the batch"


def _others(model: nn.Module) -> bool:
    """Whether a module normalises or is of a kind that keeps the defaults, by its class's name."""
    names = [type(part).__name__.lower() for part in module_tree.modules(model)]
    return any(kind in name for name in names for kind in _OTHERS)
