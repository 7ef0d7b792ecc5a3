"""Where stages end: by hand, and by the dynamic programme against trying everything."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

import grapefx
from grapefx.errors import InputError, MethodError, OptionError, PlacementError
from grapefx.options import Options
from grapefx.plan.stages import balanced_ends, check_method, ends_of, layer_seconds
from grapefx.report.cli import main
from grapefx.report.stages import stages_text
from tests.stages.test_split_stages import plan_of


def slowest(seconds: list[float], ends: tuple[int, ...]) -> float:
    edges = [0, *(k + 1 for k in ends), len(seconds)]
    return max(sum(seconds[a:b]) for a, b in itertools.pairwise(edges))


def test_the_slowest_stage_is_as_fast_as_it_can_be() -> None:
    draw = random.Random(0)
    for _ in range(50):
        seconds = [draw.random() for _ in range(draw.randint(2, 8))]
        legal = sorted(draw.sample(range(len(seconds) - 1), draw.randint(1, len(seconds) - 1)))
        for stages in range(1, len(legal) + 2):
            ends = balanced_ends(seconds, legal, stages)
            assert len(ends) == stages - 1 and set(ends) <= set(legal)
            best = min(slowest(seconds, e) for e in itertools.combinations(legal, stages - 1))
            assert slowest(seconds, ends) == pytest.approx(best)


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(PlacementError, match="4 stages need 3 ends, and this model has 2 places"):
        balanced_ends([1.0] * 4, (0, 2), 4)


def test_equal_layers_make_equal_stages() -> None:
    plan = plan_of("deep", "dfa")
    seconds = layer_seconds(plan, 4, "cpu-2core")
    assert len(seconds) == len(plan.layers) + 1 and min(seconds) > 0
    assert ends_of(plan, "auto", 2, 4, "cpu-2core") in ((2,), (3,))


def test_ends_by_name() -> None:
    plan = plan_of("deep", "dfa")
    assert ends_of(plan, ["layers.1", "layers.4"], 3, 4, "cpu-2core") == (1, 4)
    assert ends_of(plan, [], 1, 4, "cpu-2core") == ()
    with pytest.raises(OptionError, match=r"no feedback point 'layers\.9'"):
        ends_of(plan, ["layers.9"], 2, 4, "cpu-2core")
    with pytest.raises(OptionError, match="makes 2 stages, and the pipeline has 3"):
        ends_of(plan, ["layers.1"], 3, 4, "cpu-2core")
    with pytest.raises(OptionError, match="must be 'auto' or a list"):
        ends_of(plan, 3, 3, 4, "cpu-2core")


@pytest.mark.parametrize("method", ["fa", "fg-a", "pepita", "drtp", "fg-w"])
def test_methods_that_stages_cannot_train(method: str) -> None:
    with pytest.raises(MethodError, match="cannot train in stages"):
        check_method(plan_of("mlp", method).method)


def test_options_of_a_pipeline_need_one() -> None:
    with pytest.raises(OptionError, match="are for pipeline="):
        grapefx.compile(torch.nn.Linear(2, 2), microbatches=2)
    with pytest.raises(OptionError, match="pipeline= takes one dim of a DeviceMesh"):
        grapefx.compile(torch.nn.Linear(2, 2), pipeline="pp")  # type: ignore[call-overload]


def test_the_report() -> None:
    plans = [dataclasses.replace(plan_of("deep", m), options=Options()) for m in ("bp", "dfa")]
    text = stages_text(plans, 3, 4, 8, "cpu-2core", "Deep")
    assert "Deep: 3 stages, 4 microbatches of 2 samples" in text
    assert "0 -> 1:" in text and "1 -> 0:" in text and "2 -> 0:" in text
    table = text.partition("microbatches held")[2].splitlines()
    times = {line[:27].strip(): float(line[27:38]) for line in table[1:9] if line.strip()}
    assert times["dfa"] <= times["zero bubble"] <= times["1F1B"] <= times["one device"]
    assert times["bp"] <= times["1F1B"]
    assert times["data parallelism on 3"] == pytest.approx(times["one device"] / 3, abs=1e-3)
    scaling = text.partition("equal stages")[2].splitlines()[2:]
    assert [int(line.split()[0]) for line in scaling] == [2, 4, 8, 16, 32, 64]
    with pytest.raises(InputError, match="cannot be divided into 3 microbatches"):
        stages_text(plans, 2, 3, 8, "cpu-2core", "Deep")


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    file = f"{tmp_path}/net.py"
    with open(file, "w") as f:
        f.write(
            "import torch\nmodel = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])"
            "\nexample_inputs = torch.zeros(8, 4)\n"
        )
    assert main([file, "--stages", "2", "--microbatches", "2", "--method", "dfa"]) == 0
    out = capsys.readouterr().out
    assert "2 stages, 2 microbatches of 4 samples" in out and "dfa (update step)" in out
    assert main([file, "--stages", "2", "--format", "json"]) == 2
    assert "--stages gives text" in capsys.readouterr().err
