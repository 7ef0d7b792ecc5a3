"""What ``grapefx.compile(model, pipeline=...)`` returns: one stage of a model, trained by steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grapefx.capture.untraceable import Compiled
from grapefx.errors import InputError, OptionError, StateError
from grapefx.methods import Method
from grapefx.options import Options
from grapefx.plan.stages import check_method
from grapefx.runtime.stages.trainer import Job, Loss, StageTrainer
from grapefx.runtime.stages.wires import Links, Replicas


class StagedModule(Compiled, nn.Module):
    """One stage of a model in each process of a pipeline.

    Every process builds the whole model and calls ``step`` with the same batch; it computes its own
    stage and fills the gradients of the stage's parameters. ``parameters()``, ``state_dict()`` and
    ``feedback_state_dict()`` are those of the stage, under the names of the whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        options: Options,
        *,
        pipeline: Any,
        microbatches: int = 1,
        stages: Any = "auto",
        data_parallel: Any = None,
        stage_timeout: float = 300.0,
    ) -> None:
        super().__init__()
        _check(method, options)
        for option, value in (("microbatches", microbatches), ("stage_timeout", stage_timeout)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise OptionError(f"{option}={value!r} must be a positive number")
        if not isinstance(microbatches, int):
            raise OptionError(f"microbatches={microbatches!r} must be a positive integer")
        self.__dict__["_original"] = model
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = model.__dict__[name]  # torch's checkpoints walk the tree
        self._links = Links(_group(pipeline, "pipeline"), stage_timeout)
        replicas = Replicas(
            None if data_parallel is None else _group(data_parallel, "data_parallel")
        )
        self._trainer = StageTrainer(
            model, method, options, self._links, replicas, microbatches, stages
        )

    # the stage that users see

    @property
    def original(self) -> nn.Module:
        """The whole model; only the stage's own parameters are trained here."""
        model: nn.Module = self.__dict__["_original"]
        return model

    @property
    def stage(self) -> int:
        """This process's stage."""
        return self._links.rank

    @property
    def is_last(self) -> bool:
        """Whether this process computes the loss."""
        return self.stage == len(self._links.ranks) - 1

    @property
    def ends(self) -> tuple[str, ...]:
        """The feedback points behind which stages end; known after ``prepare`` or a first step."""
        return self._trainer.names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: a rank has a part of the model.

        Raises:
            InputError: always.
        """
        raise InputError(
            "a stage cannot be called: it computes a part of the model only\n  remedy: train with "
            "net.step(x, target=y, loss=loss_fn); to evaluate, load a checkpoint of all stages "
            "into the plain model"
        )

    def train(self, mode: bool = True) -> StagedModule:
        """As the model's."""
        super().train(mode)
        self.original.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            if original is None:
                raise
            return getattr(original, name)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The stage's own parameters, by their names in the whole model.

        Raises:
            InputError: the stages are not known yet.
        """
        self._known()
        for name, p in self.original.named_parameters(*args, **kwargs):
            if any(p is own for own in self._trainer.owned.values()):
                yield name, p

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The stage's own parameters."""
        for _, p in self.named_parameters(recurse=recurse):
            yield p

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The stage's own parameters and buffers, with the keys of the whole model."""
        self._known()
        found = self.original.state_dict(*args, **kwargs)
        own = {t.data_ptr() for t in self._trainer.owned.values()}
        for key in [k for k, t in found.items() if isinstance(t, Tensor)]:
            if found[key].data_ptr() not in own:
                del found[key]
        return found

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the stage's own keys; others are left alone."""
        own = set(self.state_dict())
        missing = own - set(state)
        if strict and missing:
            raise StateError(f"the state dict misses {sorted(missing)[:3]} of stage {self.stage}")
        mine = {k: v for k, v in state.items() if k in own}
        return self.original.load_state_dict(mine, strict=False, assign=assign)

    def feedback_state_dict(self) -> dict[str, Any]:
        """The stage's own feedback maps by "layer/name", and the counters, equal on all stages."""
        self._known()
        saved = self._trainer.state.saved()
        return {"tensors": {k: v.clone() for k, v in saved["tensors"].items()},
                "schedule": saved["schedule"]}  # fmt: skip

    def load_feedback_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the maps of the stage's own layers, and the counters."""
        self._known()
        have = self._trainer.state.feedback.tensors
        missing = set(have) - set(state["tensors"])
        if missing:
            raise StateError(f"the feedback state misses {sorted(missing)[:3]}")
        self._trainer.state.feedback.tensors = {
            k: state["tensors"][k].detach().clone() for k in have
        }
        self._trainer.state.schedule.load(state["schedule"])

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch that begins."""
        self._trainer.state.schedule.set_epoch(epoch)

    def alignment(self) -> dict[str, dict[str, float]]:
        """Last measured cosines of the stage's own layers; see ``FeedbackModule.alignment``."""
        return self._trainer.state.alignment()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale the gradients of all stages so that their norm together is at most ``max_norm``.

        Returns the norm before. All ranks of the pipeline wait for each other here.
        """
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        shared = self._trainer.shared
        twice = {id(self._trainer.owned[n]) for n, held in shared.items()
                 if self.stage in held[1:] and n in self._trainer.owned}  # fmt: skip
        once = [p.grad for p in self.parameters() if p.grad is not None and id(p) not in twice]
        total = torch.zeros((), dtype=torch.float64, device=self._trainer.device)
        for g in once:
            total += g.detach().double().square().sum()
        dist.all_reduce(total, group=self._links.late)
        norm = total.sqrt()
        scale = min(1.0, max_norm / (float(norm) + 1e-6))
        for g in grads:
            g.mul_(scale)
        return norm

    def _known(self) -> None:
        if self._trainer.ends is None:
            raise InputError(
                "the stages are not known before the model was captured\n  remedy: call "
                "net.prepare(x) with a batch, on all ranks, before the optimizer is made"
            )

    # steps

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Capture the model on a batch and divide it; all ranks call it. Nothing is trained."""
        self._trainer.call(Job(), args, kwargs)

    def step(self, *args: Any, target: Any, loss: Loss, **kwargs: Any) -> Tensor | None:
        """One training step on a batch; fills the gradients of the stage's parameters.

        Args:
            args: the model's arguments, kwargs too. Their values are read on the first stage, their
                shapes on all; the batch must be divisible by the number of microbatches.
            target: a tensor, or a nest of tensors, batch first; its values are read on the last.
            loss: ``loss(output, target)`` of a microbatch, the mean over its samples.

        Returns:
            The microbatches' losses on the last stage, None on the others.

        Raises:
            StageError: this rank or another failed; nothing of this step is committed here.
            InputError: a batch that cannot be divided, or ``loss`` is no function.
        """
        if not callable(loss):
            raise InputError(f"loss={loss!r} must be a function: loss(output, target)")
        if self.stage == 0:
            self._trainer.state.schedule.tell_once()
        job = Job(target, loss)
        self._trainer.call(job, args, kwargs)
        return torch.stack(job.losses) if job.losses else None


def _check(method: Method, options: Options) -> None:
    """Raise ``MethodError`` or ``OptionError`` for what stages cannot do."""
    check_method(method)
    for name, bad, rather in (
        ("calib_update", "sgd", "grad"),
        ("calib_refit", "feedback", "both"),
    ):
        if getattr(options, name) == bad and not method.exact:
            raise OptionError(
                f"{name}={bad!r} does not go with pipeline=\n  remedy: {name}={rather!r}"
            )
    if options.mean_field is not None:
        raise OptionError(
            f"mean_field={options.mean_field!r} is a chain through all stages, which does not go "
            "with pipeline=\n  remedy: leave mean_field out"
        )
    if options.exact_rows:
        raise OptionError(
            f"exact_rows={options.exact_rows!r} is a backward chain through all stages, which does "
            "not go with pipeline=\n  remedy: leave exact_rows out"
        )


def _group(mesh: Any, name: str) -> Any:
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if hasattr(mesh, "get_group") and mesh.ndim == 1:
        return mesh.get_group()
    raise OptionError(
        f"{name}= takes one dim of a DeviceMesh, mesh['pp'], or a process group, not "
        f"{type(mesh).__name__}"
    )
