"""Hugging Face Trainer: ``attach(trainer)``."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import torch

from grapefx.errors import OptionError, StateError
from grapefx.integrations.nets import announce, learning_state, measured, missing, nets_in, restore

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise missing("transformers", "huggingface") from error

FILE = "grapefx.pt"


def attach(trainer: Any, resume_from: str | Path | None = None) -> FeedbackCallback:
    """Add a ``FeedbackCallback`` to a ``transformers.Trainer``, in front of its loggers.

    In front, because a callback that is passed as ``callbacks=[...]`` runs behind the loggers
    (TensorBoard, Weights & Biases, MLflow, ...): they would not see what it adds to the logs.

    Args:
        trainer: a Trainer around a net, or around a model that was compiled in place.
        resume_from: see ``FeedbackCallback``.

    Returns:
        The callback.

    Raises:
        OptionError: nothing in the trainer's model was compiled by grapefx, or it has a callback.
    """
    nets_in(trainer.model)
    handler = trainer.callback_handler
    if any(isinstance(c, FeedbackCallback) for c in handler.callbacks):
        raise OptionError("this trainer has a FeedbackCallback already")
    callback = FeedbackCallback(resume_from)
    handler.callbacks.insert(0, callback)
    return callback


class FeedbackCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Epochs, logs and checkpoints of every grapefx net inside a Trainer's model.

    Each epoch is announced. Whatever the Trainer logs while it trains is given the alignment, the
    number of calibrations and of skipped updates. Each checkpoint folder gets a file
    ``grapefx.pt`` with the learning state, which is read when training is resumed.

    Args:
        resume_from: the checkpoint's folder, if training is resumed from one that is not
            ``output_dir/checkpoint-STEP``: the Trainer does not tell callbacks which one it is.

    Raises:
        OptionError: when training begins and no module was compiled by grapefx.
        StateError: when training is resumed and the learning state is missing, of another run, or
            does not fit.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = None if resume_from is None else str(resume_from)
        self.saved_as = ""

    def state(self) -> dict[str, Any]:
        """Called when a checkpoint is written: a name that ties the file to this checkpoint."""
        self.saved_as = uuid.uuid4().hex
        return {"args": {}, "attributes": {"saved_as": self.saved_as}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Refuse a model without nets; take the learning state over if training is resumed."""
        nets = nets_in(model)
        if state.global_step == 0:
            return
        folder = self.resume_from or str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        exported = state.stateful_callbacks.get(type(self).__name__)
        if exported is None:
            restore(nets, None)
            return
        file = Path(folder) / FILE
        if not file.is_file():
            raise StateError(
                f"training is resumed at step {state.global_step}, but there is no {file}\n"
                "  remedy: attach(trainer, resume_from='the folder that you resume from')"
            )
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved["saved_as"] != exported["attributes"]["saved_as"]:
            raise StateError(
                f"{file} belongs to another run than the checkpoint that is resumed\n"
                "  remedy: attach(trainer, resume_from='the folder that you resume from')"
            )
        restore(nets, saved["nets"])

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Announce the epoch; ``state.epoch`` counts in fractions."""
        announce(nets_in(model), int((state.epoch or 0) + 1e-6))

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the last measurements to what is being logged in training."""
        if logs is None or "loss" not in logs:
            return
        values = measured(nets_in(model))
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Write the learning state beside the checkpoint's other files."""
        if state.is_world_process_zero:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            nets = learning_state(nets_in(model))
            torch.save({"saved_as": self.saved_as, "nets": nets}, file)
