"""Device models, fused times and the papers' formulas."""

from __future__ import annotations

import pytest
import torch

from grapefx.analysis import (
    amortised_calibration,
    arithmetic_ratio,
    build_dag,
    bundled_devices,
    load_device,
)
from grapefx.errors import OptionError
from tests.analysis.step_graphs import Builder

aten = torch.ops.aten

GOOD = """
name: toy
matmul_flops: {float32: 1e9}
vector_flops: {float32: 1e8}
bandwidth: 1e9
launch_overhead: 0
"""


@pytest.fixture
def toy(tmp_path):
    def write(text=GOOD):
        path = tmp_path / "toy.yaml"
        path.write_text(text)
        return load_device(path)

    return write


def test_bundled():
    assert bundled_devices() == ["a100", "cpu-2core", "h100", "h200"]
    for name in bundled_devices():
        device = load_device(name)
        assert device.name == name and device.source and device.worker
        bf16, f32 = device.rates(torch.bfloat16), device.rates(torch.float32)
        assert bf16[0] >= f32[0] and bf16[1] >= f32[1]
    assert load_device("cpu-2core").workers == 2


def test_roofline(toy):
    d = toy()
    assert d.seconds(1e9, 0, 1e6, torch.float32) == 1.0
    assert d.seconds(0, 1e8, 5e9, torch.float32) == 5.0
    assert d.rates(torch.float16) == d.rates(torch.float32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "colour: red", "unknown key 'colour'"),
        (GOOD.replace("bandwidth: 1e9", ""), "missing bandwidth"),
        (GOOD.replace("bandwidth: 1e9", "bandwidth: fast"), "bandwidth is a number"),
        (GOOD.replace("bandwidth: 1e9", "bandwidth: -1"), "bandwidth is positive"),
        (GOOD.replace("{float32: 1e9}", "{float64: 1}"), "has float32"),
        (GOOD + "workers: 0", "at least 1"),
        ("- a", "mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_files(toy, text, message):
    with pytest.raises(OptionError, match=message):
        toy(text)


def test_unknown_name_suggests():
    with pytest.raises(OptionError, match="Did you mean 'h100'"):
        load_device("h1000")
    with pytest.raises(OptionError, match="no device model file"):
        load_device("nowhere.yaml")


def test_pointwise_chains_are_fused(toy):
    b = Builder()
    x = b.input("x", 1000)
    with b.at("forward", "a"):
        y = b(aten.relu.default, b(aten.neg.default, x))
    two = b.done([y])
    toy_device = toy(GOOD.replace("launch_overhead: 0", "launch_overhead: 1"))
    dag = build_dag(two, device=toy_device)
    # one launch; 4000 bytes in and 4000 out; 2000 vector FLOPs take longer than those
    first, last = (t.seconds for t in dag.tasks)
    assert first == 1000 / 1e8 and last == pytest.approx(1 + 1000 / 1e8)
    assert dag.work("bytes") == 4 * 4000  # costs are given unfused


def test_nothing_is_fused_across_layers(toy):
    b = Builder()
    x = b.input("x", 1000)
    with b.at("forward", "a"):
        y = b(aten.neg.default, x)
    with b.at("forward", "b"):
        y = b(aten.relu.default, y)
    dag = build_dag(b.done([y]), device=toy(GOOD.replace("overhead: 0", "overhead: 1")))
    assert all(t.seconds > 1 for t in dag.tasks)


def test_sizes_and_shape_only_reads_make_nobody_wait():
    b = Builder()
    x = b.input("x", 8, 4, dynamic=True)
    with b.at("forward", "a"):
        y = b(aten.relu.default, x)
        n = b(aten.sym_size.int, y, 0)
        z = b(aten.zeros_like.default, y)
        v = b(aten.view.default, x, [n, 2, 2])
    dag = build_dag(b.done([y, z, v]))
    assert [t.op for t in dag.tasks] == ["aten::relu", "aten::zeros_like", "aten::view"]
    assert dag.preds == ((), (), ())


def test_missing_marks_become_other():
    b = Builder()
    y = b(aten.relu.default, b.input("x", 4))
    (task,) = build_dag(b.done([y])).tasks
    assert (task.phase, task.layer, task.stage) == ("other", "-", "other")


def test_arithmetic_ratio_of_the_paper():
    assert arithmetic_ratio(0.8) == pytest.approx(3 / 1.8)
    low, high = arithmetic_ratio(1.3), arithmetic_ratio(0.8)
    assert (round(low, 1), round(high, 1)) == (1.3, 1.7)


def test_amortised_calibration():
    c = amortised_calibration(2.0, 3.0, every=1, steps_per_epoch=195)
    assert c.per_epoch == 195 * 2.0 + 3.0
    assert c.per_step == pytest.approx(c.per_epoch / 195)
    assert c.backward_share == pytest.approx(
        0.005, abs=2e-4
    )  # "about 0.5 %", GrAPE 2026 section 4.1
    assert amortised_calibration(2.0, 3.0, every=10, steps_per_epoch=195).overhead == (
        pytest.approx(c.overhead / 10)
    )
    with pytest.raises(ValueError, match="steps_per_epoch"):
        amortised_calibration(1, 1, every=1, steps_per_epoch=0)
