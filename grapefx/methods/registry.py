"""Methods by name: the built-in ones, and those that installed packages register.

A package registers its own under the entry point group ``grapefx.methods``; the entry's name is the
method's, its value the class (see docs/extending.md).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from typing import Any

from grapefx.errors import MethodError, OptionError, nearest
from grapefx.methods.base import MECHANISMS, READS, Method
from grapefx.methods.builtin import BUILTIN

GROUP = "grapefx.methods"
PRESETS = ("recommended", "paper")


@functools.cache
def _registered() -> dict[str, importlib.metadata.EntryPoint]:
    return {e.name: e for e in importlib.metadata.entry_points(group=GROUP)}


def names() -> list[str]:
    """Every known method name, built-in ones first."""
    return [*BUILTIN, *sorted(set(_registered()) - set(BUILTIN))]


def find(name: str) -> type[Method]:
    """The class of a method.

    Raises ``OptionError`` for an unknown name, naming the nearest one, and ``MethodError`` for an
    entry point that cannot be loaded or is no method.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    entry = _registered().get(name)
    if entry is None:
        raise OptionError(f"unknown method {name!r}.{nearest(str(name), names())}")
    try:
        cls = entry.load()
    except Exception as e:
        raise MethodError(
            f"method {name!r} (entry point {entry.value!r}) cannot be loaded: "
            f"{type(e).__name__}: {e}"
        ) from e
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise MethodError(
            f"method {name!r} (entry point {entry.value!r}) is not a subclass of grapefx.Method"
        )
    return cls


def build(cls: type[Method], options: dict[str, Any]) -> Method:
    """A method from its options; unknown ones are refused by name."""
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in options:
        if key not in fields:
            raise OptionError(f"method {cls.name!r} has no option {key!r}.{nearest(key, fields)}")
    for field in dataclasses.fields(cls):
        value = options.get(field.name, field.default)
        if isinstance(field.default, bool) and not isinstance(value, bool):
            raise OptionError(f"{field.name}={value!r} must be True or False")
    try:
        method = cls(**options)
    except TypeError as e:
        raise OptionError(f"an option of {cls.name!r} in {options} is no number: {e}") from e
    return declared(method)


def declared(method: Method) -> Method:
    """The method, if what it declares makes sense; ``MethodError`` names what does not."""
    what = f"method {type(method).__name__}"
    if not method.name:
        raise MethodError(f"{what} declares no name: give it `name: ClassVar[str] = ...`")
    for unknown in (method.reads | method.learns_from) - READS:
        raise MethodError(f"{what} reads {unknown!r}.{nearest(unknown, READS)}")
    if method.mechanism not in MECHANISMS:
        raise MethodError(
            f"{what} has mechanism {method.mechanism!r}.{nearest(method.mechanism, MECHANISMS)}"
        )
    if method.per_sample and "tangent" not in method.learns_from:
        raise MethodError(f"{what} is per_sample, but does not learn from the tangent")
    return method


def get_method(method: str | Method, options: dict[str, Any]) -> Method:
    """A method by name with its options, or an instance as it is.

    Raises ``OptionError`` for an unknown name or option, naming the nearest valid one.
    """
    if isinstance(method, Method):
        if options:
            raise OptionError(
                f"options {sorted(options)} go into the {method.name!r} instance itself"
            )
        return declared(method)
    return build(find(method), options)


def option_names(method: Any) -> frozenset[str]:
    """The option names of a method given by name (none for an instance or an unknown name)."""
    if not isinstance(method, str) or method not in names():
        return frozenset()
    return frozenset(f.name for f in dataclasses.fields(find(method)))


def preset_options(method: str | Method, preset: str) -> dict[str, Any]:
    """What a preset sets: for "paper" the method's literal form, for "recommended" nothing.

    Includes options of ``grapefx.compile`` beside the method's own. An instance brings its own
    options: only the others are returned for it.
    """
    if preset not in PRESETS:
        raise OptionError(f"preset={preset!r}.{nearest(str(preset), PRESETS)}")
    if preset == "recommended":
        return {}
    if isinstance(method, Method):
        own = {f.name for f in dataclasses.fields(method)}
        return {k: v for k, v in method.paper.items() if k not in own}
    return dict(find(method).paper)
