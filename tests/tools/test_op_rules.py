"""The table of operators: verdicts, and that a wrong rule is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grapefx.passes.differentiate.rules import rules

pytest.importorskip("expecttest", reason="torch's operator samples import it")
from tools import op_rules

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("addmm", "rule"),
        ("linalg.eigh", "derived"),
        ("index_reduce.prod", "unsupported"),
        ("corrcoef", "untraced"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_verdicts(name: str, verdict: str) -> None:
    row = op_rules.examine(name, timeout=60)
    assert row["verdict"] == verdict, row
    assert row["samples"] == (row["of"] if verdict in ("rule", "derived") else 0)


@pytest.mark.filterwarnings("ignore")
def test_what_is_partly_refused_says_so() -> None:
    row = op_rules.examine("nn.functional.embedding_bag", timeout=60)
    assert row["refused"] and row["samples"] and "mode" in row["note"]


@pytest.mark.filterwarnings("ignore")
def test_what_is_partly_untraced_says_so() -> None:
    row = op_rules.examine("tensor_split", timeout=60)
    assert row["untraced"] and row["samples"] + row["untraced"] == row["of"]
    assert row["note"].startswith("GuardOnDataDependentSymNode: ")
    assert f", {row['untraced']} untraced |" in op_rules.document([row | {"torch": "0"}])


def test_what_torch_cannot_differentiate_has_no_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> Any:
        raise RuntimeError("\nno derivative")

    monkeypatch.setattr(op_rules.oracle, "check", refuses)
    row = op_rules.examine("exp", timeout=60)
    assert row["verdict"] == "no oracle"
    assert row["note"] == "sample 0: RuntimeError: no derivative"


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(em: Any, node: Any) -> Any:
        return em.t(node.args[0])

    monkeypatch.setitem(rules(), aten.exp.default, wrong)
    row = op_rules.examine("exp", timeout=60)
    assert row["verdict"] == "wrong"
    assert "| exp | wrong |" in op_rules.document([row | {"torch": "0"}])
