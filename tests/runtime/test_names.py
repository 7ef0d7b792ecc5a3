"""Names that a model and the compiled module share: none is lost without a word."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grapefx
from grapefx.errors import GrapefxWarning
from grapefx.runtime import names
from grapefx.runtime.module import FeedbackModule

OURS = sorted(names.public(FeedbackModule))


class Base(nn.Module):
    _scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self._shift = 0.0
        self.epochs: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * self._scale + self._shift)


def compiled(model: nn.Module, **options: Any) -> Any:
    return grapefx.compile(model, method="dfa", calib_every=None, backend="eager", **options)


@pytest.mark.parametrize("name", ["_shift", "_scale"])
def test_private_names_of_the_model_reach_it(name: str) -> None:
    model = Base()
    net, x = compiled(model), torch.randn(6, 4)
    if name in vars(model):  # a capture does not see an instance attribute take a class's place
        net(x)
    setattr(net, name, 3.0)
    assert getattr(model, name) == 3.0 and name not in vars(net)
    torch.testing.assert_close(net(x), model(x))
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x))
    delattr(net, name)
    assert name not in vars(model)


def test_other_private_names_stay_on_the_wrapper() -> None:
    model = Base()
    net = compiled(model)
    net._note = 1
    assert vars(net)["_note"] == 1 and not hasattr(model, "_note")
    del net._note
    assert "_note" not in vars(net)


def with_attribute(name: str, how: str) -> nn.Module:
    model = Base()
    if how == "instance":
        vars(model)[name] = "the model's"
    elif how == "buffer":
        model._buffers[name] = torch.ones(1)
    elif how == "child":
        model._modules[name] = nn.Identity()
    else:
        kind = type("Own", (Base,), {name: lambda self, *_: "the model's"})
        model = kind()
    return model


@pytest.mark.parametrize("how", ["instance", "buffer", "child", "method"])
@pytest.mark.parametrize("name", [*OURS, "_state", "_original", "_captures"])
def test_collisions_are_said_and_both_can_be_reached(name: str, how: str) -> None:
    model = with_attribute(name, how)
    with pytest.warns(GrapefxWarning, match=f"{name}") as said:
        net = compiled(model)
    assert len(said) == 1 and said[0].filename == __file__
    if name != "original":
        assert getattr(net.original, name) is not None
    assert net.original is model
    net(torch.randn(6, 4)).sum().backward()
    with pytest.raises(AttributeError, match=f"net.original.{name}"):
        setattr(net, name, 0)


def test_names_without_collision_are_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = compiled(Base())
        compiled(with_attribute("model", "child"))
        compiled(with_attribute("targets", "instance"), inplace=True)
    with pytest.raises(AttributeError, match="grapefx's own"):
        net.targets = torch.zeros(3)


@pytest.mark.parametrize("name", ["modules", "apply", "type", "named_parameters"])
def test_an_instance_attribute_that_hides_a_method_of_torch(name: str) -> None:
    model = Base()
    setattr(model, name, [1, 2])
    with pytest.warns(GrapefxWarning, match=f"net.original.{name}"):
        compiled(model)


class Curriculum(Base):
    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)
        self._scale = 1.0 + epoch


def test_a_models_own_set_epoch_is_called_too() -> None:
    model = Curriculum()
    with pytest.warns(GrapefxWarning, match="own set_epoch") as said:
        net = grapefx.compile(model, method="dfa", backend="eager")
    assert "hidden" not in str(said[0].message)
    net.set_epoch(2)
    assert model.epochs == [2] and net._state.schedule.epoch == 2
    x = torch.randn(6, 4)
    torch.testing.assert_close(net(x), model(x))


def test_in_place_each_has_its_own() -> None:
    model = grapefx.compile(Curriculum(), method="dfa", backend="eager", inplace=True)
    model.set_epoch(1)
    model.grapefx.set_epoch(2)
    assert model.epochs == [1] and model.grapefx._state.schedule.epoch == 2


def test_methods_of_torch_that_a_model_redefines() -> None:
    class Some(Base):
        def parameters(self, recurse: bool = True) -> Any:
            return self.b.parameters(recurse)

        def to(self, *args: Any, **kwargs: Any) -> Any:
            self.moved = True
            return super().to(*args, **kwargs)

    model = Some()
    net = compiled(model)
    assert len(list(net.parameters())) == 2
    assert net.to(torch.float64) is net and model.moved
    assert model.a.weight.dtype is torch.float64
    net(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    assert model.a.weight.grad is not None
