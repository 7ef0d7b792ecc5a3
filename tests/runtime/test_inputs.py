"""Drop-in: whatever a model takes and returns. ``bp`` is the oracle: it must equal eager."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grapefx.errors import CaptureError
from grapefx.runtime.module import FeedbackModule
from grapefx.torch_compat import pytree
from tests.zoo import (
    MLP,
    Masked,
    assert_same_gradients,
    compiled,
    eager_twin,
    loss_of,
    make,
    train_step,
)


@dataclass
class Batch:
    x: Tensor
    extra: dict[str, Any]


@dataclass
class Result:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    note: str = "fine"


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 9)
        self.b = nn.Linear(9, 9)
        self.c = nn.Linear(9, 4)

    def forward(self, batch: Batch, *more: Tensor, scale: float = 1.0, **kwargs: Any) -> Result:
        h = torch.tanh(self.a(batch.x)) * batch.extra["gain"][0] * scale
        for m in more:
            h = h + m
        if kwargs.get("twice"):
            h = h * 2
        g = F.relu(self.b(h + kwargs["pair"].first))
        return Result(self.c(g), (h, g.detach()))


def same_as_eager(net: FeedbackModule, twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """One step of both on the same call; returns the output of ``net``."""
    found = []
    for m in (net, twin):
        m.zero_grad()
        torch.manual_seed(0)
        out = m(*args, **kwargs)
        plain = {"logits": out.logits, "h": out.hidden} if isinstance(out, Result) else out
        loss_of(plain).backward()
        found.append((out, plain))
    assert_same_gradients(net, twin)
    (ours, a), (theirs, b) = found
    assert type(ours) is type(theirs)
    torch.testing.assert_close(a, b)
    return ours


def test_dataclasses_dicts_tuples_and_keywords() -> None:
    model = Structured().double()
    twin = eager_twin(model)
    net = compiled(model, "bp")

    def call(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = torch.randn(n, 8).double()
        batch = Batch(x, {"gain": [torch.rand(n, 1).double()], "name": "train"})
        pair = Pair(torch.randn(n, 9).double(), torch.zeros(1))
        return (batch, torch.randn(n, 9).double()), {"scale": 0.5, "pair": pair, "twice": True}

    for n in (5, 3):
        args, kwargs = call(n)
        out = same_as_eager(net, twin, *args, **kwargs)
        assert isinstance(out, Result) and out.note == "fine"
        assert not out.hidden[1].requires_grad
    assert len(net._captures.programs) == 1  # only the batch size differed
    args, kwargs = call(4)
    kwargs["scale"] = 2.0  # another Python value: another graph
    same_as_eager(net, twin, *args, **kwargs)
    kwargs.pop("twice")
    same_as_eager(net, twin, *args, **kwargs)


class Several(nn.Module):
    """A feature, the logits, an input, a number, None: all are outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        g = torch.tanh(self.b(h))
        y = self.c(g)
        return {"y": y, "features": [h, g], "arg": y.argmax(1), "x": x, "n": 3, "none": None}


@pytest.mark.parametrize("method", ["bp", "grape"])
def test_outputs_that_are_also_features(method: str) -> None:
    model = Several().double()
    twin = eager_twin(model)
    net = compiled(model, method)
    x = torch.randn(5, 8).double()
    out = same_as_eager(net, twin, x)  # grape: a calibration step
    assert out["n"] == 3 and out["none"] is None and out["arg"].dtype == torch.int64
    for _ in range(2):
        torch.testing.assert_close(net(x)["features"][1], twin(x)["features"][1])
        train_step(net, (x,))


def test_a_loss_on_one_of_several_outputs() -> None:
    """The others get no cotangent from autograd: that is a zero."""
    model = Several().double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    x = torch.randn(5, 8).double()
    for key in ("y", "features"):
        for m in (net, twin):
            m.zero_grad()
            out = m(x)[key]
            (out if key == "y" else out[0]).sum().backward()
        assert_same_gradients(net, twin)


class WithLoss(nn.Module):
    """As Hugging Face models: the loss is inside, beside the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 6)
        self.a, self.out = nn.Linear(6, 8), nn.Linear(8, 9)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.out(F.gelu(self.a(self.emb(ids))))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("method", ["bp", "dfa", "grape"])
def test_loss_inside_the_model(method: str) -> None:
    model = WithLoss().double()
    twin = eager_twin(model)
    net = compiled(model, method)
    ids, labels = torch.randint(0, 9, (4, 5)), torch.randint(0, 9, (4, 5))
    for step in range(3):
        for m in (net, twin):
            m.zero_grad()
            m(ids, labels=labels)["loss"].backward()
        torch.testing.assert_close(net.out.weight.grad, twin.out.weight.grad)
        if step == 0 or method == "bp":
            assert_same_gradients(net, twin)
    with torch.no_grad():
        assert list(net(ids)) == ["logits"]
        torch.testing.assert_close(net(ids, labels=labels)["loss"], twin(ids, labels)["loss"])


def test_scalar_loss_as_the_only_output() -> None:
    class OnlyLoss(WithLoss):
        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(ids, labels)["loss"]

    model = OnlyLoss().double()
    twin = eager_twin(model)
    net = compiled(model, "dfa")
    ids, labels = torch.randint(0, 9, (4, 5)), torch.randint(0, 9, (4, 5))
    for step in range(2):
        for m in (net, twin):
            m.zero_grad()
            (2 * m(ids, labels)).backward()
        if step == 0:
            assert_same_gradients(net, twin)
    torch.testing.assert_close(net.out.weight.grad, twin.out.weight.grad)


@pytest.mark.parametrize("method", ["bp", "dfa"])
def test_an_input_that_requires_grad_gets_its_gradient(method: str) -> None:
    model = MLP().double()
    twin = eager_twin(model)
    net = compiled(model, method)
    x = torch.randn(4, 8).double()
    grads = []
    for m in (net, twin):
        leaf = x.clone().requires_grad_()
        loss_of(m(leaf * 2)).backward()  # not a leaf inside
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduce", ["sum", "mean", "expand"])
def test_stride_zero_cotangents(reduce: str) -> None:
    """Trap: ``y.sum().backward()`` hands over an expanded cotangent."""
    model = MLP().double()
    twin = eager_twin(model)
    net = compiled(model, "fdfa")
    x = torch.randn(4, 8).double()
    for step in range(2):
        for m in (net, twin):
            m.zero_grad()
            y = m(x)
            if reduce == "expand":
                y.backward(torch.ones((), dtype=y.dtype).expand_as(y))
            else:
                getattr(y, reduce)().backward()
        if step == 0:
            assert_same_gradients(net, twin)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )


def test_strided_transposed_and_channels_last_inputs() -> None:
    model = conv_net().double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    x = torch.randn(5, 3, 6, 6).double()
    layouts = (
        x,
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3),
        torch.randn(10, 3, 6, 12).double()[::2, :, :, ::2],
        x[:1].expand(5, -1, -1, -1),
        x.flip(0),
    )
    for layout in layouts:
        same_as_eager(net, twin, layout)
        with torch.no_grad():
            torch.testing.assert_close(net(layout), twin(layout))


def test_channels_last_parameters() -> None:
    """Trap: parameter strides are part of what was captured."""
    model = conv_net().double()
    twin = eager_twin(model)
    net = compiled(model, "dfa")
    x = torch.randn(5, 3, 6, 6).double()
    train_step(net, (x,))
    net.to(memory_format=torch.channels_last)
    with net.calibration():
        same_as_eager(net, twin, x.to(memory_format=torch.channels_last))


def test_sequence_of_batch_sizes_makes_at_most_two_programs() -> None:
    """Traps: a first batch of 1; a batch equal to a feature width; to the number of classes."""
    model = MLP().double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    for n in (1, 8, 12, 5, 3, 1, 64, 2, 96):
        same_as_eager(net, twin, torch.randn(n, 8).double())
    assert len(net._captures.programs) <= 2
    for n in (1, 8, 12, 5, 1):
        with torch.no_grad():
            x = torch.randn(n, 8).double()
            torch.testing.assert_close(net(x), twin(x))
    assert len(net._captures.programs) <= 4


@pytest.mark.parametrize("first", [8, 12, 5])
def test_first_batch_equal_to_a_width(first: int) -> None:
    """Trap: a batch equal to another dim specialises, silently."""
    model = MLP().double()
    twin = eager_twin(model)
    net = compiled(model, "grape", tangent_fraction=0.5)
    with net.calibration():
        same_as_eager(net, twin, torch.randn(first, 8).double())
    for n in (7, 12, 2):
        train_step(net, (torch.randn(n, 8).double(),))
        with net.calibration():
            same_as_eager(net, twin, torch.randn(n, 8).double())
    assert len(net._captures.programs) == 1


@pytest.mark.parametrize("fraction, first", [(0.25, 4), (0.125, 8), (1 / 3, 1), (0.9, 2)])
@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder-prenorm", "tied"])
def test_the_first_batch_gives_tangents_to_one_sample(
    name: str, fraction: float, first: int
) -> None:
    """Trap: a sub-batch of 1, or as large as the batch, is taken for a fact of the graph."""

    def batch(n: int) -> tuple[Tensor, ...]:
        return (torch.cat([x] * 3)[:n], *rest)

    model, (x, *rest) = make(name)
    nets = [compiled(copy.deepcopy(model), calib_every=None, tangent_fraction=fraction)
            for _ in range(2)]  # fmt: skip
    for net, n in zip(nets, (first, 12), strict=True):
        train_step(net, batch(n))
    state = nets[0].feedback_state_dict()
    for net in nets:
        net.load_feedback_state_dict(state)
        train_step(net, batch(12))
    assert_same_gradients(nets[0], nets[1])
    ends = [pytree.tree_leaves(net.feedback_state_dict()) for net in nets]
    for a, b in zip(*ends, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            torch.testing.assert_close(a, b)
    assert any(
        isinstance(a, Tensor) and not torch.equal(a, b)
        for a, b in zip(ends[0], pytree.tree_leaves(state), strict=True)
    )


def test_the_mask_has_as_many_rows_as_the_batch() -> None:
    """Trap: attention mask (T, T) with T == N at the first call."""
    model = Masked(depth=1).double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    for n, t in ((5, 5), (3, 5), (5, 5), (4, 5)):
        x = torch.randn(n, t, 8).double()
        same_as_eager(net, twin, x, torch.ones(t, t).tril() == 0)
    assert len(net._captures.programs) <= 2


class TableFirst(nn.Module):
    """The first tensor argument has no batch dim."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, table: Tensor, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) @ table))


@pytest.mark.parametrize("method", ["bp", "grape"])
def test_the_first_input_has_no_batch_dim(method: str) -> None:
    model = TableFirst().double()
    twin = eager_twin(model)
    net = compiled(model, method)
    table = torch.randn(6, 6).double()
    for n in (4, 9, 6, 2):
        x = torch.randn(n, 8).double()
        with net.calibration():
            same_as_eager(net, twin, table, x)
        train_step(net, (table, x))
    assert len(net._captures.programs) <= 2


def test_batch_in_another_dim() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(8, 6)
            self.mid, self.out = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.mid(self.rnn(x)[0])))

    model = TimeFirst().double()
    twin = eager_twin(model)
    net = compiled(model, "grape", batch_dim=1, tangent_fraction=0.5)
    for n in (4, 6, 2):
        x = torch.randn(5, n, 8).double()
        with net.calibration():
            same_as_eager(net, twin, x)
        train_step(net, (x,))
    assert len(net._captures.programs) == 1
    assert {layer.fold[0] for layer in net.plan.layers} == {1}  # type: ignore[union-attr]


def test_sequence_lengths_keep_their_own_maps() -> None:
    """A dense map belongs to one sample shape: another length must not reuse its matrix."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.b(torch.relu(self.a(x)))).mean(1))

    model = Pooled().double()
    twin = eager_twin(model)
    net = compiled(model, "grape")
    for t in (4, 7, 4, 7, 2):
        x = torch.randn(3, t, 8).double()
        with net.calibration():
            same_as_eager(net, twin, x)
        train_step(net, (x,))
    assert len(net._captures.programs) == 3


def test_zero_dim_and_integer_inputs() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.a, self.b = nn.Embedding(7, 5), nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, gain: Tensor, ids: Tensor, flag: bool, shift: int) -> Tensor:
            h = self.emb(ids + shift).mean(1) * gain
            return self.b(self.a(h).relu() if flag else self.a(h).tanh())

    model = Scaled().double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    ids = torch.randint(0, 5, (4, 3))
    for flag, shift in ((True, 0), (False, 0), (True, 2)):
        same_as_eager(net, twin, torch.tensor(1.5).double(), ids, flag, shift)
        same_as_eager(net, twin, torch.tensor(-0.5).double(), ids[:2], flag, shift)


def test_an_input_changed_in_place_is_refused() -> None:
    class Writes(MLP):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return super().forward(x)

    net = compiled(Writes(), "dfa")
    with pytest.raises(CaptureError, match="in place"):
        net(torch.randn(4, 8))


def test_the_output_may_be_a_list_with_the_same_tensor_twice() -> None:
    class Twice(MLP):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return [y, y, (x, y[:, 0])]

    model = Twice().double()
    twin = eager_twin(model)
    net = compiled(model, "dfa")
    same_as_eager(net, twin, torch.randn(4, 8).double())
