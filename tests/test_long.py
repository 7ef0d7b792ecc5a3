"""What is left to ``make test-all`` is there, and not more of a test than its pattern says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import COLLECTED, FITTING, LONG, LONG_CASES


def test_long_tests_exist(request: pytest.FixtureRequest) -> None:
    files = {p.name: p.read_text() for p in Path(__file__).parent.rglob("test_*.py")}
    assert set(LONG) <= set(files)
    text = "".join(files.values())
    assert [name for name in LONG_CASES if text.count(f"def {name}(") != 1] == []
    # only some of the cases may have been asked for, if not every one of the tests was
    if request.config.stash[COLLECTED] == set(LONG_CASES):
        assert request.config.stash[FITTING] == set(LONG_CASES)
