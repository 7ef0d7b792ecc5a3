"""Feedback points and error taps that the user names.

In: a sweep over the captured graph (see ``sweep.py``) and a choice: module names or globs,
module classes, or a function of the node; one or a list of them. Out: nodes, with a name each.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.fx import Node

from grapefx.errors import OptionError, PlacementError, nearest
from grapefx.passes.graph.source import module_path
from grapefx.passes.place.sweep import Sweep

Choice = str | type[nn.Module] | Callable[[Node], bool]


def check_choice(option: str, choice: Any) -> None:
    """Raise ``OptionError`` for what cannot name a place."""
    if not _listed(choice):
        raise OptionError(f"{option}={choice!r} names nothing\n  remedy: leave {option} out")
    for one in _listed(choice):
        if not isinstance(one, str) and not callable(one):
            raise OptionError(
                f"{option}={choice!r}: give module names or globs, module classes, or a function "
                "of the node"
            )


def select(sweep: Sweep, option: str, choice: Any) -> dict[Node, str]:
    """The chosen nodes in graph order. A module stands for the value that it returns.

    Raises ``PlacementError`` for a choice that matches nothing, or a value that cannot be cut.
    """
    ends: dict[str, Node] = {}
    classes: dict[str, str] = {}
    for node in sweep.nodes:
        if node not in sweep.data or node not in sweep.live or node not in sweep.folds:
            continue
        for path, cls in module_path(node):
            ends[path], classes[path] = node, cls
    found: dict[Node, str] = {}
    for one in _listed(choice):
        if isinstance(one, str):
            hit = {ends[p]: p for p in ends if fnmatch.fnmatchcase(p, one)}
        elif isinstance(one, type):
            hit = {ends[p]: p for p in ends if classes[p] == one.__qualname__.rsplit(".", 1)[-1]}
        else:
            nodes = [n for n in sweep.nodes if n in sweep.data and one(n)]
            hit = {n: (module_path(n) or [(n.name, "")])[-1][0] for n in nodes}
        if not hit:
            what = one if isinstance(one, str) else getattr(one, "__name__", repr(one))
            near = nearest(str(what), tuple(ends)) if isinstance(one, str) else ""
            raise PlacementError(f"{option}: nothing in the model matches {what!r}.{near}")
        for node, name in hit.items():
            found.setdefault(node, name)
    for node, name in found.items():
        if node not in sweep.folds or node not in sweep.live:
            raise PlacementError(
                f"{option}: the value at {name!r} ({node.name}) is not a real tensor "
                "that keeps the batch on the way to an output"
            )
    return {n: found[n] for n in sorted(found, key=lambda n: sweep.order[n])}


def _listed(choice: Any) -> Sequence[Choice]:
    return list(choice) if isinstance(choice, (list, tuple, set, frozenset)) else [choice]
