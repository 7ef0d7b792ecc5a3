"""Drop-in: state. ``state_dict`` is the plain model's; resuming is never having stopped."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grapefx.errors import OptionError, StateError
from grapefx.runtime.module import FeedbackModule
from tests.zoo import MLP, compiled, eager_twin, loss_of, make, train_step


def test_keys_are_the_plain_models_both_ways() -> None:
    model, args = make("cnn")
    plain = eager_twin(model)
    net = compiled(model, "grape")
    train_step(net, args)
    assert list(net.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(net.state_dict())
    net.load_state_dict(plain.state_dict())
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in net.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert [n for n, _ in net.named_modules()] == [n for n, _ in plain.named_modules()]
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({})


def test_inside_a_parent_module() -> None:
    """Keys stay plain in a parent too; modes, moves and gradients pass through it."""

    class Parent(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body
            self.head = nn.Linear(5, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(x)))

    torch.manual_seed(0)
    model, args = make("cnn")
    plain = Parent(eager_twin(model))
    parent = Parent(compiled(model, "dfa"))
    parent.head.load_state_dict(plain.head.state_dict())
    assert list(parent.state_dict()) == list(plain.state_dict())
    parent.load_state_dict(plain.state_dict())
    for m in (parent, plain):
        m.zero_grad()
        torch.manual_seed(0)
        loss_of(m(*args)).backward()
    for p, q in zip(parent.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)  # step 0 calibrates
    parent.eval()
    assert not any(m.training for m in model.modules())
    parent.train()
    assert all(m.training for m in model.modules())
    parent.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert list(copy.deepcopy(parent).state_dict()) == list(plain.state_dict())


def test_wrapping_changes_nothing_of_the_model() -> None:
    model, _ = make("cnn")
    model.eval()
    net = compiled(model)
    assert not net.training and not any(m.training for m in model.modules())
    assert "Sequential trained by grape" in repr(net)
    with pytest.raises(OptionError, match="already"):
        compiled(net)


def test_methods_and_attributes_are_reachable() -> None:
    class Speaks(MLP):
        factor = 3

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gain", torch.tensor(2.0))

        def generate(self, n: int) -> int:
            return n * self.factor

    net = compiled(Speaks())
    assert net.generate(2) == 6 and net.factor == 3 and net.gain == 2 and len(net.layers) == 3
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = net.nothing_such


def steps(net: FeedbackModule, optimizer: Any, args: Any, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` of a run with two steps an epoch."""
    for k in range(first, last):
        if k % 2 == 0:
            net.set_epoch(k // 2)
        train_step(net, args, seed=k)
        optimizer.step()


def everything(net: FeedbackModule) -> dict[str, Tensor]:
    return {**net.state_dict(), **{f"feedback/{k}": v for k, v in net.feedback.items()}}


def assert_equal(a: FeedbackModule, b: FeedbackModule) -> None:
    left, right = everything(a), everything(b)
    assert left.keys() == right.keys()
    for k, v in left.items():
        assert torch.equal(v, right[k]), k


@pytest.mark.parametrize(
    ("name", "method", "options"),
    [
        ("cnn", "grape", {"calib_every": 2}),
        ("mlp", "fdfa", {"calib_every": 1, "tangent_fraction": 0.5, "align_every": 2}),
        ("mlp", "grape", {"calib_every": 2, "calib_update": "sgd"}),
    ],
)
def test_resume_is_bit_exact(name: str, method: str, options: dict[str, Any]) -> None:
    """Stop in the middle of epoch 1, save, reload into a fresh model, go on to epoch 4."""
    model, args = make(name)
    fresh = eager_twin(model)
    net = compiled(model, method, **options)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    steps(net, optimizer, args, 0, 3)
    file = io.BytesIO()
    torch.save(
        {"m": net.state_dict(), "f": net.feedback_state_dict(), "o": optimizer.state_dict()}, file
    )
    steps(net, optimizer, args, 3, 9)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = compiled(fresh, method, **options)
    other.load_state_dict(saved["m"])
    other.load_feedback_state_dict(saved["f"])
    optimizer = torch.optim.Adam(other.parameters(), 1e-2)
    optimizer.load_state_dict(saved["o"])
    steps(other, optimizer, args, 3, 9)
    assert_equal(net, other)
    assert net.feedback_state_dict()["schedule"] == other.feedback_state_dict()["schedule"]
    assert net.alignment() == other.alignment()


def test_going_back_in_one_process_is_exact_too() -> None:
    """Loading an earlier state into a module that has run on."""
    model, args = make("mlp")
    net = compiled(model, "grape")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    steps(net, optimizer, args, 0, 3)
    weights = copy.deepcopy(net.state_dict())
    feedback = net.feedback_state_dict()
    steps(net, optimizer, args, 3, 6)
    first = {k: v.clone() for k, v in everything(net).items()}
    net.load_state_dict(weights)
    net.load_feedback_state_dict(feedback)
    steps(net, optimizer, args, 3, 6)
    for k, v in everything(net).items():
        assert torch.equal(v, first[k]), k


_CALLS: list[nn.Module] = []


def _seen(module: nn.Module, *_: Any) -> None:
    _CALLS.append(module)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_go_their_own_way(how: str) -> None:
    model, args = make("cnn")
    net = compiled(model, "grape")
    train_step(net, args)
    train_step(net, args)
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert isinstance(other, FeedbackModule)
    assert_equal(net, other)
    before = {k: v.clone() for k, v in everything(net).items()}
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    steps(other, optimizer, args, 2, 4)
    for k, v in everything(net).items():
        assert torch.equal(v, before[k]), k
    steps(net, torch.optim.SGD(net.parameters(), 0.1), args, 2, 4)
    assert_equal(net, other)


def test_a_copy_before_the_first_call() -> None:
    model, args = make("mlp")
    net = compiled(model, "grape", seed=3)
    other = pickle.loads(pickle.dumps(net))
    train_step(net, args)
    train_step(other, args)
    assert_equal(net, other)


def test_progressive_unfreezing_and_resume() -> None:
    """A checkpoint may hold maps of layers that are not cut now, and lack some that will be."""
    model, args = make("mlp")
    fresh = eager_twin(model)

    def phase(net: FeedbackModule, trainable: bool) -> None:
        net.layers[0].requires_grad_(trainable)
        net.layers[1].requires_grad_(trainable)
        train_step(net, args)

    net = compiled(model, "grape", calib_every=None)
    phase(net, False)
    early = net.feedback_state_dict()
    phase(net, True)
    late = net.feedback_state_dict()
    assert len(late["tensors"]) > len(early["tensors"])
    for saved, later in ((early, True), (late, False)):
        other = compiled(copy.deepcopy(fresh), "grape", calib_every=None)
        other.load_feedback_state_dict(saved)
        phase(other, later)
    other = compiled(fresh, "grape", calib_every=None)
    other.load_feedback_state_dict(early)
    phase(other, True)
    assert_equal(net, other)


def test_the_feedback_state_of_something_else_is_refused_and_nothing_changes() -> None:
    model, args = make("mlp")
    net = compiled(model, "grape")
    train_step(net, args)
    good = net.feedback_state_dict()
    before = net.feedback

    def other(method: str = "grape", **kwargs: Any) -> dict[str, Any]:
        made = compiled(MLP(**kwargs).double(), method)
        train_step(made, args)
        return made.feedback_state_dict()

    unit = compiled(MLP().double(), "grape", norm="unit")
    train_step(unit, args)
    bad: list[tuple[Any, str]] = [
        (other("dfa"), "learned by 'dfa'"),
        (other(width=16), r"another architecture.*layers.0.weight \(16, 8\) -> \(12, 8\)"),
        (other(depth=2), "another architecture"),
        (unit.feedback_state_dict(), "other options"),
        ({**good, "version": 99}, "version 99"),
        ({"tensors": {}}, "not a feedback state dict"),
        (model.state_dict(), "not a feedback state dict"),
        ("x", "not a feedback state dict"),
    ]
    for state, message in bad:
        with pytest.raises(StateError, match=message):
            net.load_feedback_state_dict(state)
        assert all(torch.equal(v, before[k]) for k, v in net.feedback.items())
    fresh = compiled(MLP().double(), "grape")
    with pytest.raises(StateError):  # before its first call as well
        fresh.load_feedback_state_dict(bad[1][0])
    net.load_feedback_state_dict(good)


def test_hooks_and_attributes_of_the_net_go_with_its_copies() -> None:
    model, (x,) = make("mlp")
    net = compiled(model, "dfa")
    net.register_forward_hook(_seen)
    net._mark = [1]
    other = copy.deepcopy(net)
    third = pickle.loads(pickle.dumps(net))
    _CALLS.clear()
    for n in (other, third):
        n(x)
        assert n._mark == [1] and n._mark is not net._mark
    assert [id(n) for n in _CALLS] == [id(other), id(third)]


def test_state_dict_hooks_on_the_net_run() -> None:
    net = compiled(make("mlp")[0], "dfa")
    seen: list[str] = []
    net.register_state_dict_pre_hook(lambda *_: seen.append("saved"))
    net.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    net.load_state_dict(net.state_dict())
    assert seen == ["saved", "loaded"]


def test_what_the_model_overrides_is_called() -> None:
    class Own(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.spare = torch.zeros(2), 1

        def _apply(self, fn: Any, *args: Any) -> Any:
            self.plain = fn(self.plain)
            return super()._apply(fn, *args)

        def eval(self) -> Any:
            self.seen = True
            return super().eval()

    model = Own()
    net = compiled(model, "dfa")
    assert net.double() is net and net.eval() is net
    assert model.plain.dtype is torch.float64 and model.seen and not model.training
    del net.spare
    assert not hasattr(model, "spare")


def test_a_state_loaded_before_the_first_call_is_what_is_saved_and_copied() -> None:
    model, args = make("mlp")
    net = compiled(model, "grape")
    train_step(net, args)
    saved = net.feedback_state_dict()
    other = copy.deepcopy(compiled(make("mlp")[0], "grape"))
    for again in (other, copy.deepcopy(net)):
        again.load_feedback_state_dict(saved)
        for n in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
            for part in ("schedule", "readings"):
                assert n.feedback_state_dict()[part] == saved[part]
            for found in (n.feedback, n.feedback_state_dict()["tensors"]):
                assert found.keys() == saved["tensors"].keys()
                assert all(torch.equal(v, saved["tensors"][k]) for k, v in found.items())


@pytest.mark.parametrize("late", [False, True], ids=["before-a-call", "after-a-call"])
@pytest.mark.parametrize(
    ("saved", "mine", "message"),
    [
        ({"feedback": "low-rank:4"}, {"feedback": "low-rank:4", "seed": 1}, "seed 0.*seed 1"),
        ({"feedback": "sparse:2"}, {"feedback": "sparse:2", "seed": 1}, "seed 0.*seed 1"),
        ({"feedback": "low-rank:4"}, {}, "low-rank 4.*a full one"),
        ({}, {"points": "1"}, "other points="),
    ],
)
def test_a_state_of_other_maps_is_refused_and_nothing_changes(
    saved: dict[str, Any], mine: dict[str, Any], message: str, late: bool
) -> None:
    torch.manual_seed(0)
    args = (torch.randn(6, 8),)
    layers = (nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5))
    first = compiled(nn.Sequential(*layers), "dfa", calib_every=None, **saved)
    train_step(first, args)
    state = first.feedback_state_dict()
    net = compiled(nn.Sequential(*layers), "dfa", calib_every=None, **mine)
    if late:
        train_step(net, args)
        before = net.feedback
        with pytest.raises(StateError, match=message):
            net.load_feedback_state_dict(state)
        assert net.feedback.keys() == before.keys()
        assert all(torch.equal(v, before[k]) for k, v in net.feedback.items())
        train_step(net, args)
    else:
        net.load_feedback_state_dict(state)  # its feedback points are not known yet
        with pytest.raises(StateError, match=message):
            net(*args)
