"""The learning state: feedback maps by layer, and what a checkpoint of them holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from grapefx.capture import module_tree
from grapefx.errors import StateError
from grapefx.maps import StateSpec
from grapefx.methods import Method
from grapefx.passes.feedback.late_rows import NAME, is_late
from grapefx.passes.feedback.mean_field import KEY
from grapefx.runtime.noise import seed_of
from grapefx.torch_compat import new_fake_mode

VERSION = 1
MEANS = KEY.rstrip("/")


class FeedbackState:
    """``tensors`` maps "layer/name" to a tensor. Values are replaced, never written in place."""

    def __init__(
        self,
        method: Method,
        seed: int,
        memory: frozenset[str] = frozenset(),
        averages: bool = False,
        late: bool = False,
    ) -> None:
        self.method = method
        self.memory = memory  # names of what is kept beside the method's tensors
        self.averages = averages  # whether means of derivatives are kept, under ``MEANS``
        self.late = late  # whether corrections of gradients wait for the next step
        self.seed = seed
        self.tensors: dict[str, Tensor] = {}
        self.readings: dict[str, str] = {}  # of each layer, see ``StateSpec``
        # loaded, until the layers are known
        self.pending: dict[str, Tensor] | None = None
        self.pending_readings: dict[str, str] = {}

    def latest(self) -> dict[str, Tensor]:
        """The tensors that the next step reads (where the layers keep them, or as loaded)."""
        return self.tensors if self.pending is None else self.pending

    def latest_readings(self) -> dict[str, str]:
        """The readings that belong to ``latest``."""
        return dict(self.readings if self.pending is None else self.pending_readings)

    def ensure(
        self,
        specs: tuple[StateSpec, ...],
        dtype: torch.dtype,
        device: torch.device,
        late: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> dict[str, str]:
        """A state for each of ``specs``: loaded, kept, or new (seeded by the layer's name).

        ``late``: values like those of the corrections that wait for the next step; new ones are
        zero.

        Returns the keys that differ from "layer/name": a map belongs to one sample shape, so inputs
        of another length or resolution get one of their own, "layer[CxN]/name".

        Raises:
            StateError: what was loaded is of other feedback points or maps; nothing changed.
        """
        if self.pending is not None:
            self._check_pending(specs)
            self.tensors, self.pending = self.pending, None
        self.readings = {**self.readings, **{m.key: m.reading for m in specs}}
        new = {
            k: t.to(device, dtype if t.is_floating_point() and not is_late(k) else t.dtype)
            for k, t in self.tensors.items()
        }
        renamed: dict[str, str] = {}
        for m in specs:
            like = {**self._like(m.shape), **dict(m.memory)}
            key = plain = m.key
            if self._fits(new, key, like) is False:
                key = f"{plain}[{'x'.join(map(str, m.shape))}]"
                renamed.update({f"{plain}/{k}": f"{key}/{k}" for k in like})
            if not self._fits(new, key, like):
                generator = torch.Generator(device)
                generator.manual_seed(seed_of(self.seed, *key.encode()))
                for name, t in self.method.init(m.shape, generator, dtype).items():
                    new[f"{key}/{name}"] = t
                for name, shape in m.memory:
                    new[f"{key}/{name}"] = torch.zeros(shape, dtype=dtype, device=device)
        for name, value in late.items():
            if name not in new:
                new[name] = torch.zeros(value.shape, dtype=value.dtype, device=device)
        self.tensors = new
        return renamed

    def _check_pending(self, specs: tuple[StateSpec, ...]) -> None:
        assert self.pending is not None
        maps = [key.rpartition("/")[0] for key in self.pending if not is_late(key)]
        have = {layer.partition("[")[0] for layer in maps} - {MEANS}
        want = {m.key for m in specs}
        if have - want and want - have:
            raise StateError(
                f"the loaded feedback state has maps at {sorted(have - want)[:3]}, this model's "
                f"feedback points need some at {sorted(want - have)[:3]}: it was saved with other "
                "points=, granularity= or error_at="
            )
        for m in specs:
            saved = self.pending_readings.get(m.key, m.reading)
            if saved != m.reading:
                raise StateError(
                    f"the loaded feedback map of layer {m.key!r} is {saved or 'a full one'}, this "
                    f"model's is {m.reading or 'a full one'}: pass the feedback= and seed= that "
                    "it was saved with"
                )

    def _like(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The names and shapes of one layer's state."""
        with new_fake_mode():
            state = self.method.init(shape, torch.Generator(), torch.float32)
        return {k: tuple(t.shape) for k, t in state.items()}

    @staticmethod
    def _fits(
        tensors: dict[str, Tensor], layer: str, like: dict[str, tuple[int, ...]]
    ) -> bool | None:
        """Whether a layer's state has these shapes; None if there is none."""
        have = {k: tensors.get(f"{layer}/{k}") for k in like}
        if any(t is None for t in have.values()):
            return None
        return all(tuple(t.shape) == like[k] for k, t in have.items())  # type: ignore[union-attr]

    def having(self, learned: dict[str, Tensor]) -> FeedbackState:
        """This state with new values for some tensors; it stays as it is."""
        new = copy.copy(self)
        new.tensors = {**self.tensors, **learned}
        return new

    def load(self, loaded: dict[str, Tensor], readings: dict[str, str]) -> None:
        """Take over a checkpoint's tensors; checked first, so a refusal changes nothing."""
        names = set(self._like((1, 1))) | self.memory
        layers: dict[str, set[str]] = {}
        for key in loaded:
            layer, _, name = key.rpartition("/")
            layers.setdefault(layer, set()).add(name)
        for layer, found in layers.items():
            known = (layer == MEANS and self.averages) or (found == {NAME} and self.late)
            if found != names and not known:
                raise StateError(
                    f"the feedback state of layer {layer!r} holds {sorted(found)}, this method "
                    f"keeps {sorted(names)}: it was learned with other options"
                )
        self.pending = {k: v.detach().clone() for k, v in loaded.items()}
        self.pending_readings = dict(readings)


def architecture(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What a feedback state belongs to: the parameters' names and shapes."""
    return {n: tuple(p.shape) for n, p in module_tree.named_parameters(model)}


def check_architecture(saved: dict[str, tuple[int, ...]], model: nn.Module) -> None:
    """Raise ``StateError`` naming a parameter in which the two differ."""
    have = architecture(model)
    saved = {k: tuple(v) for k, v in saved.items()}
    if saved == have:
        return
    missing = sorted(set(saved) - set(have))[:3]
    extra = sorted(set(have) - set(saved))[:3]
    shapes = [f"{k} {saved[k]} -> {have[k]}" for k in saved if k in have and saved[k] != have[k]]
    raise StateError(
        "the feedback state belongs to another architecture: it knows "
        f"{missing or 'no other parameters'}, this model has {extra or 'no others'}; shapes that "
        f"differ: {', '.join(shapes[:3]) or 'none'}"
    )
