"""The reproduction of tables: what it refuses, how it goes on after a kill, what its table says."""

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.test_reproduce_config import SMALL
from tools.common.data import load_images
from tools.reproduce import __main__ as reproduce
from tools.reproduce import data
from tools.reproduce.config import load_config
from tools.reproduce.data import load_data
from tools.reproduce.trainer import Trainer


class Killed(Exception):
    """Stands for a kill."""


@pytest.fixture(autouse=True)
def bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled subset stands for every image set."""
    monkeypatch.setattr(data, "load_images", lambda *_: load_images())


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def call(config: Path, tmp_path: Path, *more: str, runs: str = "runs") -> int:
    where = ["--runs", str(tmp_path / runs), "--results", str(tmp_path / "docs")]
    return reproduce.main([str(config), "--backend", "eager", "--seeds", "0", *where, *more])


def cells(tmp_path: Path, runs: str = "runs") -> dict[str, dict[str, Any]]:
    text = (tmp_path / runs / "small" / "results.jsonl").read_text()
    return {c["row"]: c for c in map(json.loads, text.splitlines())}


def test_the_loss_of_a_row(small: Path, tmp_path: Path) -> None:
    """Sigmoid outputs and BCE, as DRTP's authors train."""
    row = "  own: {method: bp, options: {calib_every: null}, loss: bce}\n"
    small.write_text(SMALL.replace("epochs: 3", "epochs: 1") + row)
    assert call(small, tmp_path, "--only", "own", "bp") == 0
    first = {name: cell["curve"][0]["loss"] for name, cell in cells(tmp_path).items()}
    assert first["own"] < 1.0 < first["bp"]  # about log 2 a class; about log 10


def test_whole_epochs_of_bp(small: Path) -> None:
    """After each second epoch one of exact gradients: four calibration steps more, by their SGD."""
    options = "{calib_every: null, calib_update: sgd}"
    row = f"  own: {{method: dfa, options: {options}, bp_epoch_every: 2}}\n"
    small.write_text(SMALL + row)
    config = load_config(small)
    found = load_data({**config.setting, "train": 256, "test": 100}, None, "cpu")
    trainer = Trainer(config.rows["own"], 0, found, "eager", "cpu")
    counts = []
    for _ in range(4):
        trainer.train_epoch()
        schedule = trainer.net._state.schedule
        counts.append((schedule.calibrations, schedule.step))
    assert counts == [(0, 4), (4, 12), (4, 16), (8, 24)]


def test_missing_data_folder(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data, "load_images", load_images)
    assert call(small, tmp_path, "--data-dir", str(tmp_path / "nowhere")) == 2
    assert "no such data folder" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "small" / "results.jsonl").exists()


def test_unknown_row(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(small, tmp_path, "--only", "fdaf") == 2
    assert "Did you mean 'fdfa'?" in capsys.readouterr().err


def test_a_killed_run_ends_as_one_that_was_not(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ("fdfa", "grape+calibration")
    save, weights = reproduce.Folder.save, {}

    def watch(tag: str, kill_after: int) -> None:
        def saved(self: Any, row: Any, seed: int, state: dict[str, Any]) -> None:
            save(self, row, seed, state)
            weights[tag, row.name] = {k: v.clone() for k, v in state["model"].items()}
            if len(state["curve"]) == kill_after:
                raise Killed

        monkeypatch.setattr(reproduce.Folder, "save", saved)

    watch("whole", 0)
    assert call(small, tmp_path, "--only", *rows, runs="whole") == 0
    watch("killed", 2)
    for row in rows:
        with pytest.raises(Killed):
            call(small, tmp_path, "--only", row, runs="killed")
    watch("killed", 0)
    assert call(small, tmp_path, "--only", *rows, runs="killed") == 0
    whole, killed = cells(tmp_path, "whole"), cells(tmp_path, "killed")
    for row in rows:
        a, b = weights["whole", row], weights["killed", row]
        assert all(torch.equal(a[k], b[k]) for k in a), row
        scores = [[(c["score"], c["cosine"]) for c in run[row]["curve"]] for run in (whole, killed)]
        assert scores[0] == scores[1] and len(scores[0]) == 3, row
    assert not list((tmp_path / "killed").rglob("*.pt"))


def test_a_torn_line_is_done_again_and_finished_cells_are_not(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(small, tmp_path, "--only", "bp", "dfa") == 0
    results = tmp_path / "runs" / "small" / "results.jsonl"
    first = results.read_text()
    results.write_text(first[:-40])
    assert call(small, tmp_path, "--only", "bp", "dfa") == 0
    out = capsys.readouterr().out
    assert "[1/1] dfa" in out.split("[2/2]")[-1]
    lines = results.read_text().splitlines()
    assert lines[0] == first.splitlines()[0] and json.loads(lines[2])["row"] == "dfa"


def test_a_cell_of_another_process_is_left_alone(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    with (folder / "bp-0.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert call(small, tmp_path, "--only", "bp") == 0
    assert "another process" in capsys.readouterr().out and not (folder / "results.jsonl").exists()


@pytest.mark.parametrize("old, new", [("lr: 1.0e-3", "lr: 1.0e-2"), ("adam, calib", "ema, calib")])
def test_results_of_another_config_are_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    assert call(small, tmp_path, "--only", "fdfa", "--set", "epochs=1") == 0
    (tmp_path / "runs" / "small").mkdir()
    done = next((tmp_path / "runs").rglob("results.jsonl"))
    cell = json.loads(done.read_text()) | {"config": load_config(small).hash}
    results = tmp_path / "runs" / "small" / "results.jsonl"
    results.write_text(json.dumps(cell) + "\n")
    before = results.read_bytes()
    small.write_text(SMALL.replace(old, new))
    for more in ([], ["--table"]):
        assert call(small, tmp_path, *more) == 2
        assert "of another config" in capsys.readouterr().err
    assert results.read_bytes() == before and not (tmp_path / "docs" / "small.md").exists()


def test_the_table(small: Path, tmp_path: Path) -> None:
    assert call(small, tmp_path, "--only", "bp", "fdfa", "pepita", "--set", "epochs=1") == 0
    assert call(small, tmp_path, "--table", "--set", "epochs=1") == 0
    text = (tmp_path / "docs" / "small+epochs=1.md").read_text()
    verdicts = text.partition("Cosine between")[0]
    rows = {line.split("|")[1].strip(): line for line in verdicts.splitlines() if line[:1] == "|"}
    assert "50.00 ± 0.10" in rows["bp"] and "fail" in rows["bp"] and "(n = 1)" in rows["bp"]
    assert "pass" in rows["fdfa"] and "not published" in rows["drtp"]
    assert "not defined here" in rows["pepita"]  # batch norm has parameters
    assert "not run" in rows["grape+calibration"] and "ours" in rows["grape+calibration"]
    assert "it is small" in text and "torch" in text and "--set epochs=1" in text


def test_a_table_keeps_its_cells(small: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"

    def kept() -> list[tuple[str, int]]:
        lines = (docs / "small.jsonl").read_text().splitlines()
        return [(c["row"], c["seed"]) for c in map(json.loads, lines)]

    assert call(small, tmp_path, "--only", "dfa") == call(small, tmp_path, "--table") == 0
    assert kept() == [("dfa", 0)]
    page = (docs / "small.md").read_text()
    first = (docs / "small.jsonl").read_bytes()
    assert call(small, tmp_path, "--table", runs="lost") == 0  # nothing trained there
    assert (docs / "small.md").read_text() == page and (docs / "small.jsonl").read_bytes() == first
    # kept cells are no reason not to train, and what was trained later is shown
    assert call(small, tmp_path, "--only", "bp", "dfa", runs="lost") == 0
    cell = cells(tmp_path, "lost")["dfa"] | {"last": 12.34}
    results = tmp_path / "lost" / "small" / "results.jsonl"
    results.write_text(results.read_text() + json.dumps(cell) + "\n")
    assert call(small, tmp_path, "--table", runs="lost") == 0
    assert kept() == [("bp", 0), ("dfa", 0)] and "12.34" in (docs / "small.md").read_text()
    small.write_text(SMALL.replace("lr: 1.0e-3", "lr: 1.0e-2"))
    before = (docs / "small.jsonl").read_bytes()
    assert call(small, tmp_path, "--table", runs="none") == 2
    assert (docs / "small.jsonl").read_bytes() == before
