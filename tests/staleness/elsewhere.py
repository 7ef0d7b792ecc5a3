"""Another module, whose globals the models of the staleness suite read."""

from typing import Any

NUMBER: Any = None


def number() -> Any:
    """The global of this module, read by a function of it."""
    return NUMBER
