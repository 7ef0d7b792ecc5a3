"""Captures and compilations: one at a time, and out of sight of the caller's modes.

While a model is traced, parts of torch are replaced and its output goes nowhere, for the whole
process. A mode or hook that the caller has on (``FlopCounterMode``, ``checkpoint``) would see the
tensors of the trace, which have no values.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from grapefx.torch_compat import lazy_graph_modules, without_modes

_LOCK = threading.RLock()


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Around whatever traces or compiles."""
    with _LOCK, without_modes(), lazy_graph_modules():
        yield
