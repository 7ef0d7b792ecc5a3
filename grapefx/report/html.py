"""The report as one self-contained HTML page: no network, no libraries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from grapefx.report import panels, units
from grapefx.report.colours import PHASES, css_class, css_variables
from grapefx.report.model import MethodReport, Report, worker_key
from grapefx.report.svg import MARKERS
from grapefx.report.text import notes


def render_html(report: Report) -> str:
    """A whole HTML document, readable from 320 px up, light and dark by the reader's setting."""
    methods = report.methods[1:] or report.methods
    method, workers = methods[-1].method, worker_key(_first_workers(report))
    body = "".join(
        [
            MARKERS,
            "<main>",
            _head(report),
            _switches(report, methods, method, workers),
            *(panels.cards(report, m, workers, m.method != method) for m in methods),
            panels.warnings(report),
            panels.comparison(report),
            *(panels.chain_and_fan(report, m, m.method != method) for m in methods),
            panels.schedules(report, methods, method, workers),
            *(panels.critical_path(report, m, m.method != method) for m in methods),
            *(panels.phases(m, m.method != method) for m in methods),
            *(panels.layer_table(report, m, m.method != method) for m in methods),
            *(panels.plan(m, m.method != method) for m in methods),
            _notes(report),
            "</main>",
            '<div id="tip" hidden></div>',
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.model)}: critical path</title><style>{_css()}</style></head>"
        f'<body data-method="{escape(method, quote=True)}" data-workers="{workers}">{body}'
        f"<script>{_asset('page.js')}</script></body></html>"
    )


def render_notebook(report: Report) -> str:
    """The page inside a frame, so that its styles stay its own."""
    page = escape(render_html(report), quote=True)
    return (
        f'<iframe srcdoc="{page}" style="width:100%;height:900px;border:1px solid #8884;'
        'border-radius:8px" title="grapefx report"></iframe>'
    )


def _first_workers(report: Report) -> int | None:
    """The number of workers shown first: 8 or the largest finite one below it."""
    finite = [p for p in report.workers if p is not None]
    return max((p for p in finite if p <= 8), default=finite[0] if finite else None)


def _asset(name: str) -> str:
    return (resources.files("grapefx.report") / name).read_text(encoding="utf-8")


def _css() -> str:
    classes = "".join(
        f".{css_class(p)}{{background:var(--{css_class(p)});fill:var(--{css_class(p)})}}"
        for p in PHASES
    )
    dark = f"@media (prefers-color-scheme: dark){{:root{{{css_variables(1)}}}}}"
    return f":root{{{css_variables(0)}}}{dark}{classes}{_asset('page.css')}"


def _head(r: Report) -> str:
    facts = []
    if r.parameters:
        facts.append(f"{units.count(r.parameters)} parameters")
    if r.batch is not None:
        facts.append(f"batch {r.batch}")
    facts.append(f"device model <b>{escape(r.device.name)}</b> ({escape(r.device.description)})")
    return f"<header><h1>{escape(r.model)}</h1><p>{' · '.join(facts)}</p></header>"


def _switches(r: Report, methods: Sequence[MethodReport], method: str, workers: str) -> str:
    def buttons(kind: str, values: Iterable[tuple[str, str]], now: str) -> str:
        return "".join(
            f'<button type="button" data-set-{kind}="{escape(v, quote=True)}" '
            f'aria-pressed="{str(v == now).lower()}">{escape(text)}</button>'
            for v, text in values
        )

    pick = buttons("method", [(m.method, m.method) for m in methods], method)
    lanes = buttons("workers", [(worker_key(p), units.workers(p)) for p in r.workers], workers)
    return (
        '<div class="bar-top">'
        f'<span class="seg">Method <span class="opts">{pick}</span></span>'
        f'<span class="seg">Workers <span class="opts">{lanes}</span></span></div>'
    )


def _notes(r: Report) -> str:
    items = "".join(f"<li>{escape(n)}</li>" for n in notes(r))
    source = f"<li>device model: {escape(r.device.source)}</li>" if r.device.source else ""
    return (
        f'<section class="notes"><h2>What the numbers mean</h2><ul>{items}{source}</ul>'
        "</section><footer>Made by grapefx-inspect.</footer>"
    )
