"""``grapefx.compile(model, inplace=True)``: the same object trains through grapefx."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grapefx
from grapefx.errors import CaptureError, OptionError
from grapefx.runtime.module import FeedbackModule
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


def in_place(model: Any, method: str = "grape", **options: Any) -> Any:
    options.setdefault("backend", "eager")
    options.setdefault("calib_every", 1)
    same = grapefx.compile(model, method=method, inplace=True, **options)
    assert same is model
    model.grapefx.set_epoch(0)
    return model


@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
@pytest.mark.parametrize("method", ["bp", "dfa", "grape"])
def test_steps_are_those_of_the_wrapper(name: str, method: str) -> None:
    model, args = make(name)
    net = compiled(eager_twin(model), method)
    in_place(model, method)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (model, net)]
    for _ in range(3):
        losses = [train_step(m, args) for m in (model, net)]
        assert losses[0] == losses[1]
        assert_same_gradients(model, net, 0.0)
        assert_same_buffers(model, net)
        for o in optimizers:
            o.step()
    assert model.grapefx.feedback.keys() == net.feedback.keys()
    for k, v in net.feedback.items():
        assert torch.equal(v, model.grapefx.feedback[k])


def test_nothing_else_of_the_model_changes() -> None:
    model, args = make("cnn")
    plain = eager_twin(model)
    in_place(model)
    train_step(model, args)
    assert type(model) is type(plain) and isinstance(model.grapefx, FeedbackModule)
    assert list(model.state_dict()) == list(plain.state_dict())
    for what in ("named_modules", "named_parameters", "named_buffers"):
        assert [n for n, _ in getattr(model, what)()] == [n for n, _ in getattr(plain, what)()]
    assert repr(model) == repr(plain)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert "layer" in str(model.grapefx.explain()) and model.grapefx.alignment()


def test_modes_and_calls_without_gradients() -> None:
    model, args = make("cnn")
    twin = eager_twin(model)
    in_place(model, "bp")
    for mode in (True, False):
        model.train(mode)
        twin.train(mode)
        train_step(model, args)
        train_step(twin, args)
        assert_same_gradients(model, twin)
        for context in (torch.no_grad, torch.inference_mode):
            outs = []
            for m in (model, twin):
                torch.manual_seed(0)
                with context():
                    outs.append(m(*args))
            assert torch.equal(outs[0], outs[1]) and not outs[0].requires_grad
        assert_same_buffers(model, twin)
    # two captures for two modes; none for calls without gradients
    assert len(model.grapefx._captures.programs) == 2


def test_restore() -> None:
    model, args = make("mlp")
    twin = eager_twin(model)
    in_place(model, "dfa", calib_every=None)
    train_step(model, args)
    train_step(twin, args)
    name = "layers.0.weight"
    assert not torch.allclose(model.get_parameter(name).grad, twin.get_parameter(name).grad)
    net = model.grapefx
    assert grapefx.restore(model) is model
    assert not hasattr(model, "grapefx") and model.__dict__.keys() == twin.__dict__.keys()
    train_step(model, args)
    assert_same_gradients(model, twin)
    with pytest.raises(OptionError, match="not compiled"):
        grapefx.restore(model)
    with pytest.raises(OptionError, match="not compiled"):
        net.restore()
    in_place(model, "bp")
    assert model.grapefx.restore() is model


def test_compiling_twice_is_refused() -> None:
    model, args = make("mlp")
    in_place(model)
    for inplace in (True, False):
        with pytest.raises(OptionError, match="in place already"):
            grapefx.compile(model, inplace=inplace)
    with pytest.raises(OptionError, match="already"):
        grapefx.compile(model.grapefx, inplace=True)
    taken = MLP()
    taken.grapefx = 3  # type: ignore[assignment]
    with pytest.raises(OptionError, match="has an attribute 'grapefx'"):
        grapefx.compile(taken, inplace=True)
    train_step(model, args)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_plain_model(how: str) -> None:
    model, args = make("cnn")
    in_place(model)
    train_step(model, args)
    before = model.grapefx.feedback
    other: Any = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert other.grapefx is None
    twin = eager_twin(grapefx.restore(eager_twin_of(model)))
    for m in (other, twin):
        train_step(m, args)
    assert_same_gradients(other, twin)
    assert all(v is before[k] for k, v in model.grapefx.feedback.items())
    train_step(in_place(other, "dfa"), args)
    assert isinstance(copy.deepcopy(model.grapefx), FeedbackModule)


def eager_twin_of(model: nn.Module) -> nn.Module:
    """A second model with the same weights, compiled in place too."""
    fresh, _ = make("cnn")
    fresh.load_state_dict(model.state_dict())
    return in_place(fresh)


def test_the_models_own_hooks_run_in_every_call() -> None:
    model, args = make("mlp")
    in_place(model, "bp")
    train_step(model, args)
    seen: list[Any] = []
    handles = [
        model.register_forward_pre_hook(lambda m, a: seen.append(("pre", m is model))),
        model.register_forward_hook(lambda m, a, out: out * 2),
        model.register_forward_hook(lambda m, a, out: seen.append(("post", m is model))),
        model.register_full_backward_hook(lambda m, gi, go: seen.append(("back", m is model))),
    ]
    twin, _ = make("mlp")
    x = args[0].clone().requires_grad_()
    for _ in range(2):
        train_step(model, (x,))
        assert seen == [("pre", True), ("post", True), ("back", True)]
        seen.clear()
        twin.zero_grad()
        loss_of(twin(x) * 2).backward()
        assert_same_gradients(model, twin)
    assert "forward" not in model.__dict__
    for h in handles:
        h.remove()
    model.layers[0].register_full_backward_hook(lambda m, gi, go: None)  # type: ignore[index,union-attr,operator]
    with pytest.raises(CaptureError, match=r"'layers.0' has a backward hook"):
        train_step(model, args)


def test_a_forward_put_on_the_instance_is_captured() -> None:
    """What accelerate's mixed precision does."""
    model, args = make("mlp")
    twin = eager_twin(model)
    in_place(model, "bp")
    for m in (model, twin):
        inner = m.forward
        m.forward = lambda x, inner=inner: inner(x) * 3  # type: ignore[method-assign]
    for hooked in (False, True):
        if hooked:
            model.register_forward_hook(lambda m, a, out: None)
        held = model.forward
        train_step(model, args)
        train_step(twin, args)
        assert_same_gradients(model, twin)
        assert model.forward is held


def test_a_part_of_a_model() -> None:
    """In a plain parent; and inside a model that is compiled as a whole."""

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make("mlp")[0]
            self.head = nn.Linear(5, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(x)))

    _, args = make("mlp")
    parent = Parent()
    twin = copy.deepcopy(parent)
    in_place(parent.body, "dfa")
    train_step(parent, args)
    train_step(twin, args)
    assert_same_gradients(parent, twin)  # step 0 calibrates
    assert list(parent.state_dict()) == list(twin.state_dict())
    whole = compiled(parent, "bp")
    train_step(whole, args)
    assert_same_gradients(whole, twin)
    assert parent.body.grapefx.feedback_state_dict()["schedule"]["step"] == 1
    train_step(parent, args)
    assert parent.body.grapefx.feedback_state_dict()["schedule"]["step"] == 2


def test_a_model_compiled_in_place_can_be_inspected() -> None:
    model, args = make("mlp")
    in_place(model)
    assert "layers.0" in str(grapefx.inspect(model, *args))


@pytest.mark.slow
def test_the_default_backend() -> None:
    torch.manual_seed(0)
    model = MLP(depth=1)
    x, y = torch.randn(64, 8), torch.randint(0, 5, (64,))
    grapefx.compile(model, inplace=True)
    model.grapefx.set_epoch(0)  # type: ignore[operator,union-attr]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        assert not model(x).requires_grad
