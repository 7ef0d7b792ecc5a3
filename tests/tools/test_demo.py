"""The demo: what it measures, what it writes, how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from tools import demo
from tools.common.data import load_images

QUICK = ["--quick", "--backend", "eager", "--models", "mlp"]
TASK = demo.QUICK_TASKS["mlp"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(method: str, epoch: int = 1, **changes: Any) -> dict[str, Any]:
    base = {"model": "mlp", "method": method, "epoch": epoch, "accuracy": 90.0, "loss": 0.1}
    base |= {"step_ms": 2.0, "ratio": 1.0, "compile_s": 3.0}
    return base | {"cos_gradient": {"1": 0.5, "3": 0.7}, "cos_jacobian": {}} | changes


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{demo.START}\nold\n{demo.END}\nafter\n")
    args = [*QUICK, "--methods", "bp", "dfa", "grape + calibration", "--out", str(tmp_path)]
    assert demo.main([*args, "--name", "a", "--update-readme", str(readme)]) == 0
    out = capsys.readouterr().out
    assert "\r" not in out and "\x1b" not in out  # plain lines where there is no terminal
    records = read(tmp_path / "a" / "metrics.jsonl")
    assert [r["method"] for r in records] == ["torch.compile", "bp", "dfa", "grape + calibration"]
    reference, bp, dfa, grape = records
    assert reference["ratio"] == 1.0 and reference["accuracy"] == bp["accuracy"]
    assert min(bp["cos_gradient"].values()) > 0.999
    assert len(dfa["cos_gradient"]) == 7 and max(dfa["cos_gradient"].values()) < 0.99
    assert not dfa["cos_jacobian"] and len(grape["cos_jacobian"]) == 7
    for r in records:
        assert r["step_ms"] > 0 and r["compile_s"] >= 0
        assert f"{r['accuracy']:.1f}" in out and f"{r['accuracy']:.1f}" in readme.read_text()
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert config["seed"] == 0 and torch.__version__ in config["machine"]
    assert config["tasks"]["mlp"]["width"] == 64
    image = Image.open(tmp_path / "a" / "curves.png").convert("L")
    assert image.width > 1000 and image.getextrema()[0] < 60  # something is drawn
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "grape + calibration" in text and torch.__version__ in text
    assert demo.main([*args, "--name", "a"]) == 2  # never over an older run
    assert "choose another --name" in capsys.readouterr().err


def test_bad_data_folder_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--data-dir", str(tmp_path / "no"), "--out", str(tmp_path / "runs")]) == 2
    assert "no such data folder" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_interrupt_shows_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*args: Any) -> None:
        args[6](record("dfa", accuracy=12.3))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", train)
    readme = tmp_path / "README.md"
    readme.write_text(demo.START + demo.END)
    args = ["--out", str(tmp_path), "--name", "a", "--update-readme", str(readme)]
    assert demo.main(args) == 130
    assert "12.3" in capsys.readouterr().out
    assert len(read(tmp_path / "a" / "metrics.jsonl")) == 1
    assert (tmp_path / "a" / "curves.png").exists()
    assert readme.read_text() == demo.START + demo.END  # half a table is not published


def test_results_survive_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.demo", "--quick", "--backend", "eager"]
    command += ["--methods", "dfa", "--out", str(tmp_path), "--name", "a"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=demo.ROOT, env=env)
    metrics, deadline = tmp_path / "a" / "metrics.jsonl", time.monotonic() + 120
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline and process.poll() in (None, 0)
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert {r["method"] for r in read(metrics)[:2]} == {"torch.compile", "dfa"}


def test_probe_compares_with_the_true_gradient() -> None:
    torch.manual_seed(0)
    data = load_images()
    model, scratch = demo.build("mlp", data, 16), demo.build("mlp", data, 16)
    variant = demo.Variant(demo.REFERENCE, model, TASK, steps=1, backend="eager")
    x, y = data.pixels(data.train_x[:32]), data.train_y[:32]
    variant.gradients(x, y)
    variant.probe(scratch, x, y)
    exact = variant.alignment()["cos_gradient"]
    assert list(exact) == ["1", "3", "5", "7", "9", "11", "13"]  # hidden layers only
    assert min(exact.values()) > 0.9999
    for p in model.parameters():
        p.grad = -p.grad if p.grad is not None else None
    variant.probe(scratch, x, y)
    assert max(variant.alignment()["cos_gradient"].values()) < -0.9999


def test_timing_is_paired_and_leaves_compilation_out() -> None:
    torch.manual_seed(0)
    model = demo.build("mlp", load_images(), 16)
    variant = demo.Variant(demo.REFERENCE, model, TASK, steps=1, backend="eager")
    reference = [9.0, 0.010, 0.020, 0.010, 0.020, 0.010]
    variant.seconds = [5.0, 0.005, 0.010, 0.005, 2.0, 0.005]
    timing = variant.timing(reference)
    assert timing["step_ms"] == 7.5
    assert timing["ratio"] == pytest.approx(0.5, abs=0.06)
    assert timing["compile_s"] == pytest.approx(7.0, abs=0.1)


def test_table_shows_the_last_epoch_of_each_variant() -> None:
    records = [record("dfa", 1, accuracy=50.0), record("grape", 1), record("dfa", 2, accuracy=61.0)]
    rows = demo.table_rows(records)
    assert [row[1] for row in rows] == ["dfa", "grape"]
    assert rows[0][2] == "61.0" and rows[0][3] == "0.60" and rows[0][4] == "-"
    lines = demo.TABLE.text(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    markdown = demo.TABLE.markdown(rows).splitlines()
    assert len(markdown) == 4 and len({line.count("|") for line in markdown}) == 1


def test_readme_without_markers_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here")
    with pytest.raises(SystemExit, match="results:start"):
        demo.update_readme(readme, demo.table_rows([record("dfa")]), "caption")
    assert readme.read_text() == "nothing here"


def test_the_first_look_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "FIRST_TASK", demo.Task("First look", epochs=1, lr=1e-3, width=32))
    monkeypatch.setattr(demo, "TASKS", demo.QUICK_TASKS)
    args = ["--models", "mlp", "--methods", "dfa", "--backend", "eager", "--out", str(tmp_path)]
    small = load_images().head(4000, 1000)
    monkeypatch.setattr(demo, "load_images", lambda *_: small)
    assert demo.main([*args, "--name", "a"]) == 0
    out = capsys.readouterr().out
    first, _, rest = out.partition("s so far")
    assert "First look" in first and "accuracy %" in first and "grape + calibration" in first
    assert "ms/step" in rest and "grape + calibration" not in rest  # its own table, not the demo's
    assert rest.count("\n  .venv/bin/") == 2 and "tutorial.ipynb" in rest
    assert {r["model"] for r in read(tmp_path / "a" / "metrics.jsonl")} == {"first look", "mlp"}


def test_what_is_named_next_exists() -> None:
    for path in re.findall(r"examples/\S+", demo.NEXT):
        assert (demo.ROOT / path).is_file()


@pytest.mark.slow
def test_what_the_demo_promises(tmp_path: Path) -> None:
    """8-layer MLP: plain grape well above dfa, the default of grape close to bp."""
    args = ["--models", "mlp", "--backend", "eager", "--out", str(tmp_path), "--name", "a"]
    assert demo.main([*args, "--methods", "dfa", "grape", "grape + calibration"]) == 0
    last = {r["method"]: r for r in read(tmp_path / "a" / "metrics.jsonl")}
    score = {method: r["accuracy"] for method, r in last.items()}
    assert score["grape"] >= score["dfa"] + 4
    assert score["grape + calibration"] >= score[demo.REFERENCE] - 1.5
