"""Lengths beside the batch: a dim that changes becomes symbolic, and the steps stay what they were.

A token model meets dozens of lengths. It may be captured twice a mode (at the first length, then
with a symbol) and compiled twice a kind of step; its gradients are eager's at each length, and what
it learns is what a fresh net, captured at that length alone, would learn from the same feedback.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grapefx.errors import GrapefxWarning
from grapefx.runtime.module import FeedbackModule
from tests.zoo import assert_same_gradients, compiled, eager_twin, train_step

LENGTHS = tuple(range(7, 26, 2))
SIZES = (4, 3, 5, 2, 6)
COMPARED = (1, 4, 9)  # where a fresh net is captured: the first with a symbol, and later ones


class Tokens(nn.Module):
    """An embedding and an encoder layer under a causal mask that is made in the forward."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(17, 8)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(8, 17)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        mask = torch.full((n, n), float("-inf"), dtype=torch.float64, device=x.device).triu(1)
        return self.head(self.encoder(self.embedding(x), mask=mask))


class Padded(Tokens):
    """The same with an argument that says which tokens are padding."""

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:  # type: ignore[override]
        h = self.encoder(self.embedding(x), src_key_padding_mask=padding)
        return self.head(h)


def token_model(padded: bool) -> nn.Module:
    """One of the two, always with the same weights."""
    torch.manual_seed(0)
    return (Padded() if padded else Tokens()).double()


def batches(padded: bool) -> Iterator[tuple[Tensor, ...]]:
    """A batch for each length; the batch size changes as well."""
    generator = torch.Generator().manual_seed(2)
    for k, n in enumerate(LENGTHS):
        size = SIZES[k % len(SIZES)]
        x = torch.randint(0, 17, (size, n), generator=generator)
        if padded:
            kept = torch.randint(2, n + 1, (size, 1), generator=generator)
            yield x, torch.arange(n) >= kept
        else:
            yield (x,)


def assert_few_programs(net: FeedbackModule, modes: int = 1) -> None:
    """Two captures a mode, and two compilations of every kind of step."""
    programs = net._captures.programs.values()
    assert len(programs) <= 2 * modes, f"{len(programs)} captures"
    kinds = Counter(kind for p in programs for kind, _ in p.steps)
    assert all(n <= 2 for n in kinds.values()), f"compilations: {dict(kinds)}"


padded_or_causal = pytest.mark.parametrize("padded", [False, True], ids=["causal", "padded"])


@padded_or_causal
def test_exact_gradients_at_every_length(padded: bool) -> None:
    """``bp`` follows eager to the last digits, and is captured twice."""
    model = token_model(padded)
    twin = eager_twin(model)
    net = compiled(model, "bp", calib_every=None)
    for args in batches(padded):
        torch.testing.assert_close(train_step(net, args), train_step(twin, args))
        assert_same_gradients(net, twin, tol=1e-10)
    assert_few_programs(net)


@padded_or_causal
def test_without_gradients(padded: bool) -> None:
    """An evaluation over lengths in between: two captures of its own."""
    model = token_model(padded)
    twin = eager_twin(model)
    net = compiled(model, "bp", calib_every=None)
    for args in batches(padded):
        train_step(net, args)
        with torch.no_grad():
            torch.testing.assert_close(net(*args), twin(*args))
    assert_few_programs(net, modes=2)


def fresh(net: FeedbackModule, method: str, **options: Any) -> FeedbackModule:
    """A net that has captured nothing, with the weights and the feedback of another."""
    other = compiled(copy.deepcopy(net._original), method, **options)
    other.load_feedback_state_dict(copy.deepcopy(net.feedback_state_dict()))
    return other


def assert_same_feedback(a: FeedbackModule, b: FeedbackModule) -> None:
    """Every feedback tensor of ``b`` is in ``a``, with the same values."""
    for name, value in b.feedback.items():
        torch.testing.assert_close(a.feedback[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["dfa", "grape"])
@padded_or_causal
def test_feedback_steps_are_those_of_a_fresh_net(method: str, padded: bool) -> None:
    """An ordinary step and a calibration step, beside a net that knows no other length."""
    net = compiled(token_model(padded), method, calib_every=None)
    calibrates = method == "grape"
    for k, args in enumerate(batches(padded)):
        if k not in COMPARED:
            train_step(net, args)
            continue
        other = fresh(net, method, calib_every=None)
        train_step(net, args)
        train_step(other, args)
        assert_same_gradients(net, other, tol=1e-9)
        if calibrates:
            with net.calibration(), other.calibration():
                train_step(net, args)
                train_step(other, args)
            assert_same_gradients(net, other, tol=1e-9)
        assert_same_feedback(net, other)
    assert_few_programs(net)


def test_calibration_steps_follow_eager() -> None:
    """The exact step of a learning method is backpropagation's at every length."""
    model = token_model(False)
    twin = eager_twin(model)
    net = compiled(model, "grape")
    for args in batches(False):
        with net.calibration():
            train_step(net, args)
        train_step(twin, args)
        assert_same_gradients(net, twin, tol=1e-9)
    assert_few_programs(net)


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    """What grapefx warned of."""
    return [str(w.message) for w in caught if issubclass(w.category, GrapefxWarning)]


class Sequence(nn.Module):
    """A recurrent layer, read at its last step."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = cell(4, 5, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
def test_recurrent_layers_say_why_each_length_is_captured(cell: type[nn.Module]) -> None:
    """Right at each length; the warning says that the layer is written out over time."""
    torch.manual_seed(0)
    model = Sequence(cell).double()
    twin = eager_twin(model)
    net = compiled(model, "bp", calib_every=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n, size in zip((5, 7, 3, 7), (4, 3, 2, 5), strict=True):
            x = torch.randn(size, n, 4, dtype=torch.float64)
            train_step(net, (x,))
            train_step(twin, (x,))
            assert_same_gradients(net, twin, tol=1e-10)
    reasons = [t for t in told(caught) if "recurrent" in t]
    assert len(reasons) == 1, told(caught)
    assert "dim 1" in reasons[0] and "pad to a few lengths" in reasons[0]
    assert len(net._captures.programs) <= 3


class Signal(nn.Module):
    """Convolutions whose hidden values are as long as the input, and an output that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 3, 3, padding=1)
        self.b = nn.Conv1d(3, 4, 3, padding=1)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.b(torch.relu(self.a(x))))
        return self.out(h.mean(2))


def test_a_map_whose_size_depends_on_the_length_is_named() -> None:
    """Feedback from a pooled output to each position: the warning names the point and the dim."""
    torch.manual_seed(0)
    model = Signal().double()
    net = compiled(model, "dfa", calib_every=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n, size in zip((8, 11, 6, 11), (4, 3, 2, 5), strict=True):
            x = torch.randn(size, 2, n, dtype=torch.float64)
            other = fresh(net, "dfa", calib_every=None)
            train_step(net, (x,))
            train_step(other, (x,))
            assert_same_gradients(net, other, tol=1e-10)
    reasons = [t for t in told(caught) if "feedback map of" in t]
    assert len(reasons) == 1, told(caught)
    assert "'a'" in reasons[0] and "dim 2" in reasons[0], reasons[0]
    exact = compiled(copy.deepcopy(model), "bp", calib_every=None)
    twin = eager_twin(model)
    for n in (8, 11, 6, 13):
        x = torch.randn(3, 2, n, dtype=torch.float64)
        train_step(exact, (x,))
        train_step(twin, (x,))
        assert_same_gradients(exact, twin, tol=1e-10)
    assert_few_programs(exact)  # backpropagation has no maps, and nothing that depends on it
