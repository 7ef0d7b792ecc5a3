"""The front end: one call of a module becomes a graph, and a rule for which calls it holds.

``capture`` is what the rest of the library calls. ``dynamo`` is the front end, ``exported`` the
explicit alternative; ``record`` says what both return.
"""

from __future__ import annotations

from torch import Tensor

from grapefx.capture.advice import advised, no_tensor
from grapefx.capture.call import dense, flatten_call
from grapefx.capture.dynamo import capture_dynamo
from grapefx.capture.exported import capture_exported
from grapefx.capture.record import Capture, Scope
from grapefx.errors import CaptureError, InputError

FRONT_ENDS = ("dynamo", "export")


def capture(
    scope: Scope,
    *,
    front_end: str = "dynamo",
    batch_dim: int = 0,
    fixed: bool = False,
    others: frozenset[tuple[int, int]] = frozenset(),
    numbers: frozenset[str] = frozenset(),
) -> Capture:
    """Trace one call. See ``capture_dynamo`` for the arguments.

    Raises:
        CaptureError: the model cannot be traced; the message names the user's line.
        InputError: the call has no tensor, or one that torch cannot trace.
    """
    if not any(isinstance(x, Tensor) for x in flatten_call(scope.args, scope.kwargs)[0]):
        raise InputError(no_tensor(scope.model, scope.args, scope.kwargs))
    try:
        if front_end == "export":
            return capture_exported(scope, batch_dim=batch_dim, fixed=fixed)
        return capture_dynamo(
            scope, batch_dim=batch_dim, fixed=fixed, others=others, numbers=numbers
        )
    except CaptureError as e:
        better = advised(e, scope.model, scope.args, scope.kwargs)
        if better is e:
            raise
        raise better from e


__all__ = ["FRONT_ENDS", "Capture", "Scope", "capture", "dense", "flatten_call"]
