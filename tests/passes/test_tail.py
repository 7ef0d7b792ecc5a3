"""The tail computes what the whole step would, whatever the strides of what it reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grapefx.passes.divide.tail import PHASES, cut_tail
from tests.zoo import ZOO, make, plan_of, step_inputs


def _other_strides(x: Tensor) -> Tensor:
    """The same values with the dims laid out in reverse."""
    if x.ndim < 2 or x.numel() == 0:
        return x
    order = list(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("name", list(ZOO))
def test_main_and_tail_equal_the_whole_step(name: str) -> None:
    plan = plan_of(name, "grape")
    step = plan.graph("calibration")
    model, args = make(name)
    torch.manual_seed(0)
    whole = dict(zip(step.outputs, step.gm(*step_inputs(plan, step, model, args)), strict=True))

    main, tail = cut_tail(step)
    assert tail is not None
    assert len(step.gm.graph.nodes) > len(main.gm.graph.nodes)  # the step itself is not changed
    torch.manual_seed(0)
    results = main.gm(*step_inputs(plan, main, model, args))
    kept = len(tail.orders)
    results = tail.run([*results[:-kept], *[_other_strides(v) for v in results[-kept:]]])
    found = dict(zip([*main.outputs[:-kept], *tail.outputs], results, strict=True))
    assert set(found) == set(whole)
    for slot, value in whole.items():
        if value is None:
            assert found[slot] is None
        else:
            torch.testing.assert_close(  # cosines are of float32
                found[slot],
                value,
                rtol=1e-5,
                atol=1e-6,
                equal_nan=True,
                msg=lambda m, s=slot: f"{s}: {m}",
            )


def test_no_second_gradient_is_left_in_the_step() -> None:
    step = plan_of("cnn", "grape").graph("calibration")
    main, tail = cut_tail(step)
    assert tail is not None
    phases = [n.meta.get("grapefx_phase") for n in main.gm.graph.nodes]
    assert not set(phases) & set(PHASES)
    convs = torch.ops.aten.convolution_backward.default
    count = [sum(n.target is convs for n in s.gm.graph.nodes) for s in (step, main)]
    assert count[0] == 2 * count[1] > 0  # the pass would do nothing if there were no twins


def test_backpropagation_has_no_tail() -> None:
    step = plan_of("cnn", "bp").graph("calibration")
    main, tail = cut_tail(step)
    assert main is step and tail is None


def test_maps_that_the_gradients_need_stay() -> None:
    step = plan_of("mlp", "grape", calib_refit="feedback").graph("calibration")
    main, tail = cut_tail(step)
    phases = {n.meta.get("grapefx_phase") for n in main.gm.graph.nodes}
    assert tail is not None and {"refit", "projection"} <= phases
    assert "metric" in {s.role for s in tail.outputs}
