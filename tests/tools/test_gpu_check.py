"""The GPU check on a CPU: its whole path on tiny networks; errors are rows; time runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tools import gpu_check
from tools.bench.models import SMALL, Benchmark
from tools.common import results
from tools.gpu.page import best, page, verdicts
from tools.gpu_check import Case

SMOKE = ["--device", "cpu", "--smoke", "--rounds", "1", "--inner", "1", "--seconds", "90000"]


def test_without_cuda_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(["--device", "cpu"])
    assert caught.value.code == 2


def test_smoke_goes_through_everything_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    assert gpu_check.main([*SMOKE, "--out", str(out)]) == 0
    kept = results.latest(out.with_suffix(".jsonl"), lambda r: r["key"])
    assert all(r["ok"] for r in kept.values())
    assert {r["section"] for r in kept.values()} == {"parity", "transformer8", "mlp"}
    text = out.read_text()
    assert "Parity: 2 of 2 comparisons hold." in text and "## tokens, batch 4" in text
    assert kept["tokens/4/dfa, auto"]["chose"] in ("off", "horizontal")
    # nothing is left to do: nothing is built
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "build", lambda *_: pytest.fail("built again"))
        patch.setattr(gpu_check, "parity", lambda _: iter(()))
        assert gpu_check.main([*SMOKE, "--out", str(out)]) == 0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One network, two variants; one comparison that fails and one that breaks."""
    monkeypatch.setattr(
        gpu_check, "cases", lambda _: [Case("mlp", "mlp", 4, ("eager", "dfa, off"))]
    )

    def broken() -> float:
        raise RuntimeError("CUDA error: out of luck\nmore")

    monkeypatch.setattr(
        gpu_check, "parity", lambda _: iter([("a", lambda: 0.5, 1e-8), ("b", broken, 1e-8)])
    )


@pytest.mark.usefixtures("small")
def test_what_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = gpu_check.build

    def some(run: Any, case: Case, variant: str) -> Any:
        if variant != "eager":
            raise ValueError("cannot compile this")
        return build(run, case, variant)

    monkeypatch.setattr(gpu_check, "build", some)
    out = tmp_path / "gpu.md"
    assert gpu_check.main([*SMOKE, "--out", str(out)]) == 1
    text = out.read_text()
    assert "Parity: 0 of 2 comparisons hold." in text and "- a: 0.5" in text
    assert "- b: RuntimeError: CUDA error: out of luck" in text
    assert "| dfa, off |  |  |  |  |  | ValueError: cannot compile this |" in text
    assert "| eager | " in text


@pytest.mark.usefixtures("small")
def test_a_step_that_breaks_later_is_a_row_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            assert self.calls < 8, "late"
            return x.flatten(1)[:, :10] * self.w

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(10))

    monkeypatch.setitem(gpu_check.SMOKE, "mlp", Benchmark(Breaks, SMALL))
    monkeypatch.setattr(gpu_check, "cases", lambda _: [Case("mlp", "mlp", 4, ("eager",))])
    out = tmp_path / "gpu.md"
    assert gpu_check.main([*SMOKE, "--out", str(out)]) == 1
    assert "| eager |  |  |  |  |  | AssertionError: late |" in out.read_text()


@pytest.mark.usefixtures("small")
def test_when_time_runs_out_rows_say_so(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    assert gpu_check.main([*SMOKE, "--seconds", "10", "--out", str(out)]) == 1
    assert out.read_text().count("not reached: the time ran out") == 2


def test_targets() -> None:
    def row(step: float, update: float = 1.0) -> dict[str, Any]:
        return {"ok": True, "section": "x", "step_ms": step, "update_ms": update, "compile_s": 1}

    rows = {
        "transformer8-micro/8/eager": row(9.0),
        "transformer8-micro/8/compiled + CUDA graphs": row(2.0),
        "transformer8-micro/8/dfa, off": row(5.0),
        "transformer8-micro/8/dfa, auto": row(1.6),
        "transformer2-micro/8/dfa, auto": row(1.0, 1.0),
        "transformer16-micro/8/dfa, auto": row(1.0, 1.4),
    }
    assert best(rows, "transformer8-micro/8", "dfa", "step_ms") == 1.6
    text = "\n".join(verdicts(rows))
    assert "0.18 of eager BP (target 0.33): met" in text
    assert "0.80 of compiled + CUDA graphs BP (target 0.75): missed" in text
    assert "grows by 1.40 from depth 2 to 16 (target below 1.5): met" in text
    assert text in page(rows, "somewhere")
    assert verdicts({}) == []


def test_what_is_not_finite_or_missing_is_infinitely_far() -> None:
    """``max`` would pass over a NaN, and a broken kernel would count as right."""
    one, nan = torch.ones(2), torch.full((2,), float("nan"))
    assert gpu_check.difference([one, None, 3], [one, None, 4]) == 0.0
    assert gpu_check.difference([one, 1.5 * one], [one, one]) == pytest.approx(0.5)
    for mine, theirs in (([one, nan], [one, one]), ([one, one], [nan, one]), ([one], [None])):
        assert gpu_check.difference(mine, theirs) == float("inf")
