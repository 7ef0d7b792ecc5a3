"""``grapefx.compile``: the one line."""

from __future__ import annotations

from types import EllipsisType
from typing import Any, Literal, TypeVar, overload

from torch import nn

from grapefx.choices import resolve
from grapefx.errors import OptionError, tell
from grapefx.methods import Method
from grapefx.runtime import inplace as in_place
from grapefx.runtime import names
from grapefx.runtime.module import FeedbackModule
from grapefx.untraceable import refuse_untraceable

M = TypeVar("M", bound=nn.Module)


@overload
def compile(
    model: nn.Module,
    *,
    method: str | Method = ...,
    preset: str = ...,
    calib_every: int | str | EllipsisType | None = ...,
    inplace: Literal[False] = ...,
    **options: Any,
) -> FeedbackModule: ...


@overload
def compile(
    model: M,
    *,
    method: str | Method = ...,
    preset: str = ...,
    calib_every: int | str | EllipsisType | None = ...,
    inplace: Literal[True],
    **options: Any,
) -> M: ...


def compile(
    model: nn.Module,
    *,
    method: str | Method = "grape",
    preset: str = "recommended",
    calib_every: int | str | EllipsisType | None = ...,
    inplace: bool = False,
    **options: Any,
) -> nn.Module:
    """Wrap ``model`` so that ``loss.backward()`` fills gradients without a backward chain.

    Compiled lazily at the first call; any loss, optimizer and training loop. Papers: GrAPE 2026 is
    Caillon et al., ICLR 2026; GrAPE 2024 its earlier submission; FDFA 2024 Bacho and Chu, 2024.

    Args:
        model: any module that Dynamo (``torch.compile``'s tracer) can follow as one graph.
        method: a name ("bp", "fa", "usf", "brsf", "frsf", "dfa", "drtp", "pepita", "dkp", "fdfa",
            "fg-w", "fg-a", "lg-fg-a", "grape", "grape-2024", or one that a package registers; see
            docs/methods.md), or a ``Method`` instance. A method's own options (``eta``, ``alpha``,
            ...) are given here too; see ``grapefx.methods``.
        preset: "recommended" (the defaults: what measured best) or "paper" (the method's literal
            form). Options that are given win over the preset's.
        calib_every: T, calibrate once every T epochs (GrAPE 2026 section 3.4; default 1); None for
            never; "auto": when the gradients' alignment asks for it. A calibration that finds their
            mean cosine with the true ones under ``calib_threshold`` halves the gap to the next,
            another doubles it; at most a part ``calib_budget`` of the steps calibrates.
        inplace: for code that cannot take a wrapper: return ``model`` itself, which from now on
            trains through grapefx (as ``nn.Module.compile`` changes what a call runs). Its class,
            attributes, hooks and state dict stay; ``model.grapefx`` is the module for set_epoch,
            alignment, feedback_state_dict, explain; ``grapefx.restore(model)`` undoes it. Calls
            without gradients run the model's own forward. Copies and pickles are plain models.
        calib_unit: "epoch", or "step" to count training steps.
        calib_init: calibrate at step 0 as well (default: whenever calib_every is not None).
        calib_refit: what a calibration batch does: "weights" (exact gradients only, GrAPE 2026),
            "feedback" (only refits the maps by ridge regression), "both" (default).
        calib_update: "grad" leaves exact gradients for your optimizer; "sgd" steps by an SGD(0.01,
            momentum 0.9) of its own and leaves grad None (GrAPE 2026 appendix E); not with a
            GradScaler, whose scale it does not know.
        steps_per_epoch: counts epochs without ``net.set_epoch``.
        ridge: ridge of the refit, relative to the mean eigenvalue of e^T e.
        tangent_fraction: the part of each batch that carries tangents (1: all, as in GrAPE 2026
            algorithm 1).
        align_every: learn from tangents every k-th step.
        align_warmup: in the first steps only the feedback maps learn: weight gradients are zeros
            (but for the exact ones of a calibration).
        streams: whose noise shares one tangent pass: "shared" (default; all layers, algorithm 1 of
            GrAPE 2024 and of FDFA 2024), "per_layer" (GrAPE 2026 algorithm 1 read literally: one
            pass each), or a number of groups of consecutive layers.
        directions: K tangent passes with noise of their own for each stream; estimates average.
        noise: "rademacher" (default; random signs: the same expectation at a fraction of the cost)
            or "gaussian" (GrAPE 2026, FDFA 2024).
        perturb: where noise is added for a Jacobian estimate: "activation" (default), "weight", or
            "auto", whichever has fewer entries in a sample (GrAPE 2026 section 3.2). See
            docs/method.md.
        granularity: a feedback point behind each weight "layer" (default), "sublayer" (micro: each
            value that every path crosses) or "block" (macro); "auto": the finest of these whose
            full maps fit ``feedback_budget``. See docs/feedback.md for this and the next four.
        points: feedback points of your own: module names or globs, module classes, a function of
            the captured graph's node, or a list of these.
        error_at: likewise, where the error is taken; "output" for the output whatever its width
            (default: in front of an output layer of 1,024 entries or more).
        residual: "cut", or "leak": feedback at the inputs of weight layers, past which shortcuts
            carry the true gradient (as libraries that replace each layer's input gradient).
        feedback: kind of the maps: "dense", "pooled:G", "low-rank:R", "sparse:G", "seeded", or
            "auto" (default): dense while they fit ``feedback_budget``.
        feedback_budget: most bytes of feedback maps (default: 25 % of the parameters' or 256 MiB).
        batch_dim: the dim of the inputs that holds the batch.
        dynamic: None compiles the first batch size on its own and one graph for all others, True
            one graph for all from the start, False one for each size.
        seed: of feedback maps and noise; the global random stream is not touched.
        capture: "dynamo" traces with torch's own tracer of Python and its guards; "export" is for
            models that it refuses, and watches less (docs/integrations.md).
        backend: "inductor", or "eager" to run the graphs uncompiled.
        backend_options: Inductor options.
        parallel: how updates run at a fixed batch size: "off", one kernel after the other;
            "graphs", captured in CUDA graphs; "horizontal", what layers have in common batched (and
            captured); "streams", each layer's part on one of four CUDA streams (and captured);
            "auto", the fastest of these, measured at the first step. Default: "off". On a CPU
            "graphs" and "streams" are "off". See docs/performance.md.

    Returns:
        A module that shares parameters, buffers and children with ``model``; ``model`` if in place.

    Raises:
        OptionError: unknown method or option, or a value out of range. Errors of capture and
            placement (``CaptureError``, ``PlacementError``, ``TangentError``, ``BudgetError``) come
            at the first call.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"grapefx.compile takes an nn.Module, not {type(model).__name__}")
    if in_place.installed(model) is not None:
        raise OptionError(
            "this model is compiled by grapefx in place already\n"
            "  remedy: grapefx.restore(model) first"
        )
    refuse_untraceable(model)
    if calib_every is not ...:
        options["calib_every"] = calib_every
    net = FeedbackModule(model, *resolve(method, options, preset))
    if not isinstance(inplace, bool):
        raise OptionError(f"inplace={inplace!r} must be True or False")
    if not inplace:
        if said := names.note(model, net):
            tell(said)
        return net
    in_place.install(model, net)
    return model


def restore(model: M) -> M:
    """Undo ``compile(model, inplace=True)``: the model runs its own forward again.

    Raises ``OptionError`` if it was not compiled in place.
    """
    in_place.uninstall(model)
    return model
