"""grapefx: train neural networks without a sequential backward pass."""

from grapefx.api import compile, restore
from grapefx.errors import (
    BackwardError,
    BudgetError,
    CaptureError,
    GrapefxError,
    GrapefxWarning,
    InputError,
    MethodError,
    OptionError,
    PlacementError,
    StateError,
    TangentError,
    VerifyError,
)
from grapefx.methods import Method
from grapefx.plan import build_plan
from grapefx.report.inspect import inspect

__version__ = "0.1.0"

__all__ = [
    "BackwardError",
    "BudgetError",
    "CaptureError",
    "GrapefxError",
    "GrapefxWarning",
    "InputError",
    "Method",
    "MethodError",
    "OptionError",
    "PlacementError",
    "StateError",
    "TangentError",
    "VerifyError",
    "build_plan",
    "compile",
    "inspect",
    "restore",
]
