"""What a model's forward does beside computing, which a capture cannot carry out: it is reported.

A graph replays tensor operations. What a forward does in Python (drawing from ``random``, writing
an attribute) happens at the capture alone; attributes get their old values back.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from grapefx import tree
from grapefx.attribute_reads import recording


class Watch:
    """Trace a model inside ``watching``, by ``call``; what it did is added to ``notes``.

    ``read``: attributes that the graph depends on, see ``attribute_reads``.
    """

    def __init__(self, model: nn.Module, notes: list[str]) -> None:
        self.model, self.notes = model, notes
        self.written: set[str] = set()
        self.read: dict[tuple[str, str], None] = {}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The model. Looks at its attributes inside the trace, which puts some back at its end."""
        before = _attributes(self.model)
        with recording(self.model, self.read):
            out = self.model(*args, **kwargs)
        self.written |= {name for part in before for name in _written(*part)}
        return out

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A trace inside."""
        before, drawn = _attributes(self.model), _states()
        try:
            yield
        finally:
            for _, module, attributes, buffers in before:
                _restore(module.__dict__, attributes)
                _restore(module._buffers, buffers)
        for source in [k for k, state in _states().items() if drawn.get(k) != state]:
            _add(
                self.notes,
                f"the model draws from {source} in its forward: the draw of this capture stays for "
                "all steps. Draw with torch (torch.rand, torch.bernoulli): each step draws again",
            )
        if self.written:
            _add(
                self.notes,
                f"the model assigns {', '.join(sorted(self.written))} in its forward, which a "
                "captured step does not: return the value, or write a registered buffer in place "
                "(copy_, add_)",
            )


def _attributes(model: nn.Module) -> list[tuple[str, nn.Module, dict[str, Any], dict[str, Any]]]:
    return [(n, m, dict(m.__dict__), dict(m._buffers)) for n, m in tree.named_modules(model)]


def _add(notes: list[str], note: str) -> None:
    if note not in notes:  # a capture may trace more than once
        notes.append(note)


def _states() -> dict[str, Any]:
    """The states of the generators outside torch."""
    found: dict[str, Any] = {"Python's random": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        found["numpy.random"] = (name, keys.tobytes(), *rest)
    return found


def _written(
    name: str, module: nn.Module, attributes: dict[str, Any], buffers: dict[str, Any]
) -> Iterator[str]:
    """Tensors and numbers that are other ones than before."""
    for now, old in ((module.__dict__, attributes), (module._buffers, buffers)):
        for key, value in now.items():
            if key in old and old[key] is value:
                continue
            if isinstance(value, int | float) and value == old.get(key):
                continue
            if isinstance(value, Tensor | int | float) and key not in _computed(module):
                yield f"{name}.{key}".lstrip(".")


def _computed(module: nn.Module) -> set[Any]:
    """What weight_norm, spectral_norm and pruning compute and assign before each call."""
    hooks = module._forward_pre_hooks.values()
    return {getattr(h, k, None) for h in hooks for k in ("name", "_tensor_name")}


def _restore(now: dict[str, Any], old: dict[str, Any]) -> None:
    for key in [k for k in now if k not in old]:
        del now[key]
    for key, value in old.items():
        if key not in now or now[key] is not value:
            now[key] = value


__all__ = ["Watch"]
