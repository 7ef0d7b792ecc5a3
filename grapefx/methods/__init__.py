"""The methods by name."""

from __future__ import annotations

from typing import Any

from grapefx.errors import OptionError, nearest
from grapefx.methods.base import READS, Method, Rows, State, build
from grapefx.methods.bp import BP
from grapefx.methods.dfa import DFA
from grapefx.methods.fdfa import FDFA
from grapefx.methods.grape import GrAPE

BUILTIN: dict[str, type[Method]] = {m.name: m for m in (BP, DFA, FDFA, GrAPE)}


def get_method(method: str | Method, options: dict[str, Any]) -> Method:
    """A method by name with its options, or an instance as it is.

    Raises ``OptionError`` for an unknown name or option, naming the nearest valid one.
    """
    if isinstance(method, Method):
        if options:
            raise OptionError(f"options {sorted(options)} go into the {method.name!r} instance itself")
        return method
    if method not in BUILTIN:
        raise OptionError(f"unknown method {method!r}.{nearest(str(method), BUILTIN)}")
    return build(BUILTIN[method], options)


__all__ = ["BUILTIN", "READS", "Method", "Rows", "State", "get_method"]
