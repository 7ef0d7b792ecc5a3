"""Every trap of the design's list (section 8) that has no test of its own elsewhere.

Elsewhere: stop-gradient and straight-through models, in-place writes, LSTM dropout (test_parity,
test_modes); custom functions, data-dependent branches (test_errors); stale captures (test_modes);
batch sizes, masks, batch dims, stride-0 cotangents (test_inputs); autocast, the random stream
(test_loops); dead input gradients, folded batches (tests/passes).
"""

from __future__ import annotations

import gc
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.errors import GrapefxWarning
from grapefx.plan import build_plan
from tests.zoo import (
    MLP,
    Tied,
    assert_same_gradients,
    compiled,
    eager_twin,
    loss_of,
    make,
    plan_of,
    train_step,
)


def test_detach_and_no_grad_survive_decomposition() -> None:
    """Trap: ``run_decompositions`` erases them; gradients are wrong without a word."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            with torch.no_grad():
                scale = F.relu(self.a(x)).mean()
                with torch.enable_grad():
                    inner = h * 2
            h = h * scale + inner
            h = h.detach() * 0.5 + h * torch.sigmoid(h).detach()
            return self.b(h) + self.b(h.detach())

    model = Nested().double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    x = torch.randn(5, 8).double()
    train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin)


def test_tensors_made_while_tracing_are_right() -> None:
    """Trap: a tensor made by numpy or Python at trace time."""

    class Constant(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.arange(5.0).double()  # an attribute, not a buffer

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.from_numpy(np.ones(5)) + self.table

    model = Constant().double()
    twin = eager_twin(model)
    net = compiled(model, "dfa")
    x = torch.randn(4, 8).double()
    train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin)
    exported = compiled(model, "dfa", capture="export")
    with pytest.warns(GrapefxWarning, match=r"constant .* was fixed when the model was captured"):
        train_step(exported, (x,))


def test_tied_weights_are_one_parameter() -> None:
    """Trap: they appear as two inputs; their gradients must add up once."""
    model = Tied().double()
    plan = build_plan(model, (torch.randint(0, 11, (3, 4)),), method="dfa")
    names = [s.name for s in plan.joint.inputs if s.role == "parameter"]
    assert len(names) == len(set(names))
    assert [s.name for s in plan.joint.outputs if s.role == "gradient"].count("emb.weight") == 1


def test_fused_attention_stays_fused() -> None:
    """Trap: MATH attention costs memory; only the tangent recomputes the softmax."""
    graph = plan_of("encoder-prenorm", "grape").graph("align").gm.graph
    forward = [n for n in graph.nodes if n.meta.get("grapefx_phase") != "tangent"]
    names = [str(n.target) for n in forward if n.op == "call_function"]
    assert sum("scaled_dot_product" in n and "backward" not in n for n in names) == 1
    assert not any("softmax" in n for n in names)


def test_batch_norm_tangents_freeze_the_batch_statistics() -> None:
    """Trap: training-mode batch norm couples samples: a tangent on a sub-batch is undefined."""
    model, args = make("cnn")
    net = compiled(model, "grape", calib_every=None, tangent_fraction=0.5)
    for _ in range(2):
        train_step(net, args)
    assert all(v.isfinite().all() for v in net.feedback.values())


def test_one_mask_serves_primal_and_tangent() -> None:
    """Trap: a trace of its own for the tangents draws dropout twice."""
    graph = plan_of("cnn", "grape").graph("align").gm.graph
    names = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    draws = [n for n in names if "dropout" in n or "bernoulli" in n or "rand" in n]
    assert len([n for n in draws if "backward" not in n]) == 1


def test_noise_is_drawn_outside_the_graph() -> None:
    """Trap: Inductor's CPU ``randn`` is 18 times slower than eager's."""
    for kind in ("align", "calibration"):
        graph = plan_of("mlp", "grape").graph(kind).gm.graph
        assert not any("rand" in str(n.target) for n in graph.nodes if n.op == "call_function")
    assert any(s.role == "noise" for s in plan_of("mlp", "grape").graph("align").inputs)


def test_saved_tensors_do_not_outlive_the_backward() -> None:
    """Trap: saved tensors kept alive past their use."""
    model, args = make("mlp")
    net = compiled(model, "grape")
    train_step(net, args)
    loss = loss_of(net(*args))
    step = loss.grad_fn
    while step is not None and not step.name().startswith("Step"):
        step = step.next_functions[0][0]
    assert step is not None
    saved = [weakref.ref(t) for t in step.saved_tensors if t.numel() == 6 * 12]  # type: ignore[attr-defined]
    assert saved
    loss.backward()
    gc.collect()
    assert not any(ref() is not None for ref in saved)


def test_gradients_do_not_alias_each_other_or_the_feedback() -> None:
    model, args = make("mlp")
    net = compiled(model, "grape")
    for _ in range(2):
        train_step(net, args)
        held = [p.grad for p in net.parameters()] + list(net.feedback.values())
        places = [t.untyped_storage().data_ptr() for t in held if t is not None]
        assert len(places) == len(set(places))


def test_feedback_is_replaced_never_written() -> None:
    """B is committed at the end of backward: who holds the old one keeps it."""
    model, args = make("mlp")
    net = compiled(model, "fdfa", calib_every=None)
    train_step(net, args)
    held = net.feedback
    copies = {k: v.clone() for k, v in held.items()}
    train_step(net, args)
    assert all(torch.equal(copies[k], v) for k, v in held.items())
    assert any(not torch.equal(copies[k], v) for k, v in net.feedback.items())


def test_a_backward_that_fails_leaves_everything_as_it_was() -> None:
    model, args = make("mlp")
    net = compiled(model, "grape", calib_every=None)
    train_step(net, args)
    before = net.feedback_state_dict()
    out = net(*args)
    out.register_hook(lambda g: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        loss_of(out).backward()
    after = net.feedback_state_dict()
    assert after["schedule"] == before["schedule"]
    assert all(torch.equal(v, before["tensors"][k]) for k, v in after["tensors"].items())
    train_step(net, args)


def test_no_warning_on_a_plain_run() -> None:
    model, args = make("mlp")
    net = compiled(model, "grape")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GrapefxWarning)
        for _ in range(2):
            train_step(net, args)


def test_an_assertion_on_values_is_left_out_with_a_warning() -> None:
    class Checked(MLP):
        def forward(self, x: Tensor) -> Tensor:
            torch._assert_async(x.sum() < 1e6, "inputs are too large")
            return super().forward(x)

    twin = MLP().double()
    model = Checked().double()
    model.load_state_dict(twin.state_dict())
    net = compiled(model, "bp")
    x = torch.randn(5, 8).double()
    with torch.no_grad(), pytest.warns(GrapefxWarning, match="inputs are too large"):
        net(x)
    with pytest.warns(GrapefxWarning, match="inputs are too large"):
        train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin)


@pytest.mark.parametrize("method", ["bp", "grape"])
def test_writes_inside_an_operator_that_torch_takes_apart(method: str) -> None:
    """``rms_norm`` of another dtype than its weight adds in place; ``one_hot`` asserts."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.scale = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            h = F.rms_norm(torch.tanh(self.a(x)).float(), (6,), self.scale, 1e-5).to(x.dtype)
            return self.c(torch.tanh(self.b(h)) + F.one_hot((x[:, 0] > 0).long(), 6))

    model = Norm().double()
    twin = eager_twin(model)
    net = compiled(model, method, calib_every=None)
    x = torch.randn(5, 8).double()
    train_step(net, (x,))
    train_step(twin, (x,))
    if method == "bp":
        assert_same_gradients(net, twin)
    assert net.plan is not None
    for node in net.plan.joint.gm.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        assert schema is None or not schema.is_mutable, node


class Decides(nn.Module):
    """Assigns a buffer, then asks for a value where ``ask`` says so."""

    def __init__(self, ask: bool = True) -> None:
        super().__init__()
        self.ask, self.first = ask, nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = self.mean + 1
        h = self.first(x)
        return -h if self.ask and h.sum() > 0 else h


def test_a_failed_export_leaves_no_hook_behind() -> None:
    """torch 2.11 leaves one on the buffers of every module of the process."""
    hooks = torch.nn.modules.module._global_buffer_registration_hooks
    before = dict(hooks)
    net = grapefx.compile(Decides(), method="bp", backend="eager", capture="export")
    with pytest.raises(grapefx.CaptureError):
        net(torch.randn(5, 4))
    assert dict(hooks) == before
    with pytest.raises(Exception, match="data-dependent"):  # the user's own export
        torch.export.export(Decides(), (torch.randn(5, 4),))
    model = Decides(ask=False)
    grapefx.compile(model, method="bp", backend="eager")(torch.randn(5, 4))
    torch.testing.assert_close(model.mean, torch.ones(4))
