"""The numbers of docs/trust.md: counted, not written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import trust


def test_rows_count_what_the_results_hold() -> None:
    operators, architectures, situations, fuzz = trust.rows(count_tests=False)
    page = (trust.ROOT / "docs" / "op_rules.md").read_text()
    assert "| **wrong** | 0 |" in page and "wrong" not in operators[2]
    assert operators[2].endswith("11,620 samples") and "11,620 samples" in page
    coverage = (trust.ROOT / "docs" / "coverage.md").read_text()
    assert f"| all | {architectures[1]} | {architectures[2].split()[0]} |" in coverage
    assert int(situations[1].replace(",", "")) > 1000 and int(fuzz[1]) >= 20


def test_the_page_holds_all_but_what_changes_daily() -> None:
    page = trust.PAGE.read_text(encoding="utf-8")
    for what, number, of_it, where in trust.rows(count_tests=False)[:2]:
        assert f"| {what} | {number} | {of_it} | {where} |" in page
    assert "| test cases |" in page


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(SystemExit, match="counts:start"):
        trust.write(page, "table")
    page.write_text(f"a\n{trust.START}old{trust.END}\nb")
    trust.write(page, "new")
    assert page.read_text() == f"a\n{trust.START}\nnew\n{trust.END}\nb"
