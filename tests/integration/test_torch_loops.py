"""What training loops put around a module: hooks, EMA, schedulers, checkpoints, compiled losses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import grapefx
from grapefx.errors import CaptureError, GrapefxWarning
from tests.zoo import (
    MLP,
    assert_same_buffers,
    assert_same_gradients,
    compiled,
    eager_twin,
    loss_of,
    make,
    train_step,
)


def test_hooks_on_the_net_run_in_every_call() -> None:
    model, (x,) = make("mlp")
    net = compiled(model, "grape")
    seen: list[str] = []
    net.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    net.register_forward_hook(lambda m, a, out: seen.append("post"))
    net.register_forward_hook(lambda m, a, out: out * 2)
    net.register_full_backward_pre_hook(lambda m, go: seen.append("back-pre"))
    net.register_full_backward_hook(lambda m, gi, go: seen.append("back"))
    x = x.clone().requires_grad_()
    for _ in range(2):
        train_step(net, (x,))
        assert seen == ["pre", "post", "back-pre", "back"]
        seen.clear()
    twin = eager_twin(model)
    with net.calibration():
        train_step(net, (x,))
    twin.zero_grad()
    loss_of(twin(x) * 2).backward()
    assert_same_gradients(net, twin)
    with torch.no_grad():
        assert torch.equal(net(x), 2 * twin(x))


@pytest.mark.parametrize("pre", [False, True])
def test_forward_hooks_inside_run_in_every_call(pre: bool) -> None:
    model, args = make("mlp")
    twin = eager_twin(model)
    net = compiled(model, "bp")
    calls = []

    def after(m: Any, a: Any, out: Tensor) -> Tensor:
        calls.append(m)
        return out * 3

    def before(m: Any, a: Any) -> Any:
        calls.append(m)
        return (a[0] * 3,)

    for m in (model, twin):
        layer = m.layers[1]  # type: ignore[index,union-attr]
        layer.register_forward_pre_hook(before) if pre else layer.register_forward_hook(after)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            train_step(net, args)
            train_step(twin, args)
            assert_same_gradients(net, twin)  # what it computes counts
    assert not [w for w in caught if issubclass(w.category, GrapefxWarning)]
    assert len([m for m in calls if m is model.layers[1]]) == 3  # type: ignore[index]


def test_torchs_own_hooks_are_not_mentioned() -> None:
    model, args = make("mlp")
    prune.l1_unstructured(model.layers[0], "weight", 0.5)  # type: ignore[index,arg-type,attr-defined]
    net = compiled(model, "bp")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GrapefxWarning)
        train_step(net, args)
    mask = model.layers[0].weight_mask  # type: ignore[index,union-attr]
    assert not (model.layers[0].weight_orig.grad * (1 - mask)).any()  # type: ignore[index,union-attr,operator]


@pytest.mark.parametrize("pre", [False, True])
def test_backward_hooks_inside_are_refused(pre: bool) -> None:
    model, args = make("mlp")
    net = compiled(model, "grape")
    train_step(net, args)
    layer = model.layers[0]  # type: ignore[index]
    if pre:
        handle = layer.register_full_backward_pre_hook(lambda m, go: None)  # type: ignore[operator]
    else:
        handle = layer.register_full_backward_hook(lambda m, gi, go: None)  # type: ignore[operator]
    with pytest.raises(CaptureError, match=r"'layers.0' has a backward hook(.|\n)*remedy"):
        net(*args)
    handle.remove()
    train_step(net, args)


@pytest.mark.parametrize("method", ["bp", "grape"])
def test_activation_checkpoints_inside(method: str) -> None:
    class Checkpointed(MLP):
        reentrant = False

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(
                    lambda h, layer=layer: torch.relu(layer(h)), x, use_reentrant=self.reentrant
                )
            return self.out(x)

    torch.manual_seed(0)
    model = Checkpointed().double()
    twin = eager_twin(model)
    net = compiled(model, method)  # step 0 calibrates
    x = torch.randn(6, 8, dtype=torch.float64)
    train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin)
    if method == "bp":
        model.reentrant = twin.reentrant = True
        x.requires_grad_()  # without it, a reentrant checkpoint loses gradients in eager mode
        train_step(net, (x,))
        train_step(twin, (x,))
        assert_same_gradients(net, twin)


@pytest.mark.parametrize("whole", [True, False])
def test_averaged_weights(whole: bool) -> None:
    """Of the wrapper, which is copied with its maps, and of the plain model."""
    model, args = make("cnn")
    net = compiled(model, "grape")
    ema: Any = AveragedModel(net if whole else model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    expected = None
    for _ in range(3):
        train_step(net, args)
        optimizer.step()
        ema.update_parameters(net if whole else model)
        now = net.get_parameter("0.weight").detach().clone()
        expected = now if expected is None else 0.5 * expected + 0.5 * now
    torch.testing.assert_close(ema.module.get_parameter("0.weight"), expected)
    net.eval()
    ema.eval()
    with torch.no_grad():
        assert not torch.allclose(ema(*args), net(*args))


@pytest.mark.slow
def test_a_compiled_loss_and_a_scheduler_need_no_new_graphs() -> None:
    """The default backend; learning rates are the optimizer's, never a graph's."""
    torch.manual_seed(0)
    net = grapefx.compile(MLP(depth=1), calib_every=None)
    x, y = torch.randn(32, 8), torch.randint(0, 5, (32,))

    @torch.compile(dynamic=False)
    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, label_smoothing=0.1) + 0.01 * out.square().mean()

    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=20)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_fn(net(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    (program,) = net._captures.programs.values()
    assert [kind for kind, _ in program.steps] == ["align"]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, args = make("mlp")
    net = compiled(model, "grape", calib_unit="step", calib_every=2)
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(4):
            train_step(net, args)
            for layer, cosines in net.alignment().items():
                writer.add_scalars(f"alignment/{layer}", cosines, step)
    found = list(tmp_path.glob("alignment_layers.0_cos_gradient*"))
    assert len(found) == 1
    log = EventAccumulator(str(found[0])).Reload()
    (tag,) = log.Tags()["scalars"]
    assert len(log.Scalars(tag)) == 4


@pytest.mark.parametrize("whole", [True, False])
def test_batch_norms_of_averaged_weights(whole: bool) -> None:
    """``update_bn`` sets ``momentum=None``, which reads a count as a Python number."""
    model, args = make("cnn")
    net = compiled(model, "dfa")
    train_step(net, args)
    batches = [torch.randn_like(args[0]) for _ in range(3)]
    found = []
    for averaged in (net if whole else model, eager_twin(model)):
        ema = AveragedModel(averaged)
        ema.update_parameters(averaged)
        update_bn(batches, ema)
        found.append(ema.module)
    assert_same_buffers(*found)


def test_batch_norm_without_momentum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 6), nn.BatchNorm1d(6, momentum=None, affine=False), nn.Linear(6, 2),
    ).double()  # fmt: skip
    twin = eager_twin(model)
    net = compiled(model, "bp")
    for n in (5, 6, 7):
        x = torch.randn(n, 1, 6, 6, dtype=torch.float64)
        for m in (net, twin):
            train_step(m, (x,))
    assert_same_gradients(net, twin)
    assert_same_buffers(net, twin)
