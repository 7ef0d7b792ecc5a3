"""Defines the report that users hold: the records, with every form in which they can be shown."""

from __future__ import annotations

from dataclasses import dataclass

from grapefx.report.records import ReportData
from grapefx.report.render.text import render_text


@dataclass(frozen=True)
class Report(ReportData):
    """What ``grapefx.inspect`` and ``net.explain()`` return.

    ``print`` it, or render it with :meth:`text`, :meth:`json`, :meth:`html`; a notebook shows the
    HTML.
    """

    def text(self) -> str:
        """The report for a terminal, at most 100 columns wide."""
        return render_text(self)

    def html(self) -> str:
        """The report as one self-contained HTML page."""
        from grapefx.report.render.html import render_html  # jinja2 is loaded for pages only

        return render_html(self)

    def _repr_html_(self) -> str:
        from grapefx.report.render.html import render_notebook

        return render_notebook(self)

    def __str__(self) -> str:
        return self.text()
