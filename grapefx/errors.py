"""Every error that grapefx raises on purpose, and the warnings it gives.

All errors derive from :class:`GrapefxError`; a message names the node or module, the user's source
line where there is one, and a way out.
"""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Iterable
from types import FrameType


class GrapefxError(RuntimeError):
    """Base class of the errors below."""


class OptionError(GrapefxError, ValueError):
    """An unknown method, an unknown option, or a value out of range."""


class CaptureError(GrapefxError):
    """The model cannot be turned into one graph."""


class PlacementError(GrapefxError):
    """No feedback point, or no error tap, can be placed on the graph."""


class TangentError(GrapefxError):
    """An operator between a feedback point and the error tap has no forward derivative."""


class MethodError(GrapefxError):
    """A method is not defined on this model."""


class BudgetError(GrapefxError):
    """The feedback maps would be larger than ``feedback_budget``."""


class VerifyError(GrapefxError):
    """A pass broke its contract, or an update subgraph depends on another layer's."""


class BackwardError(GrapefxError):
    """``backward`` was used in a way that has no meaning for this module."""


class InputError(GrapefxError):
    """The inputs of a call do not fit the model (device, structure)."""


class StateError(GrapefxError):
    """A feedback state dict belongs to another architecture or method."""


class StageError(GrapefxError):
    """A rank of a pipeline failed, or ranks disagree; it names the rank, stage and action."""


class GrapefxWarning(UserWarning):
    """Something works, but not as the user may expect."""


def tell(message: str) -> None:
    """A ``GrapefxWarning`` at the line that called into grapefx, whatever of torch lies between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _between(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, GrapefxWarning, stacklevel=level)


def _between(frame: FrameType) -> bool:
    top = frame.f_globals.get("__name__", "").partition(".")[0]
    return top in ("grapefx", "torch", "contextlib")


def first_line(error: BaseException) -> str:
    """An error in one line: its own first one, with its type where that says too little."""
    text = str(error).strip()
    first = text.splitlines()[0][:200] if text else ""
    return first if " " in first else f"{type(error).__name__}: {first}".rstrip(": ")


def nearest(name: str, valid: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the closest valid name, then the list of valid ones."""
    options = sorted(valid)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Valid: {', '.join(options)}."


def is_number(value: object) -> bool:
    """Whether an option's value is a finite number."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value)  # type: ignore[arg-type]
