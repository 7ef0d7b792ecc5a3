"""Names of a model that the compiled module has too: which one wins, and what is said about it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

from torch import nn

_PLAIN = frozenset(vars(nn.Module()))
_STORES = ("_parameters", "_buffers", "_modules")
# of the module that is called; the model's own hooks run around its forward
_WRAPPER = ("register_", "compile", "extra_repr")


def has(model: nn.Module, name: str) -> bool:
    """Whether a model has an attribute that ``nn.Module`` has not; no property is evaluated."""
    store = vars(model)
    if name in store:
        return name not in _PLAIN
    if any(name in store.get(kind, ()) for kind in _STORES):
        return True
    return any(name in vars(c) for c in type(model).__mro__ if c not in nn.Module.__mro__)


@functools.cache
def public(wrapper: type[nn.Module]) -> frozenset[str]:
    """The names that grapefx adds to those of ``nn.Module``."""
    return frozenset(
        n for n in vars(wrapper) if not n.startswith("_") and not hasattr(nn.Module, n)
    ) - {"training"}


def hidden(model: nn.Module, own: Iterable[str]) -> list[str]:
    """Attributes of the model that ``net.name`` does not give, because grapefx or torch has one.

    ``own``: the names of the compiled module.
    """
    ours = [n for n in own if has(model, n)]
    torchs = [n for n in vars(model) if n not in _PLAIN and hasattr(nn.Module, n)]
    return sorted({*ours, *torchs} - {"forward", "_compiled_call_impl"})


def note(model: nn.Module, own: Iterable[str]) -> str:
    """What to tell at ``compile`` about names that the model and the compiled module share."""
    found = hidden(model, own)
    both = "set_epoch" in found and callable(getattr(model, "set_epoch", None))
    lines = []
    if others := [n for n in found if not (both and n == "set_epoch")]:
        names = ", ".join(map(repr, others))
        lines.append(
            f"the model's own {names} cannot be reached as net.{others[0]}: on the compiled module "
            f"the name is grapefx's or torch's. Write net.original.{others[0]} for the model's "
            "(net.original is the model), or compile with inplace=True"
        )
    if both:
        lines.append(
            "net.set_epoch(epoch) tells grapefx's schedule the epoch and then calls the model's "
            "own set_epoch(epoch)"
        )
    return "; ".join(lines)


def delegated(model: type[nn.Module], wrapper: type[nn.Module]) -> dict[str, Any]:
    """Methods of ``nn.Module`` that a model's class redefines, for the class of its wrapper."""
    found: dict[str, Any] = {}
    for name, plain in vars(nn.Module).items():
        own = getattr(model, name, None)
        if name.startswith(("_", *_WRAPPER)) or not isinstance(plain, FunctionType):
            continue
        if isinstance(own, FunctionType) and own is not plain and name not in vars(wrapper):
            found[name] = _on_original(own)
    return found


def _on_original(method: Callable[..., Any]) -> Any:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.original, method.__name__)(*args, **kwargs)
        return self if result is self.original else result

    return call
