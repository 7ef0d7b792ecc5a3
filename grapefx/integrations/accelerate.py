"""Hugging Face accelerate: ``feedback = Feedback(accelerator, net)`` for loops of your own."""

from __future__ import annotations

from typing import Any

from torch import nn

from grapefx.integrations.nets import announce, learning_state, measured, missing, nets_in, restore

try:
    from accelerate import Accelerator
except ImportError as error:
    raise missing("accelerate", "accelerate") from error


class Feedback:
    """Epochs, logs and checkpoints of every grapefx net inside a model.

    ``accelerator.save_state`` and ``load_state`` write and read the learning state from now on
    (as a ``custom_checkpoint_N.pkl``, which accelerate loads with pickle: load what you trust).

    Args:
        accelerator: the ``accelerate.Accelerator`` of the loop.
        model: the net, or a model that holds nets, before or after ``accelerator.prepare``.

    Raises:
        OptionError: nothing in the model was compiled by grapefx.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self._accelerator = accelerator
        self._nets = nets_in(accelerator.unwrap_model(model))
        accelerator.register_for_checkpointing(self)

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch that begins."""
        announce(self._nets, epoch)

    def log(self, step: int | None = None) -> dict[str, float]:
        """Send the last measurements to the accelerator's trackers; returns them."""
        values = measured(self._nets)
        self._accelerator.log(values, step=step)
        return values

    def state_dict(self) -> dict[str, Any]:
        """The learning state, for ``accelerator.save_state``."""
        return learning_state(self._nets)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the learning state, for ``accelerator.load_state``.

        Raises ``StateError`` where it does not fit.
        """
        restore(self._nets, state)
