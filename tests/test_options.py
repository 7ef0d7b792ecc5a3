"""Options: one table, which the signature, the checks and the page follow."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import grapefx
from grapefx.errors import OptionError
from grapefx.methods import BUILTIN
from grapefx.options import OPTIONS, CompileOptions, Options
from tools.options_page import PAGE, page

FIELDS = {f.name for cls in BUILTIN.values() for f in dataclasses.fields(cls)}
NAMED = {"calib_every"}  # in the signature itself


def test_editors_know_every_option() -> None:
    """The keywords of the signature are the table's and the built-in methods', no more, no less."""
    hints = get_type_hints(CompileOptions)
    assert set(hints) == (set(OPTIONS) | FIELDS) - NAMED
    table = get_type_hints(Options)
    for name in set(OPTIONS) - NAMED:
        assert hints[name] == table[name], name
    for cls in BUILTIN.values():
        own = get_type_hints(cls)
        for f in dataclasses.fields(cls):
            assert hints[f.name] == own[f.name], f"{cls.name}: {f.name}"


def words(hint: Any) -> set[Any]:
    """The literal values of a type hint."""
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return set().union(*(words(a) for a in get_args(hint)))


def test_the_types_are_the_checks() -> None:
    """A literal type lists the words that are let through, and defaults pass."""
    for name, hint in get_type_hints(Options).items():
        values = OPTIONS[name].metadata["values"]
        assert {w for w in values.words if isinstance(w, str)} == words(hint), name
        assert (None in values.words) == (type(None) in get_args(hint) or hint is typing.Any), name
        values.refuse(name, OPTIONS[name].default)


WRONG: list[Any] = ["nothing of the kind", -3, 2.5, object(), [], {"a": 1}, (), True, b"x"]


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"points", "error_at"}))
def test_wrong_values_are_refused_by_name(name: str) -> None:
    """Every option refuses at least most of these, always with its name."""
    refused = 0
    for value in WRONG:
        try:
            Options(**{name: value})
        except OptionError as e:
            refused += 1
            assert name in str(e)
    assert refused >= len(WRONG) - 2, name


def test_help_says_what_each_option_does() -> None:
    assert grapefx.compile.__doc__ is not None
    for name, field in OPTIONS.items():
        assert f"{name}:" in grapefx.compile.__doc__
        assert len(field.metadata["meaning"]) > 15


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "python -m tools.options_page"


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"calib_gap": 5}, "calib_every='geometric'"),
        ({"calib_growth": 2.0}, "calib_every='geometric'"),
        ({"calib_threshold": 0.1}, "calib_every='auto'"),
        ({"calib_budget": 0.1}, "calib_every='auto'"),
        ({"exact_weight": 1.0}, "set exact_rows"),
        ({"exact_late": True}, "set exact_rows"),
    ],
)
def test_an_option_that_nothing_would_read_is_refused(given: dict[str, Any], missing: str) -> None:
    with pytest.raises(OptionError, match=missing):
        Options(**given)
