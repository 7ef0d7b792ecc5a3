"""docs/extending.md runs as it is printed, and docs/methods.md knows every method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from grapefx.methods import BUILTIN
from tests.zoo import train_step

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_new_method_of_the_docs_works() -> None:
    text = (DOCS / "extending.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    cls = code[code.index("@dataclass") : code.index("\n\n\nmodel =")]
    assert len(cls.strip().splitlines()) <= 40
    space: dict[str, Any] = {"__name__": "extending"}
    torch.manual_seed(0)
    exec(compile(code, "extending.md", "exec", dont_inherit=True), space)
    net, x = space["net"], space["x"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    before = net.feedback
    train_step(net, (x,))
    for key, b in net.feedback.items():
        assert 0.3 < float((b != 0).float().mean()) < 0.7
        assert not torch.equal(b, before[key])
        assert torch.equal(b != 0, before[key] != 0)
    assert "cos_jacobian" in net.alignment()["0"]


def test_every_method_has_its_rows() -> None:
    text = (DOCS / "methods.md").read_text()
    for name in BUILTIN:
        assert text.count(f"`{name}`") >= 2, name
    for name, cls in BUILTIN.items():
        for option, value in cls.paper.items():
            shown = f'{option}="{value}"' if isinstance(value, str) else f"{option}={value}"
            assert f"`{shown}`" in text, (name, shown)
