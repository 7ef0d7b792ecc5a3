"""Every Python block of the README and the documentation runs, page by page from top to bottom.

Blocks of a page share their names. A page may prepare what it does not show in a comment::

    <!-- test-setup
    data = ...
    -->

and what cannot run in a test says why in a comment in front of the block, such as
``<!-- test: two processes -->``; such a block is only compiled.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grapefx

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^<!-- test-setup\n(?P<setup>.*?)^-->$"
    r"|(?:^<!-- test: (?P<reason>[^\n]*) -->\n+)?^```(?:python|py)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
REASONS = ("two processes",)
NEEDS = {"lightning": "lightning", "huggingface": "transformers", "integrations": "tensorboard"}


class Block(NamedTuple):
    """A piece of a page; ``line`` is where its code begins."""

    code: str
    line: int
    runs: bool


def blocks(page: Path) -> list[Block]:
    """The setups and blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        kind = "code" if match["setup"] is None else "setup"
        reason = match["reason"]
        assert reason is None or reason in REASONS, f"{page}: unknown reason {reason!r}"
        line = text.count("\n", 0, match.start(kind)) + 1
        found.append(Block(match[kind], line, reason is None))
    return found


def names() -> dict[str, Any]:
    """What any page may use without saying where it is from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    model.append(nn.Linear(32, 10))
    x, y = torch.randn(16, 20), torch.randint(10, (16,))
    net = grapefx.compile(model)
    return {
        "torch": torch, "F": F, "nn": nn, "grapefx": grapefx, "model": model, "x": x, "y": y,
        "loader": [(x, y)], "epochs": 2, "loss_fn": F.cross_entropy, "step": 0, "net": net,
        "optimizer": torch.optim.Adam(net.parameters()),
    }  # fmt: skip


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = NEEDS.get(page.stem)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    monkeypatch.chdir(tmp_path)
    # what is tested is what the page says; graphs are interpreted
    eager = functools.partial(grapefx.compile, backend="eager")
    monkeypatch.setattr(grapefx, "compile", eager)
    monkeypatch.setattr(os, "environ", {**os.environ, "ACCELERATE_USE_CPU": "true"})
    module = types.ModuleType("page")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "page", module)
    space = vars(module)
    space.update(names())
    for block in blocks(page):
        # errors name the page and the line in it
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if block.runs:
            exec(code, space)


def test_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n<!-- test-setup\na = 1\n-->\ntext\n```python\nb = a\n```\n"
        "<!-- test: two processes -->\n\n```python\nraise\n```\n```\nnot python\n```\n"
    )
    assert blocks(page) == [
        Block("a = 1\n", 3, True), Block("b = a\n", 7, True), Block("raise\n", 12, False),
    ]  # fmt: skip
    fences = sum(len(re.findall(r"^```(?:python|py)$", p.read_text(), re.MULTILINE)) for p in PAGES)
    shown = sum(p.read_text().count("<!-- test-setup") for p in PAGES)
    assert sum(len(blocks(p)) for p in PAGES) == fences + shown > 20
