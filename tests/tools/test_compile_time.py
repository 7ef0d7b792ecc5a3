"""Compile times: every part of every sort of network, the table, and that of the benchmark."""

from __future__ import annotations

import pytest
from torch import nn

import bench_step
import compile_time
from bench_models import MODELS, VARIANTS, benchmark


@pytest.mark.filterwarnings("ignore:calib_every")
@pytest.mark.parametrize(
    ("name", "variant", "parts"),
    [
        ("depth2", "compiled", set()),
        ("tiny", "bp", {"plan", "nodes"}),
        ("depth2", "grape 1/8", {"plan", "nodes", "calibration"}),
    ],
)
def test_parts(name: str, variant: str, parts: set[str]) -> None:
    row = compile_time.measure(name, variant, batch=8, kernels=False)
    assert {k for k, v in row.items() if v} == {"first", "processor"} | parts


def test_networks() -> None:
    assert benchmark("mlp8x1024") is MODELS["mlp8x1024"]
    layers = [m for m in benchmark("depth12").build() if isinstance(m, nn.Linear)]
    assert len(layers) == 13 and layers[0].in_features == 64
    pytest.importorskip("torchvision")
    assert benchmark("squeezenet1_1").build()(benchmark("squeezenet1_1").example(2)[0]).ndim == 2
    with pytest.raises(ValueError, match="nothing"):
        benchmark("nothing").build()


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def found(name: str, variant: str, batch: int, **how: bool) -> compile_time.Row:
        asked.append((name, variant, batch, how))
        part = None if variant == "compiled" else 2.0
        return {"plan": part, "first": 3.0, "calibration": part, "processor": 1.0, "nodes": part}

    monkeypatch.setattr(compile_time, "compile_seconds", found)
    argv = ["--depths", "3", "--variants", "compiled", "grape", "--no-kernels", "--batch", "4"]
    assert compile_time.main(argv) == 0
    how = {"workers": False, "kernels": False}
    assert asked == [("depth3", v, 4, how) for v in ("compiled", "grape")]
    text = capsys.readouterr().out
    assert "| depth3 | compiled |  | 3.0 |  | 1.0 |  |" in text
    assert "| depth3 | grape | 2.0 | 3.0 | 2.0 | 1.0 | 2.0 |" in text


def test_the_benchmark_shows_both_steps() -> None:
    row = {
        "model": "tiny", "batch": 8, "ratio": 1.0, "low": 1.0, "high": 1.0, "floor": None,
        **dict.fromkeys(("step_ms", "forward_ms", "update_ms", "calibration_ms"), 1.0),
    }  # fmt: skip
    times = {"calibration": 2.0, "first": 3.0, "plan": 1.0}
    rows = [row | {"variant": v, "compile_s": times} for v in VARIANTS]
    rows.append(row | {"variant": "bp", "compile_s": {"first": 4.0, "calibration": None}})
    lines = bench_step.table([*rows, row | {"variant": "eager"}]).splitlines()
    assert lines[2].endswith("| 3.0 + 2.0 |")
    assert lines[-2].endswith("| 4.0 |") and lines[-1].endswith("| - |")
