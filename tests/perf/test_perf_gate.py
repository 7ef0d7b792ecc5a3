"""The gate: planted regressions are caught and named; noise is not; the files are what they say."""

from __future__ import annotations

import copy
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor

from grapefx.methods.base import Rows
from grapefx.methods.dfa import DFA
from tools.perf import history, perf_gate, perf_measure
from tools.perf.perf_gate import Change, compare
from tools.perf.perf_measure import Figures, Form, measure

DFA_FORM = {"dfa": Form("dfa", "update")}


@pytest.fixture(scope="module")
def before() -> Figures:
    """The present figures of one small model."""
    measure(["mlp"], DFA_FORM, kernels=False)  # process-wide caches
    return measure(["mlp"], DFA_FORM)


def changes(before: Figures, method: Any = "dfa") -> dict[str, Change]:
    """What the gate says now, by "kind figure"."""
    found = compare(before, measure(["mlp"], {"dfa": Form(method, "update")}))
    return {f"{c.where.removeprefix('mlp/dfa').lstrip('/')} {c.figure}".strip(): c for c in found}


@dataclass(frozen=True)
class ExtraProduct(DFA):
    """Projects the error twice."""

    name: ClassVar[str] = "dfa"

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.error is not None
        return 0.5 * (super().cotangent(rows) + (2 * rows.error) @ rows.state["B"])


@dataclass(frozen=True)
class Leak(DFA):
    """Lets a little of the gradient from above through the cut."""

    name: ClassVar[str] = "dfa"
    reads: ClassVar[frozenset[str]] = frozenset({"error", "next_delta"})

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.incoming is not None
        return super().cotangent(rows) + 1e-3 * rows.incoming


def test_nothing_changed(before: Figures) -> None:
    assert changes(before) == {}


def test_an_extra_product_is_named(before: Figures) -> None:
    found = changes(before, ExtraProduct())
    assert found["update flops"].worse
    assert any("mm" in name and c.worse for name, c in found.items() if "nodes" in name)


def test_a_leaking_cut_is_named(before: Figures) -> None:
    found = changes(before, Leak())
    path = found["update critical_path_flops"]
    # the chain is back: the path grows by the input gradients, not by a rounding
    assert path.worse and path.after is not None and path.before is not None
    assert path.after > 1.2 * path.before


def test_a_lost_fusion_is_named(before: Figures) -> None:
    alone = mock.patch("torch._inductor.scheduler.Scheduler.can_fuse", lambda *_, **__: False)
    with alone, torch._inductor.config.patch(realize_opcount_threshold=0):
        found = changes(before)
    assert found["update kernels"].worse
    assert "update flops" not in found


def test_a_saved_value_too_many_is_named() -> None:
    """Splitting before Inductor's decompositions saves pooling indices of eight bytes, not one."""
    before = measure(["cnn"], DFA_FORM, kernels=False)
    prepare = perf_measure.prepare

    def early(step: Any, kind: str, backend: str, context: Any) -> Any:
        return prepare(step, kind, "eager", context)

    with mock.patch.object(perf_measure, "prepare", early):
        found = compare(before, measure(["cnn"], DFA_FORM, kernels=False))
    named = {f"{c.where} {c.figure}": c for c in found}
    assert named["cnn/dfa/update saved_bytes"].worse


def test_a_slower_pass_is_named(before: Figures) -> None:
    after = copy.deepcopy(before)
    after["mlp/dfa"]["pass_calls"] = int(1.04 * before["mlp/dfa"]["pass_calls"])
    assert compare(before, after) == []
    after["mlp/dfa"]["pass_calls"] = int(1.2 * before["mlp/dfa"]["pass_calls"])
    (change,) = compare(before, after)
    assert change.figure == "pass_calls" and change.worse


@pytest.fixture
def recorded(tmp_path: Path, before: Figures, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An expected file; measuring gives whatever ``recorded`` holds."""
    monkeypatch.setattr(perf_gate, "measure", lambda *_: copy.deepcopy(before))
    assert perf_gate.main(["--expected", str(tmp_path), "--accept"]) == 0
    return perf_gate.expected_path(tmp_path)


def test_the_gate_fails_on_improvements_too(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--expected", str(tmp_path)]
    assert perf_gate.main(args) == 0
    kept = json.loads(recorded.read_text())
    kept["figures"]["mlp/dfa/update"]["flops"] += 100
    recorded.write_text(json.dumps(kept))
    table, new = tmp_path / "table.md", tmp_path / "new.json"
    assert perf_gate.main([*args, "--markdown", str(table), "--replacement", str(new)]) == 1
    assert "better  mlp/dfa/update" in capsys.readouterr().out
    assert "| better | mlp/dfa/update | `flops` |" in table.read_text()
    recorded.write_text(new.read_text())
    assert perf_gate.main(args) == 0
    assert perf_gate.main([*args, "--accept"]) == 0


def test_a_torch_without_figures_compares_nothing(
    tmp_path: Path, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert perf_gate.main(["--expected", str(tmp_path / "none")]) == 0
    assert "nothing to compare" in capsys.readouterr().out


def test_accept_wants_every_model(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        perf_gate.main(["--expected", str(tmp_path), "--accept", "--models", "mlp"])
    assert caught.value.code == 2


def test_bootstrap_holds_the_median() -> None:
    mid, low, high = perf_gate.bootstrap([0.9, 1.0, 1.1] * 20)
    assert low <= mid <= high and mid == 1.0


def test_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / history.FOLDER
    folder.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    for flops in (10, 8):
        text = json.dumps({"figures": {"mlp/dfa/update": {"flops": flops}}})
        (folder / "torch-2.15.json").write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", "x"], check=True)
    out = tmp_path / "perf.png"
    assert history.main(["--root", str(tmp_path), "--out", str(out), "--figure", "flops"]) == 0
    assert [v["flops"] for _, v in history.history(tmp_path)] == [10, 8]
    assert out.stat().st_size > 1000


def test_peak_counts_views_once() -> None:
    """Peak of y = relu(x) (n bytes), z = y.T (a view), z + 1 (n bytes): 2 n."""

    def f(x: Tensor) -> Any:
        y = torch.ops.aten.relu.default(x)
        return torch.ops.aten.add.Tensor(torch.ops.aten.t.default(y), 1.0)

    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(f, tracing_mode="fake")(torch.zeros(4, 8))
    empty = make_fx(lambda x: x, tracing_mode="fake")(torch.zeros(1))
    assert perf_measure.peak(gm, empty, set()) == 2 * 4 * 8 * 4
