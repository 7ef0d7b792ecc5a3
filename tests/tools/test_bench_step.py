"""Compile times: every part of every sort of network, the table, and that of the benchmark."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from torch import nn
from torch._inductor import config as inductor_config

from grapefx.analysis.device import DeviceModel
from tools import bench_step
from tools.bench import compile_time
from tools.bench import measure as bench_measure
from tools.bench.models import MODELS, VARIANTS, benchmark
from tools.common import results
from tools.common.machine import machine

RATES = ((1e12, 2.0**30), (1e11, 2.0**40))  # FLOP/s, bytes/s: memory limits, products limit


@pytest.mark.filterwarnings("ignore:calib_every")
@pytest.mark.parametrize(
    ("name", "variant", "parts"),
    [
        ("depth2", "compiled", set()),
        ("tiny", "bp", {"capture", "nodes"}),
        ("depth2", "grape 1/8", {"capture", "nodes", "calibration"}),
    ],
)
def test_parts(name: str, variant: str, parts: set[str]) -> None:
    row = compile_time.measure(name, variant, batch=8, kernels=False)
    # time of compilers may be that of processes which an earlier test has started
    found = {k for k, v in row.items() if v} - {"compilers"}
    assert found == {"first", "front", "processor"} | parts
    assert (row["capture"] or 0) < row["front"] <= row["first"]


def test_networks() -> None:
    assert benchmark("mlp8x1024") is MODELS["mlp8x1024"]
    layers = [m for m in benchmark("depth12").build() if isinstance(m, nn.Linear)]
    assert len(layers) == 13 and layers[0].in_features == 64
    pytest.importorskip("torchvision")
    assert benchmark("squeezenet1_1").build()(benchmark("squeezenet1_1").example(2)[0]).ndim == 2
    assert benchmark("squeezenet1_1@64").example(2)[0].shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="nothing"):
        benchmark("nothing").build()


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def found(name: str, variant: str, batch: int, **how: bool) -> compile_time.Row:
        asked.append((name, variant, batch, how))
        mine = variant != "compiled"
        row = {"first": 6.0 if mine else 4.0, "front": 2.0, "processor": 1.0, "compilers": 0.5}
        return row | dict.fromkeys(("capture", "calibration", "nodes"), 3.0 if mine else None)

    monkeypatch.setattr(compile_time, "compile_seconds", found)
    argv = ["--depths", "3", "--variants", "compiled", "grape", "--no-kernels", "--batch", "4"]
    assert compile_time.main([*argv, "--rounds", "2"]) == 0
    how = {"workers": False, "kernels": False}
    assert sorted(map(str, asked)) == sorted(
        2 * [str(("depth3", v, 4, how)) for v in ("compiled", "grape")]
    )
    text = capsys.readouterr().out
    assert "| depth3 | compiled | 4.0 | 1.00 | 2.0 |  |  | 1.0 | 0.5 |  |" in text
    assert "| depth3 | grape | 6.0 | 1.50 | 2.0 | 3.0 | 3.0 | 1.0 | 0.5 | 3.0 |" in text


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


def test_page_of_an_earlier_run(tmp_path: Path) -> None:
    row = {
        "model": "tiny", "batch": 8, "ratio": 0.5, "low": 0.4, "high": 0.6, "floor": 0.75,
        **dict.fromkeys(("step_ms", "forward_ms", "update_ms", "calibration_ms"), 2.0),
    }  # fmt: skip
    moved = {"moved_mib": 4.0, "gflop": 1.0, "floor_bytes": 0.25}
    slow, fast = (DeviceModel("", {"float32": f}, {"float32": f}, b, 0.0) for f, b in RATES)
    assert bench_step.roofline(row, slow) is None
    assert bench_step.roofline(row | moved, slow) == pytest.approx(1e3 / 256)
    assert bench_step.roofline(row | moved, fast) == pytest.approx(10.0)
    rows = [row | {"variant": "compiled", "ratio": 1.0}, row | moved | {"variant": "dfa"}]
    run = {"machine": "torch 9, here", "command": "python this", "minutes": 1.6}
    for place, row in reversed(list(enumerate(rows))):
        results.append(tmp_path / "run.jsonl", run | {"place": place, "rows": [row]})
    argv = ["--show", str(tmp_path / "run.jsonl"), "--page", str(tmp_path / "run.md")]
    assert bench_step.main(argv) == 0
    text = (tmp_path / "run.md").read_text()
    assert "| tiny | 8 | 2.0 | 0.50 (0.75, 0.25) |" in text and "\nTorch 9, here.\n" in text
    assert text.count("| tiny | 8 | dfa |") == 1 and "`python this`" in text
    assert " in 3 minutes." in text


def test_a_killed_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Networks that are there are kept, the others measured; another command is refused."""
    file, page = tmp_path / "run.jsonl", tmp_path / "run.md"
    argv = ["--models", "tiny", "lenet", "--rounds", "2", "--jsonl", str(file), "--go-on"]
    argv += ["--page", str(page)]

    def measure(name: str, variants: object, batch: int, *_: object, **__: object) -> object:
        if name in fails:
            raise KeyboardInterrupt
        measured.append(name)
        times = dict.fromkeys(("step_ms", "forward_ms", "update_ms", "calibration_ms"), 2.0)
        row = {"model": name, "batch": batch, "variant": "compiled", "floor": None, **times}
        return [row | dict.fromkeys(("ratio", "low", "high"), 1.0)]

    measured: list[str] = []
    fails = {"lenet"}
    here = DeviceModel("", {"float32": 1e9}, {"float32": 1e9}, 1e9, 0.0)
    with (
        mock.patch.object(bench_step, "run_model", measure),
        mock.patch.object(bench_step, "peaks", lambda: here),
    ):
        with pytest.raises(KeyboardInterrupt):
            bench_step.main(argv)
        fails.clear()
        assert bench_step.main(argv) == 0
        assert measured == ["tiny", "lenet"]
        assert [line["rows"][0]["model"] for line in results.read(file)] == measured
        with pytest.raises(SystemExit):
            bench_step.main([*argv, "--no-bytes"])
        assert "is of another command" in capsys.readouterr().err
        with mock.patch("tools.bench_step.machine", lambda: "other"), pytest.raises(SystemExit):
            bench_step.main(argv)
        assert f"was measured with {machine()}" in capsys.readouterr().err
        whole = page.read_text()
        file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
        assert bench_step.main(argv) == 0  # what is measured later stands where it would have stood
        assert [line["rows"][0]["model"] for line in results.read(file)] == ["lenet", "tiny"]
        assert page.read_text() == whole
        assert bench_step.main(["--show", str(file), "--page", str(page)]) == 0
        assert page.read_text() == whole
    assert {*tmp_path.iterdir()} == {file, page}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--full", "--batch", "8"], "--full has"),
        (["--go-on"], "--jsonl FILE"),
        (["--go-on", "--jsonl", "a", "--show", "b"], "no --show"),
        (["--show", "nowhere.jsonl"], "nowhere.jsonl: not a file that --jsonl wrote"),
    ],
)
def test_bad_arguments(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_step.main(argv)
    assert said in capsys.readouterr().err


def test_moved_bytes() -> None:
    """Weights read and their gradients written; what crosses the chain reads most weights again."""
    compiled, cut = (bench_measure.moved("mlp3x1024", v, 8) for v in ("compiled", "dfa"))
    chain = 4 * (1024 * 1024 + 1024 * 10)
    least = 2 * (chain + 4 * 784 * 1024)
    assert least + chain < compiled < 1.2 * (least + chain)
    assert least < cut < 1.2 * least


@pytest.mark.slow
def test_moved_bytes_are_counted_beside_the_timing_where_nothing_is_cached() -> None:
    found: dict[str, float] = {}
    variants = ["compiled", "grape k=8"]
    with inductor_config.patch(force_disable_caches=True):
        bench_measure.paired("tiny", variants, batch=8, rounds=0, bytes_of=found, calibrate=False)
    assert found == {v: bench_measure.moved("tiny", v, 8) for v in variants}
    assert all(n > 0 for n in found.values())


def test_a_page_names_no_path_of_the_machine() -> None:
    given = ["--full", "--jsonl", "/x/y", "--page", "/z", "--plot", "p", "--rounds", "2"]
    assert bench_step.command_of(given) == "python -m tools.bench_step --full --rounds 2"
