"""The coverage tool: what works, what does not and why, going on after a kill, the page."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tools.coverage import __main__ as tool
from tools.coverage import stages

Sample = tool.Sample


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if x.sum() > 0 else self.a(x)


def _good() -> Any:
    return Sample(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), (torch.randn(3, 4),))


def _bad() -> Any:
    return Sample(_Branches(), (torch.randn(3, 4),))


def _dead() -> Any:
    raise SystemExit(3)


# the tool forks, which torch refuses where another test has run a backward
alone = pytest.mark.skipif(
    os.environ.get("GRAPEFX_TEST_ALONE") != "1", reason="test_in_a_process_of_its_own runs it"
)


def test_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"GRAPEFX_TEST_ALONE": "1"}
    for k in ("PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        env.pop(k, None)
    done = subprocess.run(
        [*command, "-k", "results or hang"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    zoo = {"good": _good, "bad": _bad, "dead": _dead}
    monkeypatch.setattr(tool, "ZOOS", {"tiny": lambda: zoo})
    monkeypatch.setattr(tool, "warm_up", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    places = ["--jsonl", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "c.md")]
    return lambda *more: tool.main([*places, *more])


@alone
def test_results_reasons_and_going_on(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--zoo", "tiny", "--table") == 0
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    rows = {r["name"]: r for r in map(json.loads, lines)}
    good = rows["good"]
    assert good["ok"] and good["bp_error"] <= 1e-6 and good["tangent"] == "forward AD"
    assert good["points"] == 1 and good["nodes"] > 5 and good["rss_mib"] > 50
    assert not rows["bad"]["ok"]
    assert rows["bad"]["reason"].startswith("capture: CaptureError: the model cannot be captured")
    assert rows["dead"]["reason"].startswith("build: SystemExit")
    page = (tmp_path / "c.md").read_text()
    assert "| tiny | 3 | 1 | 33 % |" in page and "`bad`: capture: CaptureError" in page
    assert "| good | yes | train |" in page
    # a kill tore the last line: that model alone runs again
    (tmp_path / "c.jsonl").write_text("\n".join([*lines[:2], lines[2][:30]]) + "\n")
    capsys.readouterr()
    assert run("--zoo", "tiny") == 0
    text = capsys.readouterr()
    assert "1 models of tiny to run" in text.out and "damaged" in text.err
    assert run("--zoo", "tiny", "--only", "nothing") == 2


@alone
def test_a_hang_is_a_result(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tool, "ZOOS", {"tiny": lambda: {"hangs": lambda: __import__("time").sleep(60)}}
    )
    assert run("--zoo", "tiny", "--timeout", "0.5") == 0
    row = json.loads((tmp_path / "c.jsonl").read_text())
    assert row["reason"] == "build: no result within 0 s" and not row["ok"]


def test_a_wrong_gradient_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = {"w": torch.ones(3, dtype=torch.float64), "zero": torch.full((3,), 1e-17).double()}
    noise = {"w": eager["w"] * (1 + 1e-9), "zero": -eager["zero"]}
    assert stages.relative_error(eager, noise)[0] < 1e-6  # rounding in a gradient of zero is none
    assert stages.relative_error(eager, {"w": eager["w"] * 1.01, "zero": eager["zero"]})[0] > 1e-3
    assert stages.relative_error(eager, {"w": None, "zero": None})[0] == float("inf")
    assert stages.relative_error(eager, {"w": eager["w"] * float("nan"), "zero": None})[0] != 0


def test_compiled_steps_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(stages.COMPILED, "grape")  # as on half, without what half needs
    *_, (last, found) = stages.examine_compiled(_good(), 0)
    assert last == "done" and found["grape on half error"] <= 1e-6
    grow = itertools.count()
    monkeypatch.setattr(stages, "_taken", lambda model: {"w": torch.ones(1) + next(grow)})
    with pytest.raises(stages.Mismatch, match="gradient of w"):
        list(stages.examine_compiled(_good(), 0))


def test_repeats_can_be_left_out() -> None:
    block = [nn.Linear(4, 4) for _ in range(5)]
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(*block), nn.Linear(4, 2))
    note = stages.cut(model, 2, lambda: model(torch.randn(2, 3)))
    assert note == "without 3 repeated blocks" and len(model[1]) == 2
