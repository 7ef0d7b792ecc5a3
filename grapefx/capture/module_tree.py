"""A model's modules, parameters and buffers, read from where ``nn.Module`` keeps them.

A model may have an attribute called ``modules``, or a ``parameters`` of its own that lists some of
them; what a graph depends on is all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def named_modules(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules``."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if remove_duplicate:
            if id(module) in seen:
                return
            seen.add(id(module))
        yield path, module
        for name, child in vars(module)["_modules"].items():
            if child is not None:
                yield from walk(child, f"{path}.{name}" if path else name)

    yield from walk(model, "")


def modules(model: nn.Module) -> Iterator[nn.Module]:
    """As ``model.modules``."""
    return (module for _, module in named_modules(model))


def named_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """As ``model.named_parameters``."""
    return _members(model, "_parameters", remove_duplicate)


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """As ``model.parameters``."""
    return (p for _, p in named_parameters(model))


def named_buffers(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """As ``model.named_buffers``."""
    return _members(model, "_buffers", remove_duplicate)


def _members(model: nn.Module, store: str, remove_duplicate: bool) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, module in named_modules(model, remove_duplicate=remove_duplicate):
        for name, value in vars(module)[store].items():
            if value is None or id(value) in seen:
                continue
            if remove_duplicate:
                seen.add(id(value))
            yield (f"{path}.{name}" if path else name), value
