"""The experiment runner: what it keeps, what it does again, what it prints."""

import json
from pathlib import Path
from typing import Any

import pytest

import experiments
from load_data import load_images

ARGS = ["--data-dir", "anything", "--backend", "eager", "--depth", "3", "--width", "8"]
ARGS += ["--images", "256", "--epochs", "1", "--seeds", "0", "--only", "dfa", "grape, calibrated"]


@pytest.fixture(autouse=True)
def bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled subset stands for full MNIST."""
    monkeypatch.setattr(experiments, "load_images", lambda *_: load_images())


def cells(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cells.jsonl"
    assert experiments.main([*ARGS, "--out", str(out)]) == 0
    first = cells(out)
    assert [c["variant"] for c in first] == ["dfa", "grape, calibrated"]
    assert all(0 < c["accuracy"] <= 100 and len(c["alignment"]) <= 2 for c in first)
    capsys.readouterr()
    # a kill tore the last line: that cell alone is done again, with the same result
    out.write_text(json.dumps(first[0]) + "\n" + json.dumps(first[1])[:40])
    assert experiments.main([*ARGS, "--out", str(out)]) == 0
    text = capsys.readouterr()
    assert "[1/1] grape, calibrated" in text.out and "damaged" in text.err
    again = experiments.read(out)
    assert [c["accuracy"] for c in again] == [c["accuracy"] for c in first]


def test_unknown_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cells.jsonl"
    assert experiments.main(["--data-dir", "x", "--only", "nothing", "--out", str(out)]) == 2
    assert "no variant 'nothing'" in capsys.readouterr().err and not out.exists()


def test_table_takes_one_setting_and_one_cell_a_seed(tmp_path: Path) -> None:
    where = experiments.setting(experiments.parse_args([]))

    def cell(seed: int, accuracy: float, **changes: Any) -> dict[str, Any]:
        base = {"variant": "dfa", "options": {"calib_every": None}, "seed": seed}
        return base | {"accuracy": accuracy, "setting": where, "machine": "m"} | changes

    found = [cell(0, 80.0), cell(1, 84.0), cell(1, 86.0), cell(2, 10.0, setting={"depth": 3})]
    rows = [r for r in experiments.table(found, where).splitlines() if r.startswith("| dfa")]
    assert len(rows) == 1 and "83.00 | 4.24 | 2 |" in rows[0]


def test_a_table_names_the_command_of_its_setting() -> None:
    plain = experiments.setting(experiments.parse_args([]))
    assert experiments.command(plain) == "python tools/experiments.py --data-dir DIR --table FILE"
    deep = experiments.setting(experiments.parse_args(["--depth", "32", "--lr", "1e-4"]))
    assert "--depth 32 --lr 0.0001 --table" in experiments.table([], deep)
    given = experiments.command(deep).split()[2:]
    assert experiments.setting(experiments.parse_args(given)) == deep
