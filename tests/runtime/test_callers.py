"""Who calls the net: modes and hooks of the caller, transforms, another compiler, threads."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import grapefx
from grapefx.errors import BackwardError
from tests.zoo import (
    assert_same_gradients,
    compiled,
    eager_twin,
    gradients,
    loss_of,
    make,
    train_step,
)


@pytest.mark.parametrize("warm", [False, True], ids=["first-call", "later-call"])
@pytest.mark.parametrize("method", ["bp", "dfa", "grape"])
def test_under_a_checkpoint_of_the_caller(method: str, warm: bool) -> None:
    model, (x,) = make("mlp")
    net = compiled(model, method, calib_every=None)
    plain = copy.deepcopy(net)
    x.requires_grad_()
    for m in (net, plain) if warm else ():
        train_step(m, (x,))
    loss_of(checkpoint(net, x, use_reentrant=False)).backward()
    loss_of(plain(x)).backward()
    assert_same_gradients(net, plain)
    assert net.feedback.keys() == plain.feedback.keys()
    for k, v in plain.feedback.items():
        assert torch.equal(v, net.feedback[k]), k


def test_flops_are_counted_in_the_first_call_as_in_the_second() -> None:
    model, (x,) = make("mlp")
    net = compiled(model, "bp")
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            loss_of(net(x)).backward()
        counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        loss_of(eager_twin(model)(x)).backward()
    assert counts == [counter.get_total_flops()] * 2


def test_functional_call_first() -> None:
    model, (x,) = make("tied")
    net, twin = compiled(model, "bp"), eager_twin(model)
    found = []
    for m in (net, twin):
        given = {k: (v.detach() * 2).requires_grad_() for k, v in m.named_parameters()}
        out = functional_call(m, given, (x,))
        found.append(torch.autograd.grad(loss_of(out), list(given.values())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


@pytest.mark.parametrize("warm", [False, True])
def test_function_transforms_are_refused(warm: bool) -> None:
    model, (x,) = make("mlp")
    net = compiled(model, "dfa")
    if warm:
        train_step(net, (x,))
    weights = {k: v.detach() for k, v in net.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return functional_call(net, given, (x,)).sum()

    for call in (lambda: grad(loss)(weights), lambda: vmap(net)(x[:, None]),
                 lambda: jvp(net, (x,), (x,))):  # fmt: skip
        with pytest.raises(BackwardError, match=r"torch.func"):
            call()


class _Big(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(5, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


@pytest.mark.parametrize("how", ["compile(net)", "net.compile()", "inside", "in place"])
def test_under_torch_compile(how: str) -> None:
    """Dynamo breaks its graph at the net, which is compiled already."""
    torch.compiler.reset()
    model, (x,) = make("mlp")
    twin = eager_twin(model)
    net: Any = grapefx.compile(model, method="bp", backend="eager", inplace=how == "in place")
    call: Any = net
    if how == "inside":
        net = _Big(net)
        twin = _Big(twin)
        twin.head.load_state_dict(net.head.state_dict())
        call = torch.compile(net, backend="eager")
    elif how == "net.compile()":
        net.compile(backend="eager")
    else:
        call = torch.compile(net, backend="eager")
    for _ in range(2):
        train_step(call, (x,))
        train_step(twin, (x,))
        assert_same_gradients(net, twin)


def test_full_graphs_of_torch_compile_say_why_not() -> None:
    torch.compiler.reset()
    model, (x,) = make("mlp")
    with pytest.raises(Exception, match="grapefx compiles it by itself"):
        torch.compile(compiled(model, "bp"), backend="eager", fullgraph=True)(x)


def test_one_thread_evaluates_while_another_trains() -> None:
    """Captures replace parts of torch and hide its output: at once they undid each other's."""
    model, (x,) = make("mlp")
    nets = [compiled(copy.deepcopy(model), "dfa", calib_every=None) for _ in range(4)]
    stdout, stderr, apply = sys.stdout, sys.stderr, torch.autograd.Function.__dict__["apply"]
    failures: list[BaseException] = []

    def evaluate(net: nn.Module) -> None:
        try:
            with torch.no_grad():
                for _ in range(3):
                    net(x)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=evaluate, args=(net,)) for net in nets for _ in range(2)]
    for t in threads:
        t.start()
    for net in nets:
        train_step(net, (x,))
    for t in threads:
        t.join()
    assert not failures
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert torch.autograd.Function.__dict__["apply"] is apply
    for net in nets[1:]:
        for k, g in gradients(net).items():
            assert torch.equal(g, gradients(nets[0])[k])  # type: ignore[arg-type]
        assert len(net._captures.programs) == 2


def test_an_argument_that_never_rests_is_named_once() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
            return self.layer(x) * by

    net = compiled(Scaled(), "bp")
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for k in range(2, 14):
            net(torch.randn(2, 5, 4), by=k / 10)
    told = [str(w.message) for w in caught if "keeps changing" in str(w.message)]
    assert len(told) == 1 and "'by'" in told[0] and "as a tensor" in told[0]
    assert {w.filename for w in caught} == {__file__}  # where the net was called


def test_the_wrapper_is_a_container_where_the_model_is_one() -> None:
    layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net = grapefx.compile(layers, method="bp")
    assert len(net) == 3 and net[0] is layers[0] and list(net) == list(layers)
    with pytest.raises(TypeError):
        len(grapefx.compile(make("mlp")[0], method="bp"))
