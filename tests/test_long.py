"""What is left to ``make test-all`` is there."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import LONG, LONG_CASES


def test_long_tests_exist() -> None:
    files = {p.name: p.read_text() for p in Path(__file__).parent.rglob("test_*.py")}
    assert set(LONG) <= set(files)
    text = "".join(files.values())
    assert [name for name in LONG_CASES if f"def {name}(" not in text] == []
