"""The front end: one call of a module becomes a graph, and a rule for which calls it holds.

``capture`` is what the rest of the library calls. ``dynamo`` is the front end, ``exported`` the
explicit alternative; ``record`` says what both return.
"""

from __future__ import annotations

from grapefx.capture.call import dense, flatten_call
from grapefx.capture.dynamo import capture_dynamo
from grapefx.capture.exported import capture_exported
from grapefx.capture.record import Capture, Scope

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
    """
    if front_end == "export":
        return capture_exported(scope, batch_dim=batch_dim, fixed=fixed)
    return capture_dynamo(scope, batch_dim=batch_dim, fixed=fixed, others=others, numbers=numbers)


__all__ = ["FRONT_ENDS", "Capture", "Scope", "capture", "dense", "flatten_call"]
