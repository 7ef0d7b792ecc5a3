"""The compiled core follows the hand-written methods step by step, in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.runtime.module import FeedbackModule
from grapefx.runtime.noise import draw, seed_of
from tests.methods.reference import Reference

SIZES = (7, 11, 9, 11, 5)
ROWS = 12
TOLERANCE = 1e-10

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("bp", {}),
    "dfa": ("dfa", {"calib_every": None}),
    "dfa calibrated": ("dfa", {"ridge": 0.1}),
    "fdfa": ("fdfa", {"calib_every": None, "alpha": 0.1}),
    "fdfa calibrated": ("fdfa", {}),
    "grape": ("grape", {"calib_every": None, "norm": "unit"}),
    "grape calibrated": ("grape", {"eta": 0.05}),
    "grape calibrated late": ("grape", {"calib_init": False}),
    "grape calibrated, unit columns": ("grape", {"norm": "unit"}),
    "grape on a quarter": ("grape", {"tangent_fraction": 0.25}),
    "grape every 2nd step": ("grape", {"align_every": 2}),
}


def stack() -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(SIZES):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def noise_of(step: int, rows: int) -> list[Tensor]:
    """The noise of a step, which is a function of (seed, step) alone."""
    generator = torch.Generator().manual_seed(seed_of(0, 0, step))
    shapes = [(rows, n) for n in SIZES[1:-1]]
    return draw(shapes, torch.float64, torch.device("cpu"), generator, "gaussian")


def reference_of(net: FeedbackModule, method: str, options: dict[str, Any]) -> Reference:
    """The oracle with the weights and the feedback maps that ``net`` starts from."""
    maps = [v.clone() for k, v in net.feedback.items() if k.endswith("/B")]
    kept = {k: v for k, v in options.items() if k in ("eta", "norm", "alpha", "ridge")}
    lins = linears(net)
    return Reference(
        method, [m.weight.detach() for m in lins], [m.bias.detach() for m in lins], maps, **kept
    )


def follow(method: str, options: dict[str, Any], backend: str, steps: int = 7) -> None:
    """Train by Adam, two epochs, and compare gradients and maps after every step."""
    torch.manual_seed(0)
    options = {"noise": "gaussian", **options}
    given = {"calib_every": 1, **options}  # whatever is recommended
    net = grapefx.compile(stack(), method=method, backend=backend, steps_per_epoch=4, **given)
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    net(torch.randn(ROWS, SIZES[0], dtype=torch.float64))  # a forward alone changes nothing
    ref = reference_of(net, method, options)
    every, start = options.get("calib_every", 1), options.get("calib_init", True)
    for step in range(steps):
        x = torch.randn(ROWS, SIZES[0], dtype=torch.float64)
        y = torch.randint(SIZES[-1], (ROWS,))
        calibrate = every is not None and (step == 4 or (step == 0 and start))
        rows = round(ROWS * options.get("tangent_fraction", 1))
        aligned = method in ("grape", "fdfa") and step % options.get("align_every", 1) == 0
        want = ref.gradients(x, y, noise_of(step, rows) if aligned else None, calibrate)

        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for (name, p), g in zip(net.named_parameters(), want, strict=True):
            close(p.grad, g, f"step {step}, gradient of {name}")
        found = [v for k, v in net.feedback.items() if k.endswith("/B")]
        for i, (b, r) in enumerate(zip(found, ref.b, strict=method != "bp")):
            close(b, r, f"step {step}, B of layer {i}")
        opt.step()  # the reference reads the same weights


def close(found: Tensor | None, want: Tensor, what: str) -> None:
    assert found is not None, what
    torch.testing.assert_close(
        found, want, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("case", CASES)
def test_core_follows_the_reference(case: str) -> None:
    follow(*CASES[case], backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["grape calibrated", "fdfa calibrated"])
def test_compiled_core_follows_the_reference(case: str) -> None:
    follow(*CASES[case], backend="inductor")


def test_reference_estimates_the_jacobian() -> None:
    """With noise along one unit vector a sample, J^ of the oracle is the mean true Jacobian."""
    torch.manual_seed(0)
    model = stack()
    lins = linears(model)
    weights = [m.weight.detach() for m in lins]
    ref = Reference("bp", weights, [m.bias.detach() for m in lins], [])
    n = SIZES[1]
    x = torch.randn(1, SIZES[0], dtype=torch.float64).expand(n, -1)
    h = ref.values(x)
    noise = [torch.zeros(n, s, dtype=torch.float64) for s in SIZES[1:-1]]
    noise[0] = torch.eye(n, dtype=torch.float64)
    true = torch.autograd.functional.jacobian(model[2:], h[1][0])
    close(ref.tangent(h, noise).t(), true, "J_1")
