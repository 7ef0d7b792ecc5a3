"""Drop-in: what training loops do with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from tests.zoo import (
    MLP,
    assert_same_gradients,
    compiled,
    eager_twin,
    gradients,
    loss_of,
    make,
    train_step,
)


def both(method: str = "bp", **options: Any) -> tuple[Any, nn.Module, Tensor]:
    model, (x,) = make("mlp", torch.float32)
    return compiled(model, method, **options), eager_twin(model), x


def test_gradients_accumulate() -> None:
    net, twin, x = both()
    for _ in range(3):
        for m in (net, twin):
            (loss_of(m(x)) / 3).backward()
    assert_same_gradients(net, twin, 1e-5)


def test_accumulated_feedback_gradients_are_the_sum() -> None:
    net, _, x = both("dfa", calib_every=None)
    loss_of(net(x)).backward()
    once = gradients(net)
    loss_of(net(x)).backward()
    for k, v in gradients(net).items():
        torch.testing.assert_close(v, 2 * once[k])  # type: ignore[operator]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    net, twin, x = both("dfa")
    for m in (net, twin):
        loss_of(m(x)).backward()
        m.zero_grad(set_to_none=set_to_none)
    for p in net.parameters():
        assert (p.grad is None) if set_to_none else not p.grad.any()
    with net.calibration():
        for m in (net, twin):
            loss_of(m(x)).backward()
    assert_same_gradients(net, twin, 1e-5)


def test_two_forwards_before_two_backwards() -> None:
    net, twin, x = both()
    for m in (net, twin):
        a, b = m(x), m(2 * x)
        (loss_of(a) + 2 * loss_of(b)).backward()
    assert_same_gradients(net, twin, 1e-5)
    net, _, x = both("grape", calib_every=None)
    first, second = loss_of(net(x)), loss_of(net(2 * x))
    second.backward()
    between = net.feedback
    first.backward()
    # both learned, each from the maps as they were when its backward ran
    assert not torch.equal(between["layers.0/B"], net.feedback["layers.0/B"])
    assert net.feedback_state_dict()["schedule"]["step"] == 2


def test_clipping_hooks_and_autograd_grad() -> None:
    net, twin, x = both()
    seen: list[float] = []
    for m in (net, twin):
        m.out.weight.register_hook(lambda g: g * 3)
        m.out.bias.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.sum())))
        loss_of(m(x)).backward()
        nn.utils.clip_grad_norm_(m.parameters(), 0.01)
    assert_same_gradients(net, twin, 1e-5)
    assert len(seen) == 2 and seen[0] == pytest.approx(seen[1], rel=1e-4)
    wanted = [net.layers[0].weight, net.out.bias]
    found = torch.autograd.grad(loss_of(net(x)), wanted)
    other = torch.autograd.grad(loss_of(twin(x)), [twin.layers[0].weight, twin.out.bias])  # type: ignore[index,union-attr]
    torch.testing.assert_close(found, other)


@pytest.mark.parametrize("method", ["bp", "dfa", "grape"])
def test_grad_scaler(method: str) -> None:
    net, twin, x = both(method)
    results = []
    for m in (net, twin):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        scaler.scale(loss_of(m(x))).backward()
        scaler.unscale_(optimizer)
        results.append(gradients(m))
        scaler.step(optimizer)
        scaler.update()
    for k, v in results[0].items():  # step 0 calibrates
        torch.testing.assert_close(v, results[1][k], rtol=1e-4, atol=1e-6)


def test_an_overflowing_scale_skips_the_optimizer_and_the_maps() -> None:
    net, _, x = both("grape", calib_every=None)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(net(x))).backward()
    scaler.step(optimizer)
    scaler.update()
    before, weights = net.feedback, net.layers[0].weight.clone()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="not finite"):
        (scaler.scale(loss_of(net(x))) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(net.layers[0].weight, weights)
    for k, v in net.feedback.items():
        assert torch.equal(v, before[k])
    assert net.skipped_updates == 1


@pytest.mark.parametrize(
    ("name", "method"),
    [("mlp", "bp"), ("mlp", "grape"), ("cnn", "grape"), ("encoder-prenorm", "dfa")],
)
def test_autocast_bf16(name: str, method: str) -> None:
    """Trap: autocast is baked into a capture, and must not act on the graph a second time."""
    model, args = make(name, torch.float32)
    if name == "cnn":
        model[9].p = 0.0  # type: ignore[index,assignment]
    twin = eager_twin(model)
    net = compiled(model, method)
    dtypes = []
    for m in (net, twin):
        with torch.autocast("cpu", torch.bfloat16):
            out = m(*args)
            loss = F.mse_loss(out, torch.ones_like(out))
        loss.backward()
        dtypes.append(out.dtype)
    assert dtypes[0] == dtypes[1] == torch.bfloat16
    assert_same_gradients(net, twin, 0.1)
    for p in net.parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32
    if name != "mlp":
        return
    # without autocast another graph is used; with it again, the first
    train_step(net, args)
    with torch.no_grad():
        assert net(*args).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(net(*args), twin(*args), rtol=0.1, atol=0.1)
    assert len(net._captures.programs) == 4
    with torch.autocast("cpu", torch.bfloat16):
        train_step(net, args)
    assert len(net._captures.programs) == 4
    assert {t.dtype for t in net.feedback.values()} <= {torch.float32}


def test_bfloat16_parameters() -> None:
    """Feedback maps stay in float32 beside them."""
    model = MLP().bfloat16()
    net = compiled(model, "grape", calib_every=None)
    x = torch.randn(6, 8).bfloat16()
    for _ in range(3):
        train_step(net, (x,))
    assert {t.dtype for t in net.feedback.values()} == {torch.float32}
    assert {p.grad.dtype for p in net.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
def test_optimizers_and_schedulers(optimizer: Any) -> None:
    net, twin, x = both("bp")
    for m in (net, twin):
        opt = optimizer(m.parameters(), lr=0.05)
        sched = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 3)
        for _ in range(3):

            def closure(m: nn.Module = m) -> Tensor:
                m.zero_grad()
                loss = loss_of(m(x))
                loss.backward()
                return loss

            opt.step(closure)
            sched.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    assert len(net._captures.programs) == 1


def test_learns() -> None:
    """A feedback-trained network fits a small task."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0).long()
    for method, options in (("dfa", {}), ("fdfa", {"calib_every": None}), ("grape", {})):
        torch.manual_seed(1)
        net = compiled(MLP(32, 3), method, **options)
        opt = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(250):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
        with torch.no_grad():
            accuracy = (net(x).argmax(1) == y).float().mean()
        assert accuracy > 0.85, (method, accuracy)


def test_global_random_stream_is_untouched_without_dropout() -> None:
    net, _, x = both("grape")
    for _ in range(3):
        before = torch.random.get_rng_state()
        loss_of(net(x)).backward()
        with torch.no_grad():
            net(x)
        assert torch.equal(before, torch.random.get_rng_state())


def test_a_seed_reproduces_a_run() -> None:
    def run(seed: int, torch_seed: int = 0, name: str = "mlp") -> list[Tensor]:
        model, args = make(name)
        net = compiled(model, "grape", seed=seed)
        opt = torch.optim.SGD(net.parameters(), 0.1)
        for k in range(4):
            train_step(net, args, seed=torch_seed + k)
            opt.step()
        return [*(p.detach() for p in net.parameters()), *net.feedback.values()]

    a, b, c = run(0), run(0), run(1)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))
    # dropout comes from the global stream, noise from the module's own
    a, b, c = run(0, 0, "cnn"), run(0, 0, "cnn"), run(0, 50, "cnn")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_noise_does_not_depend_on_forwards_without_backward() -> None:
    def run(extra: int) -> dict[str, Tensor]:
        net, _, x = both("grape", calib_every=None)
        for _ in range(3):
            for _ in range(extra):
                net(x)
            train_step(net, (x,))
        return net.feedback

    a, b = run(0), run(2)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_that_the_model_turns_off_stays_off(grad: bool) -> None:
    """Inside the user's autocast: the part in float32 is computed in float32."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            with torch.autocast("cpu", enabled=False):
                return self.b(300 * h.float())

    net = grapefx.compile(Part(), method="bp", backend="eager")
    x = torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
        expected, found = Part()(x), net(x)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected)
