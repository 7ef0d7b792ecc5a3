"""The race between backpropagation and the others, on a small network."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tools.bench import time_to_accuracy
from tools.bench.time_to_accuracy import Runner, Variant, main, table


def test_a_short_race(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    variants = {
        "compiled": Variant(),
        "smaller": Variant(batch=0.75),
        "largest": Variant(keep=0.5),
        "grape": Variant({"method": "grape", "backend": "eager"}),
    }
    monkeypatch.setattr(time_to_accuracy, "VARIANTS", variants)
    assert main(["--model", "tiny", "--epochs", "1", "--parts", "0.5"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in found[1:]][2:] == list(variants)


def test_who_never_arrives_has_no_time() -> None:
    def runner(*curve: tuple[float, float]) -> Runner:
        made = Runner.__new__(Runner)
        made.seconds, made.curve = curve[-1][0], list(curve)
        return made

    rows = table({"compiled": runner((2.0, 90.0)), "dfa": runner((1.0, 50.0))}, [0.95])
    assert "| compiled | 2.00 | 1.00 | 2.0 | 90.00 |" in rows
    assert "| dfa | never | - | 1.0 | 50.00 |" in rows
