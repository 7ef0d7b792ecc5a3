"""What the commands share: results files, tables, timing, the training loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import grapefx
from tools.common import results
from tools.common.table import Table, fixed
from tools.common.timing import interleaved, median_ms, ratios, seconds
from tools.common.train import Training, adam, whole_batches


def test_a_torn_line_costs_itself_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder/rows.jsonl"

    def name(row: results.Row) -> Any:
        return row["name"]

    assert results.latest(path, name) == {}
    for row in ({"name": "a", "x": 1}, {"name": "b"}, {"name": "a", "x": 2}):
        results.append(path, row)
    assert results.latest(path, name) == {"a": {"name": "a", "x": 2}, "b": {"name": "b"}}
    assert not capsys.readouterr().err
    path.write_text(path.read_text()[:-5])
    results.append(path, {"name": "c"})
    assert list(results.latest(path, name)) == ["a", "b", "c"]
    assert results.latest(path, name)["a"]["x"] == 1
    assert "damaged" in capsys.readouterr().err
    assert json.loads(path.read_text().splitlines()[-1]) == {"name": "c"}


def test_a_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    results.write(path, "old")
    with pytest.raises(KeyboardInterrupt), results.replaced(path) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    results.write(path, "new")
    assert path.read_text() == "new"


def test_a_table() -> None:
    table = Table("network", "ms:")
    rows = [("mlp", fixed(1.234, 1)), ("cnn", fixed(None, 1)), ("lenet",)]
    assert table.markdown(rows).splitlines() == [
        "| network | ms |", "| --- | ---: |", "| mlp | 1.2 |", "| cnn | - |", "| lenet |  |",
    ]  # fmt: skip
    assert table.text(rows[:2]).splitlines() == [
        "network   ms", "-------  ---", "mlp      1.2", "cnn        -",
    ]  # fmt: skip


def test_measurements_take_turns() -> None:
    calls: list[str] = []

    def measure(name: str) -> int:
        calls.append(name)
        return len(calls)

    found = interleaved({k: lambda k=k: measure(k) for k in "abc"}, rounds=5, warm_up=2)
    assert len(calls) == 21 and all({*calls[i : i + 3]} == {*"abc"} for i in range(0, 21, 3))
    assert all(len(f) == 5 and min(f) > 6 for f in found.values())
    assert ratios([1.0, 3.0, 8.0], [1.0, 1.0, 2.0]) == (1.0, 3.0, 4.0)
    assert median_ms([0.5, 0.001, 0.002]) == pytest.approx(2.0)
    assert seconds(lambda: None, iter([1.0, 3.5]).__next__) == 2.5


@pytest.mark.parametrize("compiled", [False, True])
def test_the_training_loop_is_the_plain_one(compiled: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 5), torch.randint(0, 3, (12,))
    plain, model = (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    net = grapefx.compile(model, method="bp", backend="eager") if compiled else model
    batches = whole_batches(12, 5, torch.Generator().manual_seed(0))
    assert [len(b) for b in batches] == [5, 5]
    found = Training(model, net, *adam(model, 0.1, 2)).train((x[b], y[b]) for b in batches)
    opt = torch.optim.Adam(plain.parameters(), 0.1, fused=True)
    losses = []
    for rate, batch in zip((0.1, 0.05), batches, strict=True):
        opt.param_groups[0]["lr"] = rate
        losses.append(F.cross_entropy(plain(x[batch]), y[batch]))
        losses[-1].backward()
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(found, torch.stack(losses).mean())
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)
