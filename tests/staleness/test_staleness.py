"""A step never runs on a stale graph: what a forward reads is changed between two calls.

``plain_numbers``, ``held_tensors`` and ``structure`` say what can be read, ``cases`` makes the
product and holds the two tables of what is known to be wrong or refused. Both are checked: what is
listed must really be so on the torch that is installed.
"""

from __future__ import annotations

import fnmatch
import warnings

import pytest

from tests.staleness.cases import (
    CASES,
    INERT,
    REFUSED,
    UNGUARDED,
    Case,
    Known,
    known,
    makes_a_difference,
    run,
)
from tests.staleness.sources import SOURCES


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.rank else []) for c in CASES],
)
def test_a_change_between_two_calls(case: Case) -> None:
    """Outputs, gradients, buffers and everything else are eager's before and after a change."""
    outcome = run(case)
    wrong, refused = known(UNGUARDED, case), known(REFUSED, case)
    assert wrong is None or refused is None, f"{case.name} is in both tables"
    expected = "wrong" if wrong else "refused" if refused else "right"
    listed = wrong or refused
    why = f"listed as {expected} ({listed.reason}), take it out" if listed else outcome.detail
    assert outcome.name == expected, f"{case.name} is {outcome.name}: {why}"


@pytest.mark.parametrize("entry", UNGUARDED + REFUSED, ids=lambda k: k.pattern)
def test_every_line_of_the_tables_fits_a_case(entry: Known) -> None:
    """A line that fits no case on any version says nothing, and every line has a reason."""
    anywhere = Known(entry.pattern, entry.reason)
    assert entry.reason and any(anywhere.fits(c) for c in CASES)


def test_every_change_makes_a_difference() -> None:
    """Without one in eager PyTorch a case would be right whatever the net does."""
    inert = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source in SOURCES:
            name = f"{source.kind}/{source.name}"
            if any(fnmatch.fnmatchcase(name, p) for p in INERT):
                continue
            inert |= {f"{name}/{u.name}" for u in source.uses if not makes_a_difference(source, u)}
    assert not inert
