"""What the integrations share: nets inside a model, what is logged and what is saved of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from grapefx.errors import OptionError, StateError, tell
from grapefx.runtime.inplace import installed
from grapefx.runtime.module import FeedbackModule

Nets = Mapping[str, FeedbackModule]


def missing(package: str, extra: str) -> ImportError:
    """The error of an integration whose framework is not installed."""
    return ImportError(
        f"grapefx.integrations.{extra} needs the package {package!r}, which is not installed\n"
        f"  remedy: pip install 'grapefx[{extra}]'"
    )


def nets_in(model: nn.Module) -> dict[str, FeedbackModule]:
    """Every module in ``model`` (itself too) that grapefx trains, by its path; "" is the model.

    Raises ``OptionError`` where there is none: a callback for nothing is a mistake.
    """
    found: dict[str, FeedbackModule] = {}
    for path, module in model.named_modules():
        net = module if isinstance(module, FeedbackModule) else installed(module)
        if net is not None and net not in found.values():
            found[path] = net
    if not found:
        raise OptionError(
            f"nothing in this {type(model).__name__} was compiled by grapefx\n"
            "  remedy: self.net = grapefx.compile(net) before training, or leave the callback out"
        )
    return found


def announce(nets: Nets, epoch: int) -> None:
    """Tell all nets the epoch that begins."""
    for net in nets.values():
        net.set_epoch(epoch)


def measured(nets: Nets) -> dict[str, float]:
    """What to log: the last cosines by layer and their means, counts of calibrations and skips.

    Keys are ``grapefx/[PATH/]cos_gradient/LAYER``, ``.../cos_gradient/mean``,
    ``.../calibrations`` and ``.../skipped_updates``, in the characters that all trackers take.
    """
    found: dict[str, float] = {}
    for path, net in nets.items():
        prefix = f"grapefx/{path}/" if path else "grapefx/"
        by_kind: dict[str, dict[str, float]] = {}
        for layer, cosines in net.alignment().items():
            for kind, value in cosines.items():
                by_kind.setdefault(kind, {})[layer] = value
        for kind, layers in by_kind.items():
            found |= {f"{prefix}{kind}/{layer}": value for layer, value in layers.items()}
            found[f"{prefix}{kind}/mean"] = sum(layers.values()) / len(layers)
        found[f"{prefix}calibrations"] = float(net.calibrations)
        found[f"{prefix}skipped_updates"] = float(net.skipped_updates)
    return {re.sub(r"[^\w\-. :/]", "_", key): value for key, value in found.items()}


def learning_state(nets: Nets) -> dict[str, Any]:
    """The learning state of all nets, by path; ``torch.load`` reads it with ``weights_only``."""
    return {path: net.feedback_state_dict() for path, net in nets.items()}


def restore(nets: Nets, state: Mapping[str, Any] | None) -> None:
    """Take over what ``learning_state`` returned.

    None (a checkpoint from before grapefx) leaves the maps as they are, with a warning. Raises
    ``StateError`` where the paths differ, or where a state does not fit its net.
    """
    if state is None:
        tell(
            "the checkpoint holds no learning state of grapefx: the feedback maps begin anew, and "
            "are aligned by the next calibration"
        )
        return
    if set(state) != set(nets):
        raise StateError(
            f"the checkpoint's learning state is of {sorted(state)}, the model has nets at "
            f"{sorted(nets)}\n  remedy: compile the same modules as when it was saved"
        )
    for path, net in nets.items():
        net.load_feedback_state_dict(state[path])
