"""Text, HTML and graphviz."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from grapefx.analysis import build_dag
from grapefx.report.render import units
from grapefx.report.render.dot import DotMissingError, dot_source, write_graph

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Checker(HTMLParser):
    """Every tag is closed, in order; ids and links are collected."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for k, v in attrs:
            if k == "id":
                self.ids.append(v)
            if k in ("src", "href"):
                self.links.append(v)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check(page):
    parser = Checker()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_text(mlp_report):
    text = str(mlp_report)
    assert max(map(len, text.splitlines())) <= 100
    pieces = ("MLP", "grape", "critical path", "GrAPE 2026 eq. 21", "fc1", "feedback maps", "P = ∞")
    for piece in pieces:
        assert piece in text


def test_html_is_whole_and_self_contained(mlp_report):
    page = mlp_report.html()
    parser = check(page)
    assert parser.links == [] and len(parser.ids) == len(set(parser.ids))
    assert "http" not in page.replace("http-equiv", "")
    text = " ".join(parser.text)
    for piece in ("What waits for what", "Schedule", "Feedback maps", "fc1", "independent"):
        assert piece in text
    assert "prefers-color-scheme: dark" in page and "viewport" in page
    # one Gantt chart for each method and number of workers
    assert page.count('class="gantt"') == 3 * 5


def test_html_escapes_names(mlp_report):
    nasty = '<script>alert("x")</script>'
    layer = mlp_report.methods[2].feedback[0]
    method = replace(mlp_report.methods[2], feedback=(replace(layer, layer=nasty),))
    page = replace(mlp_report, model=nasty, methods=(*mlp_report.methods[:2], method)).html()
    assert nasty not in page
    check(page)


def test_html_of_bp_alone(mlp_report):
    check(replace(mlp_report, methods=mlp_report.methods[:1]).html())


def test_notebook(mlp_report):
    assert mlp_report._repr_html_().startswith("<iframe srcdoc=")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (units.flops(0), "0 FLOP"),
        (units.flops(1234567), "1.23 MFLOP"),
        (units.flops(999_999), "1 MFLOP"),
        (units.size(1024), "1 KiB"),
        (units.size(1536), "1.5 KiB"),
        (units.seconds(0.00123), "1.23 ms"),
        (units.seconds(0), "0"),
        (units.count(25_600_000), "25.6 M"),
        (units.ratio(None), "-"),
        (units.percent(0.0127), "1.27 %"),
        (units.workers(None), "∞"),
    ],
)
def test_units(text, want):
    assert text == want


def test_dot(mlp_methods, tmp_path):
    dag = build_dag(mlp_methods["grape"].graphs["align"])
    nodes = dot_source(dag, "grape")
    assert nodes.source.count("subgraph cluster_") == 5 and "penwidth=2.5" in nodes.source
    layers = dot_source(dag, "grape", collapse=True)
    assert len(layers.source) < len(nodes.source)
    written = write_graph(layers, tmp_path / "g.dot", "dot")
    assert re.match(r"digraph", written.read_text())


def test_dot_missing_still_writes_the_source(mlp_methods, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    graph = dot_source(build_dag(mlp_methods["dfa"].graphs["update"]), "dfa")
    with pytest.raises(DotMissingError, match="apt install graphviz"):
        write_graph(graph, tmp_path / "g.svg", "svg")
    assert (tmp_path / "g.dot").read_text().startswith("digraph")
