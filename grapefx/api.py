"""``grapefx.compile``: the one line."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, Literal, TypeVar, Unpack, overload

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from grapefx.capture.untraceable import refuse_untraceable
from grapefx.errors import OptionError, tell
from grapefx.methods import Method
from grapefx.options import CompileOptions, described
from grapefx.plan import resolve
from grapefx.runtime import inplace as in_place
from grapefx.runtime import names
from grapefx.runtime.module import FeedbackModule
from grapefx.runtime.stages.module import StagedModule

M = TypeVar("M", bound=nn.Module)
CalibEvery = int | Literal["auto", "geometric"] | EllipsisType | None


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


@overload
def compile(
    model: nn.Module,
    *,
    method: str | Method = ...,
    preset: Literal["recommended", "paper"] = ...,
    calib_every: CalibEvery = ...,
    inplace: Literal[False] = ...,
    pipeline: DeviceMesh | ProcessGroup,
    microbatches: int = ...,
    stages: Literal["auto"] | Sequence[str] = ...,
    data_parallel: DeviceMesh | ProcessGroup | None = ...,
    stage_timeout: float = ...,
    **options: Unpack[CompileOptions],
) -> StagedModule: ...


def compile(
    model: nn.Module,
    *,
    method: str | Method = "grape",
    preset: Literal["recommended", "paper"] = "recommended",
    calib_every: CalibEvery = ...,
    inplace: bool = False,
    pipeline: DeviceMesh | ProcessGroup | None = None,
    microbatches: int = 1,
    stages: Literal["auto"] | Sequence[str] = "auto",
    data_parallel: DeviceMesh | ProcessGroup | None = None,
    stage_timeout: float = 300.0,
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
        preset: "recommended" (what measured best for the kind of network, see
            ``grapefx.plan.recommend``; ``net.explain()`` says what was chosen) or "paper" (the
            method's literal form). Options that are given win over the preset's.
        calib_every: T, calibrate once every T epochs (GrAPE 2026 section 3.4; default 1); None for
            never; "auto": when the gradients' alignment asks for it. A calibration that finds their
            mean cosine with the true ones under ``calib_threshold`` halves the gap to the next,
            another doubles it; at most a part ``calib_budget`` of the steps calibrates.
            "geometric": at gaps that grow from one step on. Not given: what the preset says.
        inplace: for code that cannot take a wrapper: return ``model`` itself, which from now on
            trains through grapefx (as ``nn.Module.compile`` changes what a call runs). Its class,
            attributes, hooks and state dict stay; ``model.grapefx`` is the module for set_epoch,
            alignment, feedback_state_dict, explain; ``grapefx.restore(model)`` undoes it. Calls
            without gradients run the model's own forward. Copies and pickles are plain models.
        pipeline: the dim of a DeviceMesh (or a process group) whose ranks are the stages of the
            model, under ``torchrun``. The result then is a ``StagedModule``, trained by
            ``net.step(x, target=y, loss=loss_fn)``; see docs/distributed.md.
        microbatches: M, into how many parts a pipeline divides each batch.
        stages: "auto" (equal predicted seconds), or the names of the modules or feedback points
            behind which the stages end.
        data_parallel: the other dim of the mesh, whose ranks train copies of the pipeline.
        stage_timeout: seconds after which a rank that does not answer counts as lost.
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
    if not isinstance(inplace, bool):
        raise OptionError(f"inplace={inplace!r} must be True or False")
    if pipeline is not None:
        if inplace:
            raise OptionError("inplace=True does not go with pipeline=: a rank has one stage only")
        return StagedModule(
            model,
            *resolve(method, choices, preset, model),
            pipeline=pipeline,
            microbatches=microbatches,
            stages=stages,
            data_parallel=data_parallel,
            stage_timeout=stage_timeout,
        )
    if (microbatches, stages, data_parallel, stage_timeout) != (1, "auto", None, 300.0):
        raise OptionError(
            "microbatches, stages, data_parallel and stage_timeout are for pipeline=mesh['pp']"
        )
    net = FeedbackModule(model, *resolve(method, choices, preset, model))
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
