"""PyTorch Lightning: ``Trainer(callbacks=[FeedbackCallback()])``."""

from __future__ import annotations

from typing import Any

from grapefx.integrations.nets import announce, learning_state, measured, missing, nets_in, restore

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise missing("lightning", "lightning") from error

KEY = "grapefx"


class FeedbackCallback(Callback):  # type: ignore[misc]
    """Epochs, logs and checkpoints of every grapefx net inside a ``LightningModule``.

    Each epoch is announced to the nets. Every ``log_every_n_steps`` of the trainer, and at the end
    of an epoch, all loggers of the trainer get the alignment, the number of calibrations and of
    skipped updates; at the end of an epoch these are ``trainer.callback_metrics`` too, so that
    ``EarlyStopping(monitor="grapefx/net/cos_gradient/mean")`` can watch them. Checkpoints hold
    the learning state under the key "grapefx".

    Raises:
        OptionError: when training begins and no module was compiled by grapefx.
        StateError: when a checkpoint's learning state does not fit.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a module without nets before anything is trained."""
        nets_in(pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Announce the epoch."""
        announce(nets_in(pl_module), trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send the last measurements to the trainer's loggers."""
        if trainer.global_step and trainer.global_step % trainer.log_every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The same, and for callbacks that monitor a metric."""
        if trainer.global_step % trainer.log_every_n_steps:
            self._log(trainer, pl_module)
        pl_module.log_dict(measured(nets_in(pl_module)), logger=False)

    def _log(self, trainer: Any, pl_module: Any) -> None:
        if trainer.loggers:
            values = measured(nets_in(pl_module))
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the learning state to the checkpoint."""
        checkpoint[KEY] = learning_state(nets_in(pl_module))

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take the learning state over."""
        restore(nets_in(pl_module), checkpoint.get(KEY))
