"""What every zoo is made of: a model with an example call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 3
CLASSES = 10
SIDE = 64


@dataclass
class Sample:
    """A model and an example call."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    train: bool = True


Builder = Callable[[], Sample]


def images(side: int = SIDE, channels: int = 3) -> Tensor:
    """A batch of images."""
    return torch.randn(BATCH, channels, side, side)


def cut(model: nn.Module, keep: int, call: Callable[[], Any]) -> str:
    """Drop repeats: of consecutive equal blocks ``keep`` stay. Returns a note, if any went.

    A container is left whole where ``call`` does not run without its blocks.
    """
    dropped = 0
    for module in list(model.modules()):
        if not isinstance(module, (nn.Sequential, nn.ModuleList)):
            continue
        before = dict(module._modules)
        kept: list[tuple[str, nn.Module]] = []
        run, last = 0, None
        for name, child in module.named_children():
            kind = (type(child), tuple(p.shape for p in child.parameters()))
            run = run + 1 if kind == last and kind[1] else 1
            last = kind
            if run <= keep:
                kept.append((name, child))
        if len(kept) == len(before):
            continue
        if isinstance(module, nn.ModuleList):
            kept = [(str(i), child) for i, (_, child) in enumerate(kept)]
        _replace(module, dict(kept))
        try:
            with torch.no_grad():
                call()
            dropped += len(before) - len(kept)
        except Exception:
            _replace(module, before)
    return f"without {dropped} repeated blocks" if dropped else ""


def _replace(module: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
    module._modules.clear()
    module._modules.update(children)
