"""``grapefx.compile``: the one line."""

from __future__ import annotations

from typing import Any

from torch import nn

from grapefx.errors import OptionError, nearest
from grapefx.methods import Method, get_method
from grapefx.methods.base import option_names
from grapefx.options import OPTION_NAMES, Options
from grapefx.runtime.module import FeedbackModule


def compile(  # noqa: A001 - named like torch.compile
    model: nn.Module, *, method: str | Method = "grape", calib_every: int | None = 1, **options: Any
) -> FeedbackModule:
    """Wrap ``model`` so that ``loss.backward()`` fills gradients without a backward chain.

    Compiled lazily at the first call; any loss, optimizer and training loop. Sources: 001 is the
    GrAPE paper (Caillon et al., ICLR 2026), 003 FDFA (Bacho & Chu, 2024).

    Args:
        model: any module that ``torch.export`` can trace.
        method: "bp", "dfa", "fdfa", "grape", or a ``Method`` instance. A method's own options
            (``eta``, ``momentum``, ``alpha``, ...) are given here too; see ``grapefx.methods``.
        calib_every: T, calibrate once every T epochs (001 section 3.4); None for never.
        calib_unit: "epoch", or "step" to count training steps.
        calib_init: calibrate at step 0 as well (default: whenever calib_every is not None).
        calib_refit: what a calibration batch does: "weights" (exact gradients only, 001), "feedback"
            (only refits the maps by ridge regression), "both" (default).
        calib_update: "grad" leaves exact gradients for your optimizer; "sgd" steps by an SGD(0.01,
            momentum 0.9) of its own and leaves grad None (001 appendix E).
        steps_per_epoch: counts epochs without ``net.set_epoch``.
        ridge: ridge of the refit, relative to the mean eigenvalue of e^T e.
        tangent_fraction: the part of each batch that carries tangents (1: all, 001 algorithm 1).
        align_every: learn from tangents every k-th step.
        noise: "rademacher" (random signs: the same expectation, a fifth of the cost; default) or
            "gaussian" (001, 003).
        granularity: "layer" (a feedback point behind each weight layer) or "block".
        feedback_budget: most bytes of feedback maps (default: 25 % of the parameters' or 256 MiB).
        batch_dim: the dim of the inputs that holds the batch.
        dynamic: None compiles the first batch size on its own and one graph for all others, True one
            graph for all from the start, False one for each size.
        seed: of feedback maps and noise; the global random stream is not touched.
        backend: "inductor", or "eager" to run the graphs uncompiled.
        backend_options: Inductor options.

    Returns:
        A module that shares parameters, buffers and children with ``model``.

    Raises:
        OptionError: unknown method or option, or a value out of range. Errors of capture and
            placement (``CaptureError``, ``PlacementError``, ``TangentError``, ``BudgetError``) come
            at the first call.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"grapefx.compile takes an nn.Module, not {type(model).__name__}")
    if isinstance(model, FeedbackModule):
        raise OptionError("this module is compiled by grapefx already")
    options["calib_every"] = calib_every
    own = {k: v for k, v in options.items() if k in OPTION_NAMES}
    rest = {k: v for k, v in options.items() if k not in OPTION_NAMES}
    valid = OPTION_NAMES | option_names(method)
    for key in rest:
        if key not in valid:
            raise OptionError(f"unknown option {key!r}.{nearest(key, valid)}")
    return FeedbackModule(model, get_method(method, rest), Options(**own))
