"""Bad input: a clear error of a documented class, and nothing changed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grapefx
from grapefx.errors import (
    BackwardError,
    BudgetError,
    CaptureError,
    GrapefxError,
    GrapefxWarning,
    InputError,
    OptionError,
    PlacementError,
)
from grapefx.methods import DFA
from tests.zoo import (
    MLP,
    assert_same_gradients,
    compiled,
    eager_twin,
    loss_of,
    make,
    train_step,
)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"method": "grap"}, "unknown method 'grap'.*Did you mean 'grape'"),
        ({"method": 3}, "unknown method 3"),
        ({"calib_evry": 2}, "unknown option 'calib_evry'.*Did you mean 'calib_every'"),
        ({"method": "grape", "momentun": 0.5}, "'momentun'.*Did you mean 'momentum'"),
        ({"method": "dfa", "alpha": 0.5}, "alpha"),
        ({"calib_every": 0}, "calib_every=0 must be a positive integer"),
        ({"calib_every": 1.5}, "calib_every=1.5"),
        ({"calib_every": True}, "calib_every=True"),
        ({"eta": "0.1"}, "eta='0.1' must be a positive number"),
        ({"method": "fdfa", "alpha": "x"}, "no number"),
        ({"method": "drtp", "mean": "no"}, "mean='no' must be True or False"),
        ({"ridge": float("inf")}, "ridge=inf must be a number"),
        ({"tangent_fraction": None}, "tangent_fraction=None"),
        ({"calib_init": "no"}, "calib_init='no'"),
        ({"inplace": "no"}, "inplace='no'"),
        ({"dynamic": 1}, "dynamic=1"),
        ({"backend_options": [1]}, "backend_options"),
        ({"points": []}, r"points=\[\] names nothing"),
        ({"method": "fg-w", "directions": 3}, "one direction"),
        ({"calib_unit": "epochs"}, "calib_unit='epochs'.*Did you mean 'epoch'"),
        ({"calib_refit": "all"}, "calib_refit='all'"),
        ({"noise": "gauss"}, "Did you mean 'gaussian'"),
        ({"granularity": "layers"}, "Did you mean 'layer'"),
        ({"backend": "inductr"}, "Did you mean 'inductor'"),
        ({"tangent_fraction": 0}, r"tangent_fraction=0 must be in \(0, 1\]"),
        ({"tangent_fraction": 1.2}, "tangent_fraction=1.2"),
        ({"align_every": 0}, "align_every=0"),
        ({"ridge": 0}, "ridge=0"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_dim": -1}, "batch_dim=-1"),
        ({"feedback_budget": 0}, "feedback_budget=0"),
        ({"method": "grape", "eta": -1}, "eta=-1"),
        ({"method": "grape", "momentum": 1.0}, "momentum=1.0"),
        ({"method": "fdfa", "alpha": 0}, "alpha=0"),
        ({"method": "dfa", "init_b": "hee"}, "Did you mean 'he'"),
        ({"method": DFA(), "init_b": "he"}, "init_b"),
    ],
)
def test_options(kwargs: dict[str, Any], message: str) -> None:
    model = MLP()
    with pytest.raises(OptionError, match=message) as caught:
        grapefx.compile(model, **kwargs)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, GrapefxError)


def test_not_a_module() -> None:
    with pytest.raises(OptionError, match=r"nn.Module, not function"):
        grapefx.compile(lambda x: x)  # type: ignore[arg-type]


def test_data_dependent_branch_names_the_line_and_the_way_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Branch(MLP):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # the user's line
                x = x * 2
            return super().forward(x)

    net = compiled(Branch())
    for _ in range(2):
        with pytest.raises(CaptureError) as caught:
            net(torch.randn(4, 8))
        text = str(caught.value)
        assert "if x.sum() > 0" in text and "test_errors.py" in text and "torch.where" in text
    assert net.plan is None
    printed = capsys.readouterr()
    assert "forward(self" not in printed.out + printed.err  # torch's dump of the graph


def test_a_forward_that_raises_keeps_its_own_message() -> None:
    net = compiled(MLP())
    with pytest.raises(CaptureError, match=r"reduction dim(.|\n)*layer\(x\)"):
        net(torch.randn(4, 9))
    train_step(net, (torch.randn(4, 8),))  # and does no harm


def test_no_trainable_parameter() -> None:
    class Empty(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    x = torch.randn(4, 8)
    for model in (MLP().requires_grad_(False), Empty()):
        out = compiled(model)(x)  # as in eager mode
        torch.testing.assert_close(out, model(x))
        assert not out.requires_grad
        with pytest.raises(InputError, match="no trainable parameter"):
            grapefx.inspect(model, x)


def test_no_feedback_point() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(4, 2, 4)
    with pytest.raises(PlacementError, match=r"no feedback point(.|\n)*method='bp'"):
        compiled(model, "dfa")(x)
    train_step(compiled(model, "bp"), (x,))


def test_an_output_that_does_not_require_grad() -> None:
    class Detached(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    net = compiled(Detached(), "dfa")
    with pytest.raises(GrapefxError, match="requires grad"):
        net(torch.randn(4, 8))
    assert net.feedback == {}


def test_no_tensor_argument() -> None:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, n: int) -> Tensor:
            return self.w * n

    with pytest.raises(InputError, match="no tensor argument"):
        compiled(Nothing())(3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["fdfa", "grape"])
def test_a_non_finite_loss_is_skipped_counted_and_mentioned_once(method: str, bad: float) -> None:
    model, args = make("mlp", torch.float32)
    net = compiled(model, method, calib_unit="step", calib_every=3)
    train_step(net, args)
    before = net.feedback
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):  # aligned steps and a calibration
            (net(*args).sum() * bad).backward()
            for k, v in net.feedback.items():
                assert torch.equal(v, before[k]), k
    assert net.skipped_updates == 4
    ours = [w for w in caught if issubclass(w.category, GrapefxWarning)]
    assert len(ours) == 1 and "skipped_updates" in str(ours[0].message)
    net.zero_grad()
    train_step(net, args)
    assert all(v.isfinite().all() for v in net.feedback.values())
    assert net.feedback_state_dict()["skipped"] == 4


def test_a_non_finite_input_keeps_the_maps_finite() -> None:
    model, (x,) = make("mlp", torch.float32)
    net = compiled(model, "grape", calib_unit="step", calib_every=2)
    bad = x.clone()
    bad[0, 0] = float("inf")
    with pytest.warns(GrapefxWarning, match="not finite"):
        for _ in range(4):
            train_step(net, (bad,))
    assert all(v.isfinite().all() for v in net.feedback.values())
    assert net.skipped_updates == 4


def test_budget() -> None:
    net = compiled(MLP(), "grape", feedback_budget=100)
    with pytest.raises(BudgetError, match=r"budget(.|\n)*layers\.\d(.|\n)*feedback_budget="):
        net(torch.randn(4, 8))
    assert net.feedback == {}
    train_step(compiled(MLP(), "bp", feedback_budget=100), (torch.randn(4, 8),))


@pytest.mark.parametrize("method", ["bp", "grape"])
def test_double_backward(method: str) -> None:
    model, args = make("mlp")
    net = compiled(model, method, calib_every=None)
    net(*args)
    before = net.feedback_state_dict()
    with pytest.raises(BackwardError, match="double backward"):
        loss_of(net(*args)).backward(create_graph=True)
    with pytest.raises(BackwardError, match="double backward"):
        torch.autograd.grad(loss_of(net(*args)), list(net.parameters()), create_graph=True)
    after = net.feedback_state_dict()
    assert after["schedule"] == before["schedule"]
    assert all(torch.equal(v, before["tensors"][k]) for k, v in after["tensors"].items())


@pytest.mark.parametrize("retain", [True, False])
def test_backward_twice(retain: bool) -> None:
    model, args = make("mlp")
    net = compiled(model, "grape", calib_every=None)
    loss = net(*args).sum()
    loss.backward(retain_graph=retain)
    before = net.feedback_state_dict()
    with pytest.raises(BackwardError, match="twice"):
        loss.backward()
    after = net.feedback_state_dict()
    assert after["schedule"] == before["schedule"]
    assert all(torch.equal(v, before["tensors"][k]) for k, v in after["tensors"].items())


def test_another_device() -> None:
    net = compiled(MLP(), "grape")
    with pytest.raises(InputError, match="on meta, the parameters are on cpu"):
        net(torch.randn(4, 8, device="meta"))
    train_step(net, (torch.randn(4, 8),))
    with pytest.raises(InputError, match="on meta"):
        net(torch.randn(4, 8, device="meta"))
    with pytest.raises(InputError, match="on meta"), torch.no_grad():
        net(torch.randn(4, 8, device="meta"))


def test_no_batch_dimension_left() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)).sum(0))

    with pytest.raises(PlacementError, match=r"no error tap(.|\n)*keeps the batch"):
        compiled(Mixes(), "dfa")(torch.randn(4, 8))


def test_modules_that_cannot_be_captured_are_refused_at_once() -> None:
    inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    cases = {
        "compiled by torch.compile": torch.compile(inner, backend="eager"),
        "TorchScript": torch.jit.trace(inner, torch.randn(2, 4)),
        "compiled by grapefx already": grapefx.compile(inner, method="bp", backend="eager"),
        "a lazy module": nn.LazyLinear(8),
    }
    for words, part in cases.items():
        with pytest.raises(OptionError, match=f"'0' of the model.*{words}"):
            grapefx.compile(nn.Sequential(part, nn.Linear(8, 2)), method="bp")
    with pytest.raises(OptionError, match=r"_orig_mod"):
        grapefx.compile(torch.compile(inner, backend="eager"), method="bp")


class _Reads(MLP):
    """What a graph cannot follow: a number or a size that values decide."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        mask = x[:, 0] > 0
        if self.how == "number":
            return out / x.abs().max().item()
        if self.how == "rows":
            return out[mask]
        if self.how == "written":
            out[mask] = out[mask] * 2
            return out
        if self.how == "found":
            return out[torch.nonzero(mask)[:, 0]]
        x.sum().item()  # which nobody needs
        torch.unique(mask)
        return out


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("rows", "return out[mask]"),
        ("written", "out[mask] = "),
        ("found", "nonzero(mask)"),
    ],
)
def test_what_values_decide_is_refused_with_its_line(how: str, line: str, grad: bool) -> None:
    with pytest.raises(CaptureError) as caught, torch.set_grad_enabled(grad):
        compiled(_Reads(how), "dfa")(torch.randn(4, 8))
    text = str(caught.value)
    assert line in text and "test_errors.py" in text and "remedy" in text


def test_what_values_decide_and_nobody_needs_is_left_out() -> None:
    net = compiled(_Reads("unused"), "bp")
    twin = eager_twin(net._original)
    x = torch.randn(4, 8)
    for m in (net, twin):
        train_step(m, (x,))
    assert_same_gradients(net, twin, 1e-6)


class _Distribution(MLP):
    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone = alone

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        made = torch.distributions.Categorical(logits=logits)
        return made if self.alone else (made, logits.mean(1))


@pytest.mark.parametrize("alone", [True, False])
def test_an_object_that_holds_tensors_is_returned(alone: bool) -> None:
    x = torch.randn(4, 8)
    model = _Distribution(alone)
    twin = eager_twin(model)
    net = compiled(model, "bp")
    for m in (net, twin):
        out = m(x)
        made = out if alone else out[0]
        made.log_prob(torch.zeros(4)).sum().backward()
    assert_same_gradients(net, twin, 1e-6)
    with pytest.raises(CaptureError, match="Categorical"):
        compiled(model, "bp", capture="export")(x)


class _Holder:
    def __init__(self, by: float) -> None:
        self.by = by


def test_an_object_without_tensors_is_returned() -> None:
    class Returns(MLP):
        held = _Holder(2.0)

        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.held

    assert compiled(Returns(), "bp")(torch.randn(4, 8))[1] is Returns.held


def test_a_first_batch_of_no_samples() -> None:
    net = compiled(MLP(), "dfa")
    with pytest.raises(InputError, match="no samples"):
        net(torch.randn(0, 8))
    train_step(net, (torch.randn(4, 8),))


def test_sparse_gradients_are_bps() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 8, sparse=True), MLP()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.words(x).mean(1))

    x = torch.randint(9, (4, 3))
    with pytest.raises(CaptureError, match=r"sparse=False"):
        compiled(Words(), "dfa")(x)
    model = Words()
    twin = eager_twin(model)
    train_step(compiled(model, "bp"), (x,))
    train_step(twin, (x,))
    assert model.words.weight.grad is not None and model.words.weight.grad.is_sparse
    torch.testing.assert_close(model.words.weight.grad, twin.words.weight.grad)


def test_a_step_of_its_own_is_refused_where_a_loss_scale_is_likely() -> None:
    net = compiled(MLP(), "grape", calib_update="sgd")
    with pytest.raises(InputError, match="GradScaler"), torch.autocast("cpu", torch.float16):
        net(torch.randn(4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(4, 8))


def test_messages_about_parameters_written_and_data() -> None:
    class Shares(MLP):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = super().forward(x)
            return h, h.data

    model, x = Shares(), torch.randn(4, 8)
    out, data = compiled(model, "bp")(x)
    assert out.requires_grad and not data.requires_grad
    torch.testing.assert_close(data, model(x)[1])
    words = nn.Sequential(nn.Embedding(9, 8, max_norm=1.0), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(CaptureError, match=r"max_norm(.|\n)*no_grad"):
        compiled(words, "bp")(torch.randint(9, (4, 2)))


def test_the_line_of_a_model_of_torchs_own_modules() -> None:
    """No frame of ours, which says nothing."""
    net = compiled(nn.Sequential(nn.LSTM(4, 4, proj_size=2, batch_first=True)), "bp")
    with pytest.raises(CaptureError, match="proj_size") as caught:
        net(torch.randn(3, 5, 4))
    assert "While executing" not in str(caught.value)
    words = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 4), nn.Linear(4, 2))
    with pytest.raises(CaptureError, match="sparse=False") as caught:
        compiled(words, "dfa")(torch.randint(9, (4, 3)))
    assert "in the module '0' (Embedding)" in str(caught.value)
    assert "dynamo.py" not in str(caught.value)
