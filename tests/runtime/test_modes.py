"""Drop-in: modes and everything that may change between two steps. ``bp`` must follow eager.

Trap: without Dynamo's guards a capture goes stale when a submodule changes mode, is frozen, swapped
or re-tied, when a number on a module changes, or when a parameter moves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grapefx.runtime.module import FeedbackModule
from tests.zoo import (
    MLP,
    Tied,
    assert_same_buffers,
    assert_same_gradients,
    cnn,
    compiled,
    eager_twin,
    make,
    train_step,
)


def same(net: FeedbackModule, x: Tensor) -> None:
    """With gradients and without, what the model itself returns."""
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(net(x), net._original(x))


def follow(net: FeedbackModule, twin: nn.Module, x: Tensor, seed: int = 0) -> None:
    """One exact step of both."""
    with net.calibration():
        ours = train_step(net, (x,), seed)
    theirs = train_step(twin, (x,), seed)
    torch.testing.assert_close(ours, theirs)
    assert_same_gradients(net, twin)
    assert_same_buffers(net, twin)


def test_train_eval_and_the_grad_modes() -> None:
    model, (x,) = make("cnn")
    twin = eager_twin(model)
    net = compiled(model, "grape")
    follow(net, twin, x)
    for m in (net, twin):
        m.eval()
    follow(net, twin, x)  # gradients in eval mode: running statistics, no dropout
    for context in (torch.no_grad, torch.inference_mode):
        net.eval()
        twin.eval()
        with context():
            torch.testing.assert_close(net(x), twin(x))
            assert not net(x).requires_grad
        for m in (net, twin):
            m.train()
        with context():  # statistics are updated without gradients too
            torch.manual_seed(0)
            ours = net(x)
            torch.manual_seed(0)
            torch.testing.assert_close(ours, twin(x))
        assert_same_buffers(net, twin)
    assert net.training and model.training
    follow(net, twin, x)


def test_inference_mode_first() -> None:
    """The very first call may be an evaluation."""
    model, (x,) = make("cnn")
    twin = eager_twin(model)
    net = compiled(model.eval(), "grape")
    twin.eval()
    with torch.inference_mode():
        torch.testing.assert_close(net(x), twin(x))
    net.train()
    twin.train()
    follow(net, twin, x)


def test_buffers_change_once_a_step() -> None:
    model, (x,) = make("cnn")
    net = compiled(model, "grape")
    for step in range(1, 4):
        train_step(net, (x,))
        assert int(net.get_buffer("1.num_batches_tracked")) == step


def freeze(model: nn.Module) -> None:
    for p in model[0].parameters():  # type: ignore[index]
        p.requires_grad_(False)


def frozen_norm(model: nn.Module) -> None:
    model[1].eval()  # type: ignore[index]


def unfreeze(model: nn.Module) -> None:
    model.requires_grad_(True)
    model.train()


def other_dropout(model: nn.Module) -> None:
    model[9].p = 0.6  # type: ignore[index,assignment]


def swap(model: nn.Module) -> None:
    torch.manual_seed(3)
    model[6] = nn.Tanh()  # type: ignore[index]
    model[10] = nn.Linear(24, 9).double()  # type: ignore[index]


def freeze_a_bias(model: nn.Module) -> None:
    model[4].bias.requires_grad_(False)  # type: ignore[index]


def last_only(model: nn.Module) -> None:
    model.requires_grad_(False)
    model[10].requires_grad_(True)  # type: ignore[index]
    model[12].requires_grad_(True)  # type: ignore[index]


def other_pool(model: nn.Module) -> None:
    model[7].kernel_size = 1  # type: ignore[index,assignment]
    model[7].stride = 2  # type: ignore[index,assignment]


@pytest.mark.parametrize("method", ["bp", "fdfa"])
def test_changes_between_steps(method: str) -> None:
    """Progressive unfreezing, frozen batch norm, dropout p, swapped children."""
    model, (x,) = make("cnn")
    twin = eager_twin(model)
    net = compiled(model, method)
    changes: tuple[Callable[[nn.Module], None], ...] = (
        (last_only, freeze_a_bias, unfreeze, freeze, frozen_norm, other_dropout, other_pool)
        if method == "bp"
        else (last_only, unfreeze, frozen_norm)
    )
    for k, change in enumerate(changes):
        change(model)
        change(twin)
        follow(net, twin, x, seed=k)
        train_step(net, (x,), seed=k)
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (not q.requires_grad), name
        twin.load_state_dict(net.state_dict())


def test_swapped_child() -> None:
    model, (x,) = make("cnn")
    twin = eager_twin(model)
    net = compiled(model, "bp")
    follow(net, twin, x)
    swap(model)
    swap(twin)
    follow(net, twin, x)


def test_a_parameter_tied_or_untied_later() -> None:
    model = Tied().double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    x = torch.randint(0, 11, (3, 4))
    follow(net, twin, x)
    for m in (model, twin):
        m.out.weight = nn.Parameter(m.emb.weight.detach() * 2)
    follow(net, twin, x)
    for m in (model, twin):
        m.out.weight = m.emb.weight
    follow(net, twin, x)


def test_a_parameter_of_another_shape() -> None:
    model = MLP(6, 1).double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    x = torch.randn(4, 8).double()
    follow(net, twin, x)
    torch.manual_seed(1)
    w, b = torch.randn(9, 6).double(), torch.randn(9).double()
    for m in (model, twin):
        m.out.weight, m.out.bias = nn.Parameter(w.clone()), nn.Parameter(b.clone())
    follow(net, twin, x)


def test_hooks_added_later_are_seen() -> None:
    model = MLP().double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    x = torch.randn(4, 8).double()
    follow(net, twin, x)

    def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * 2

    handles = [m.layers[0].register_forward_hook(double) for m in (model, twin)]  # type: ignore[index,union-attr]
    follow(net, twin, x)
    for h in handles:
        h.remove()
    follow(net, twin, x)


def test_parameters_moved_to_another_dtype() -> None:
    model, (x,) = make("cnn", torch.float32)
    net = compiled(model, "grape")
    train_step(net, (x,))
    train_step(net, (x,))
    net.double()
    twin = eager_twin(model)
    follow(net, twin, x.double())
    train_step(net, (x.double(),))
    assert {t.dtype for t in net.feedback.values()} == {torch.float64}


def test_load_state_dict_by_copy_and_by_assignment() -> None:
    model, (x,) = make("cnn")
    net = compiled(model, "bp")
    twin = eager_twin(model)
    follow(net, twin, x)
    other, _ = make("cnn")
    for p in other.parameters():
        p.data.mul_(0.5)
    for assign in (False, True):
        net.load_state_dict(other.state_dict(), assign=assign)
        twin.load_state_dict(other.state_dict())
        follow(net, twin, x)
        programs = len(net._captures.programs)
    assert programs == 1


def test_a_number_that_never_rests_is_named_once() -> None:
    """Each value of it needs a capture, and nobody would know why training crawls."""

    class Gain(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.gain = 1

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain

    model = nn.Sequential(nn.Linear(4, 4), Gain())
    net = compiled(model, "bp").eval()
    x = torch.randn(2, 4)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for k in range(12):
            model[1].gain = k
            torch.testing.assert_close(net(x), model(x))
    assert len([w for w in caught if "'1.gain'" in str(w.message)]) == 1


def test_a_number_that_matters_is_read_again() -> None:
    class Gain(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.gain = 1.0
            self.shape = (2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain

    model = Gain().double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    x = torch.randn(4, 8).double()
    for gain in (1.0, 2.0, 1.0, 0.5, 3.0):
        model.gain = twin.gain = gain
        follow(net, twin, x)


@pytest.mark.parametrize("kind", ["list", "dict", "none", "numpy"])
def test_numbers_in_containers_are_read_again(kind: str) -> None:
    class Gain(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.gains: Any = {"list": [1.0], "dict": {"g": 1.0}, "numpy": np.float64(1)}.get(kind)

        def forward(self, x: Tensor) -> Tensor:
            gains = self.gains[0] if kind == "list" else self.gains
            gains = gains["g"] if kind == "dict" else gains
            return super().forward(x) * (1.0 if gains is None else float(gains))

    model = Gain().double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    x = torch.randn(4, 8).double()
    follow(net, twin, x)
    for gain in (2.0, 0.5):
        for m in (model, twin):
            if kind in ("list", "dict"):
                m.gains[0 if kind == "list" else "g"] = gain
            else:
                m.gains = np.float64(gain) if kind == "numpy" else gain
        follow(net, twin, x)


def test_a_numpy_array_among_the_arguments_is_read_whole() -> None:
    class Masked(MLP):
        def forward(self, x: Tensor, mask: Any) -> Tensor:
            return super().forward(x) * torch.from_numpy(mask).sum()

    model = Masked()
    net = compiled(model, "bp")
    x = torch.randn(4, 8)
    mask = np.ones(2000, dtype=np.float32)
    for stop in (1000, 1500):
        mask[5:stop] = 0  # its repr leaves the middle out
        torch.testing.assert_close(net(x, mask), model(x, mask))


class _Mode(Enum):
    ADD = 1
    MULTIPLY = 2


class _Configured(nn.Module):
    """Numbers where a fingerprint of public attributes does not see them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self._gain, self._unread = 2.0, 0
        self._list = [1.0]
        self.config = config
        self.mode = _Mode.ADD

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x) * self._gain + self._list[0] + self.config.shift
        return out + 1 if self.mode is _Mode.ADD else out * 3


class _Config:
    shift = 0.0

    def __init__(self) -> None:
        self.shift = 1.0


@pytest.mark.parametrize("config", [_Config, lambda: SimpleNamespace(shift=1.0)])
def test_numbers_that_a_forward_reads_are_read_again(config: Any) -> None:
    model = nn.Sequential(_Configured(config()), nn.ReLU(), _Configured(config()))
    model[2].layer = nn.Linear(3, 3)
    net = compiled(model, "bp")
    x = torch.randn(2, 4)

    same(net, x)
    for change in (
        lambda: setattr(model[0], "_gain", 5.0),
        lambda: model[0]._list.__setitem__(0, 4.0),
        lambda: setattr(model[2].config, "shift", -2.0),
        lambda: setattr(model[0], "config", SimpleNamespace(shift=7.0)),
        lambda: setattr(model[2], "mode", _Mode.MULTIPLY),
    ):
        change()
        same(net, x)
    programs = len(net._captures.programs)
    model[0]._unread = 3  # which no graph depends on
    model[0]._gain = 2.0
    model[0]._gain = 5.0
    same(net, x)
    assert len(net._captures.programs) == programs


def test_an_attribute_set_on_the_wrapper_reaches_the_model() -> None:
    model, (x,) = make("cnn")
    net = compiled(model, "bp")
    twin = eager_twin(model)
    follow(net, twin, x)
    model[9].p = twin[9].p = 0.0  # type: ignore[index]
    follow(net, twin, x)

    class Gain(MLP):
        gain = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.gain = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain

    plain = Gain().double()
    twin = eager_twin(plain)
    wrapped = compiled(plain, "bp")
    wrapped.gain = 3.0
    twin.gain = 3.0
    follow(wrapped, twin, torch.randn(4, 8).double())
    assert plain.gain == 3.0


def test_unrolled_dropout_is_eagers(  # Trap: torch's decomposition loses LSTM/GRU dropout
) -> None:
    model, (x,) = make("lstm")
    twin = eager_twin(model)
    net = compiled(model, "bp")
    a = train_step(net, (x,), 0)
    b = train_step(net, (x,), 1)
    assert a != b  # dropout between the layers is drawn
    torch.testing.assert_close(b, train_step(twin, (x,), 1))


def test_cnn_runs_the_whole_zoo_of_changes_in_feedback_mode() -> None:
    """No exactness here: a feedback step after each change runs and learns."""
    model = cnn().double()
    net = compiled(model, "grape", calib_every=None)
    x = torch.randn(6, 2, 8, 8).double()
    for change in (lambda m: None, last_only, unfreeze, freeze):
        change(model)
        before = net.feedback
        train_step(net, (x,))
        changed = [
            k for k, v in net.feedback.items() if k in before and not torch.equal(v, before[k])
        ]
        assert changed or not before


@pytest.mark.parametrize("name", ["scale", "_scale"])
def test_tensor_attributes_are_read_in_every_call(name: str) -> None:
    class Scaled(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / getattr(self, name)

    model = Scaled()
    setattr(model, name, torch.tensor(1.0))
    net = compiled(model, "bp")
    x = torch.randn(3, 8)

    same(net, x)
    programs = len(net._captures.programs)
    getattr(model, name).fill_(4.0)
    same(net, x)
    setattr(model, name, torch.tensor(9.0))
    same(net, x)
    assert len(net._captures.programs) == programs  # an input of the graph, not a constant
    setattr(model, name, torch.linspace(1, 2, 5))  # of another shape
    same(net, x)
    assert len(net._captures.programs) > programs


@pytest.mark.parametrize("how", ["list", "attribute", "outside"])
def test_trainable_tensors_that_are_not_registered_get_their_gradient(how: str) -> None:
    outside = nn.Parameter(torch.ones(5))

    class Hides(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [nn.Linear(5, 5)]
            self.plain = torch.ones(5, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if how == "list":
                return self.hidden[0](out)
            return out * (self.plain if how == "attribute" else outside)

    model, x = Hides(), torch.randn(3, 8)
    hidden = {"list": model.hidden[0].weight, "attribute": model.plain, "outside": outside}[how]
    model(x).pow(2).sum().backward()
    expected, hidden.grad = hidden.grad, None
    for method in ("bp", "dfa"):
        compiled(model, method)(x).pow(2).sum().backward()
        torch.testing.assert_close(hidden.grad, expected)
        hidden.grad = None


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_a_teacher_that_is_not_registered_may_be_used_without_gradient(how: str) -> None:
    class Distilled(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = [nn.Linear(8, 5)]  # a list: no part of the state dict

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if how == "detach":
                return super().forward(x), self.teacher[0](x).detach()
            with torch.no_grad():
                target = self.teacher[0](x)
            return super().forward(x), target

    model = Distilled()
    twin = eager_twin(model)
    net, x = compiled(model, "bp"), torch.randn(3, 8)
    for m in (net, twin):
        out, target = m(x)
        (out - target).pow(2).sum().backward()
    assert_same_gradients(net, twin, 1e-6)
    with torch.no_grad():
        model.teacher[0].weight.mul_(2)  # in place: the graph reads the same memory
    torch.testing.assert_close(net(x)[1], model(x)[1])
