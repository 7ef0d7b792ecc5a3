"""``grapefx.compile``: the one line."""

from __future__ import annotations

from types import EllipsisType
from typing import Any, Literal, TypeVar, Unpack, overload

from torch import nn

from grapefx.choices import resolve
from grapefx.errors import OptionError, tell
from grapefx.methods import Method
from grapefx.options import CompileOptions, described
from grapefx.runtime import inplace as in_place
from grapefx.runtime import names
from grapefx.runtime.module import FeedbackModule
from grapefx.untraceable import refuse_untraceable

M = TypeVar("M", bound=nn.Module)
CalibEvery = int | Literal["auto"] | EllipsisType | None


@overload
def compile(
    model: nn.Module,
    *,
    method: str | Method = ...,
    preset: Literal["recommended", "paper"] = ...,
    calib_every: CalibEvery = ...,
    inplace: Literal[False] = ...,
    **options: Unpack[CompileOptions],
) -> FeedbackModule: ...


@overload
def compile(
    model: M,
    *,
    method: str | Method = ...,
    preset: Literal["recommended", "paper"] = ...,
    calib_every: CalibEvery = ...,
    inplace: Literal[True],
    **options: Unpack[CompileOptions],
) -> M: ...


def compile(
    model: nn.Module,
    *,
    method: str | Method = "grape",
    preset: Literal["recommended", "paper"] = "recommended",
    calib_every: CalibEvery = ...,
    inplace: bool = False,
    **options: Unpack[CompileOptions],
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
        options: everything else, by keyword: ``grapefx.options.CompileOptions`` has the names and
            types, docs/options.md and ``help(grapefx.compile)`` say what each does.

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
    choices: dict[str, Any] = dict(options)
    if calib_every is not ...:
        choices["calib_every"] = calib_every
    net = FeedbackModule(model, *resolve(method, choices, preset))
    if not isinstance(inplace, bool):
        raise OptionError(f"inplace={inplace!r} must be True or False")
    if not inplace:
        if said := names.note(model, [*names.public(FeedbackModule), *vars(net)]):
            tell(said)
        return net
    in_place.install(model, net)
    return model


if compile.__doc__:  # None under ``python -OO``
    _before, _end, _after = compile.__doc__.partition("    Returns:\n")
    compile.__doc__ = f"{_before.rstrip()}\n{described()}\n\n{_end}{_after}"


def restore(model: M) -> M:
    """Undo ``compile(model, inplace=True)``: the model runs its own forward again.

    Raises ``OptionError`` if it was not compiled in place.
    """
    in_place.uninstall(model)
    return model
