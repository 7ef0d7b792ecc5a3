"""The learning state: feedback maps by layer, and what a checkpoint of them holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grapefx.errors import StateError
from grapefx.maps import FeedbackMap
from grapefx.methods import Method
from grapefx.runtime.noise import seed_of

VERSION = 1


class FeedbackState:
    """``tensors`` maps "layer/name" to a tensor. Values are replaced, never written in place."""

    def __init__(self, method: Method, seed: int) -> None:
        self.method = method
        self.seed = seed
        self.tensors: dict[str, Tensor] = {}
        self.pending: dict[str, Tensor] | None = None  # loaded before the layers were known

    def ensure(
        self, maps: tuple[FeedbackMap, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        """State for every layer of ``maps``: loaded, kept, or new (seeded by the layer's name)."""
        if self.pending is not None:
            self._check(self.pending, maps)
            self.tensors, self.pending = self.pending, None
        new = dict(self.tensors)
        for m in maps:
            generator = torch.Generator(device)
            generator.manual_seed(seed_of(self.seed, *m.layer.name.encode()))
            first = f"{m.layer.name}/B"
            have = self.tensors.get(first)
            if have is not None and tuple(have.shape) == m.shape:
                for k, t in self.tensors.items():
                    if k.startswith(f"{m.layer.name}/") and t.device != device:
                        new[k] = t.to(device)
                continue
            for name, t in self.method.init(m.shape, generator, dtype).items():
                new[f"{m.layer.name}/{name}"] = t
        self.tensors = {
            k: t if t.dtype == dtype or not t.is_floating_point() else t.to(dtype)
            for k, t in new.items()
        }

    def _check(self, loaded: dict[str, Tensor], maps: tuple[FeedbackMap, ...]) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for m in maps:
            like = self.method.init(m.shape, torch.Generator("cpu"), torch.float32)
            expected.update({f"{m.layer.name}/{k}": tuple(v.shape) for k, v in like.items()})
        missing = sorted(set(expected) - set(loaded))
        extra = sorted(set(loaded) - set(expected))
        if missing or extra:
            raise StateError(
                "the feedback state belongs to another architecture or method: "
                f"missing {missing[:3]}, unexpected {extra[:3]}"
            )
        for k, shape in expected.items():
            if tuple(loaded[k].shape) != shape:
                raise StateError(
                    f"feedback state {k!r} has shape {tuple(loaded[k].shape)}, this model needs {shape}"
                )

    def load(self, loaded: dict[str, Tensor], maps: tuple[FeedbackMap, ...] | None) -> None:
        """Take over a checkpoint's tensors; checked first, so a refusal changes nothing."""
        copy = {k: v.detach().clone() for k, v in loaded.items()}
        if maps is None or not self.tensors:
            self.pending = copy
            return
        some = next(iter(self.tensors.values()))
        self._check(copy, maps)
        self.tensors = {k: v.to(some.device) for k, v in copy.items()}
