"""docs/extending.md runs as it is printed, and docs/methods.md knows every method."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import grapefx
from grapefx.errors import MethodError
from grapefx.methods import BUILTIN, Method, Rows, State
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


@dataclass(frozen=True)
class _Undeclared(Method):
    name: ClassVar[str] = "undeclared"
    reads: ClassVar[frozenset[str]] = frozenset({"error"})

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        return {"B": torch.ones(shape, dtype=dtype, device=generator.device)}

    def cotangent(self, rows: Rows) -> Tensor:
        return rows.error @ rows.state["B"] + rows.value  # type: ignore[operator]


@dataclass(frozen=True)
class _Shrinks(_Undeclared):
    name: ClassVar[str] = "shrinks"
    learns_from: ClassVar[frozenset[str]] = frozenset({"tangent"})

    def cotangent(self, rows: Rows) -> Tensor:
        return rows.error @ rows.state["B"]  # type: ignore[operator]

    def learn(self, rows: Rows) -> State:
        return {"B": rows.state["B"][:1]}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (_Undeclared(), r"cotangent of method 'undeclared' fails at layer '0'(.|\n)*\['error'\]"),
        (_Shrinks(), r"learn of method 'shrinks'(.|\n)*state of \{'B': \(3, 8\)\}"),
    ],
)
def test_mistakes_of_an_author_are_named(method: Method, message: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    net = grapefx.compile(model, method=method, backend="eager", calib_every=None)
    with pytest.raises(MethodError, match=message):
        net(torch.randn(5, 4)).sum().backward()
