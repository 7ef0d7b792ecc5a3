"""What a pass is, and what runs a list of them: checked, timed, logged, and switched by name.

``GRAPEFX_LOGS=passes`` prints a line a pass, ``GRAPEFX_LOGS=graphs`` also what it changed (both
through ``logging``, logger ``grapefx.passes``). ``GRAPEFX_DISABLE=late_bias,join_products`` and
``with without("late_bias")`` leave passes out.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from grapefx.errors import OptionError, nearest
from grapefx.ir import StepGraph
from grapefx.passes.graph.text import as_text
from grapefx.passes.graph.verify import check, require

C = TypeVar("C")

log = logging.getLogger("grapefx.passes")
LOGS = {"passes": logging.INFO, "graphs": logging.DEBUG}


@dataclass(frozen=True)
class Pass(Generic[C]):
    """A rewrite of step graphs, and its contract.

    ``rewrite(step, context)`` returns the new step graph; one that works in place (``in_place``)
    changes its argument, and what it returns is not looked at. ``needs`` and ``gives`` name
    properties of ``passes/graph/verify.py`` that hold before and after. A pass that is there for
    speed alone is ``optional``: it can be left out.
    """

    name: str
    rewrite: Callable[[StepGraph, C], Any]
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    in_place: bool = False
    optional: bool = False


@dataclass(frozen=True)
class PassRun:
    """What one pass did: nodes before and after, and the seconds that it took, its checks too."""

    name: str
    before: int
    after: int
    seconds: float


_without: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "grapefx_passes_left_out", default=frozenset()
)
_known: dict[str, bool] = {}  # every pass of the pipeline: whether it is optional


def declare(passes: Sequence[Pass[Any]]) -> None:
    """Make the names of a list's passes known to ``without``."""
    _known.update({p.name: p.optional for p in passes})


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Graphs that are built and compiled inside do without these passes.

    Raises:
        OptionError: a name is no pass's, or the pass's work is needed for right results.
    """
    token = _without.set(_without.get() | _optional(names, "without"))
    try:
        yield
    finally:
        _without.reset(token)


def left_out() -> frozenset[str]:
    """The passes that are switched off here and now."""
    asked = [n.strip() for n in os.environ.get("GRAPEFX_DISABLE", "").split(",")]
    return _without.get() | _optional([n for n in asked if n], "GRAPEFX_DISABLE")


def _optional(names: Sequence[str], where: str) -> frozenset[str]:
    can = [name for name, optional in _known.items() if optional]
    for name in names:
        if name not in _known:
            raise OptionError(f"{where}: unknown pass {name!r}.{nearest(name, can)}")
        if not _known[name]:
            raise OptionError(
                f"{where}: without the pass {name!r} results would be wrong; it cannot be left out."
                f" Those that can: {', '.join(sorted(can))}."
            )
    return frozenset(names)


def run(
    passes: Sequence[Pass[C]],
    step: StepGraph,
    context: C,
    kind: str,
    runs: list[PassRun] | None = None,
) -> StepGraph:
    """Run ``passes`` one after the other; ``step`` stays as it is.

    ``kind`` names the step in the log; what each pass did is added to ``runs``.

    Raises:
        VerifyError: a pass got or left a graph that breaks its contract; the error names it.
    """
    _configure()
    off = left_out()
    given = step
    for p in passes:
        if p.name in off:
            continue
        start = time.perf_counter()
        text = as_text(step) if log.isEnabledFor(logging.DEBUG) else ""
        before = len(step.gm.graph.nodes)
        require(step, p.needs, f"before {p.name}")
        if p.in_place:
            step = step.copy() if step is given else step
            p.rewrite(step, context)
        else:
            step = p.rewrite(step, context)
        require(check(step, p.name), p.gives, f"after {p.name}")
        done = PassRun(p.name, before, len(step.gm.graph.nodes), time.perf_counter() - start)
        if runs is not None:
            runs.append(done)
        _say(kind, done, text, step)
    if step is not given:
        step.gm.recompile()
    return step


def _say(kind: str, done: PassRun, before: str, step: StepGraph) -> None:
    log.info(
        "%-12s %-16s %5d -> %5d nodes %8.1f ms",
        kind, done.name, done.before, done.after, done.seconds * 1e3,
    )  # fmt: skip
    if before:
        names = (f"before {done.name}", f"after {done.name}")
        lines = difflib.unified_diff(
            before.splitlines(), as_text(step).splitlines(), *names, lineterm="", n=1
        )
        log.debug("%s", "\n".join(lines) or "(nothing changed)")


def _configure() -> None:
    """Follow ``GRAPEFX_LOGS``; a program that sets up ``logging`` by itself needs none of it."""
    asked = os.environ.get("GRAPEFX_LOGS", "")
    if not asked or log.handlers:
        return
    names = [n.strip() for n in asked.split(",")]
    for name in names:
        if name not in LOGS:
            raise OptionError(f"GRAPEFX_LOGS: unknown log {name!r}.{nearest(name, LOGS)}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[grapefx] %(message)s"))
    log.addHandler(handler)
    log.setLevel(min(LOGS[n] for n in names))
    log.propagate = False
