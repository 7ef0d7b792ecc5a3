"""Golden outlines of the HTML page: its texts, tooltips, ids and classes, on three models.

``GRAPEFX_GOLDEN=write`` rewrites the files. Coordinates, order and white space are left out, and
the numbers of the compiled model, for torch's own graphs change from version to version.
"""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import grapefx
from grapefx.report import build_report

HERE = Path(__file__).parent / "golden"
KEPT = ("id", "class", "aria-label", "data-tip", "data-if-method", "data-if-workers", "hidden")


class Outline(HTMLParser):
    """What a reader, a style sheet or the page's script finds on it, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        self.found.add(f"tag {tag}")
        for name, value in attrs:
            if name in KEPT:
                self.found.add(f"{name} {' '.join((value or '').split())}".strip())

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        if text and self.tag not in ("style", "script"):
            self.found.add(f"text {text}")

    def handle_endtag(self, tag: str) -> None:
        self.tag = ""


def outline(page: str) -> str:
    parser = Outline()
    parser.feed(page)
    return "\n".join(sorted(parser.found)) + "\n"


def small_cnn():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )
    options = {"workers": (1, None), "calib_every": 1, "name": "CNN"}
    return grapefx.inspect(model, torch.zeros(4, 3, 8, 8), ["dfa", "grape"], **options)


@pytest.mark.parametrize("name", ["mlp", "leaky", "cnn"])
def test_outline(name, mlp_methods):
    if name == "cnn":
        report = small_cnn()
    else:
        chosen = ["bp", "dfa", "grape"] if name == "mlp" else ["bp", "leaky"]
        every = {"calib_every": 1, "steps_per_epoch": 50} if name == "mlp" else {"align_every": 2}
        methods = [mlp_methods[m] for m in chosen]
        report = build_report(methods, parameters=17290, batch=32, workers=(1, 2, None), **every)
    text = outline(report.html())
    if name == "cnn":
        text = "\n".join(sorted({re.sub(r"[\d.]*\d", "#", x) for x in text.splitlines()})) + "\n"
    file = HERE / f"{name}.txt"
    if os.environ.get("GRAPEFX_GOLDEN") == "write":
        HERE.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    want = file.read_text(encoding="utf-8")
    assert text == want, "the page changed; GRAPEFX_GOLDEN=write accepts it"
