"""Tables, as Markdown for pages and as aligned text for terminals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Cells = Sequence[object]


class Table:
    """Columns by title; those whose title ends in a colon are aligned to the right, as numbers are.

    Rows may be printed one by one as they become known: ``head()`` first, then a ``line()`` each.
    """

    def __init__(self, *columns: str) -> None:
        self.titles = [c.removesuffix(":") for c in columns]
        self.right = [c.endswith(":") for c in columns]

    def head(self) -> str:
        """The two lines above the rows."""
        return f"{_line(self.titles)}\n{_line(['---:' if r else '---' for r in self.right])}"

    def line(self, *cells: object) -> str:
        """One row. A short row is filled up with empty cells."""
        empty = [""] * (len(self.titles) - len(cells))
        return _line([*cells, *empty])

    def markdown(self, rows: Iterable[Cells]) -> str:
        """Head and rows."""
        return "\n".join([self.head(), *(self.line(*row) for row in rows)])

    def text(self, rows: Iterable[Cells]) -> str:
        """Head and rows in columns of equal width, for a terminal."""
        lines = [self.titles, *([str(c) for c in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * w for w in widths])
        return "\n".join(
            "  ".join(
                c.rjust(w) if right else c.ljust(w)
                for c, w, right in zip(line, widths, self.right, strict=True)
            ).rstrip()
            for line in lines
        )


def fixed(value: float | None, digits: int, absent: str = "-") -> str:
    """A number with so many digits behind the point; ``absent`` where there is none."""
    return absent if value is None else f"{value:.{digits}f}"


def _line(cells: Cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"
