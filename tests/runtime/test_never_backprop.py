"""A ``dfa`` net never takes backpropagation's step without a word, whatever it is called from.

Under an outer compiler, a stance, a mode or in a copy, the hidden gradients are those of a
reference net, or there is an error of grapefx that says why not. A wrapper that falls back to the
model's own forward would train on, and no loss curve would tell.
"""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import grapefx
from grapefx.errors import GrapefxError, OptionError
from tests.zoo import eager_twin, loss_of, make

HIDDEN = "0.weight"


class _Body(nn.Sequential):
    """Three layers: the first two are hidden."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))


class _Outer(nn.Module):
    """A model that contains the net."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x * 1.0)


def body() -> nn.Module:
    """Always the same weights."""
    torch.manual_seed(4)
    return _Body().double()


def batch() -> Tensor:
    """Always the same input."""
    return torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def dfa(model: nn.Module, inplace: bool = False) -> Any:
    """The net of a model; equal models get equal feedback."""
    return grapefx.compile(
        model, method="dfa", backend="eager", calib_every=None, seed=3, inplace=inplace
    )


def hidden(net: nn.Module) -> Tensor:
    """The gradient of the first layer, whose name may have a prefix."""
    name, found = next((n, p) for n, p in net.named_parameters() if n.endswith(HIDDEN))
    assert found.grad is not None, f"{name} has no gradient"
    return found.grad.clone()


def step(call: Callable[[Tensor], Any], net: nn.Module) -> Tensor:
    """One step through ``call``; the hidden gradient."""
    net.zero_grad()
    loss_of(call(batch())).backward()
    return hidden(net)


def expected() -> Tensor:
    """The reference net's hidden gradient, which is not backpropagation's."""
    reference = dfa(body())
    found = step(reference, reference)
    twin = body()
    exact = step(twin, twin)
    assert (found - exact).norm() > 0.1 * exact.norm()
    return found


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _WatchFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


SURROUNDINGS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
    "eager_on_recompile": lambda: torch.compiler.set_stance("eager_on_recompile"),
    "fail_on_recompile": lambda: torch.compiler.set_stance("fail_on_recompile"),
    "dynamo_disabled": lambda: torch._dynamo.config.patch(disable=True),
    "dispatch_mode": _Watch,
    "function_mode": _WatchFunctions,
    "flop_counter": lambda: FlopCounterMode(display=False),
    "anomaly_mode": lambda: torch.autograd.set_detect_anomaly(True),
    "one_recompilation": lambda: torch._dynamo.config.patch(recompile_limit=1),
    "saved_on_cpu": torch.autograd.graph.save_on_cpu,
}


@contextlib.contextmanager
def _only_grapefx_errors() -> Iterator[None]:
    """An error is an answer too, if it is one of grapefx's, was caused by one or names it."""
    try:
        yield
    except Exception as e:
        chain, error = [], e
        while error is not None and error not in chain:
            chain.append(error)
            error = error.__cause__ or error.__context__  # type: ignore[assignment]
        ours = any(isinstance(c, GrapefxError) for c in chain)
        if not ours and "grapefx compiles it by itself" not in str(e):
            raise


def check(call: Callable[[Tensor], Any], net: nn.Module) -> None:
    """The step through ``call`` is the reference's, or refused."""
    with _only_grapefx_errors():
        torch.testing.assert_close(step(call, net), expected(), rtol=1e-9, atol=1e-12)


in_place = pytest.mark.parametrize("inplace", [False, True], ids=["wrapped", "in-place"])
warm = pytest.mark.parametrize("warm", [False, True], ids=["first-call", "captured"])


@in_place
@warm
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_in_surroundings(name: str, warm: bool, inplace: bool) -> None:
    """The capture itself, or a later call, happens inside."""
    reference = expected()
    net = dfa(body(), inplace)
    if warm:
        step(net, net)
    with _only_grapefx_errors():
        with SURROUNDINGS[name]():
            found = step(net, net)
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(step(net, net), reference, rtol=1e-9, atol=1e-12)  # and afterwards


def _compiled_outer(outer: nn.Module) -> Any:
    return torch.compile(outer, backend="eager")


def _compiled_itself(outer: nn.Module) -> Any:
    outer.body.compile(backend="eager")  # type: ignore[operator,union-attr]
    return outer


def _compiled_body(outer: nn.Module) -> Any:
    return torch.compile(outer.body, backend="eager")  # type: ignore[arg-type]


def _compiled_itself_whole(outer: nn.Module) -> Any:
    outer.body.compile(backend="eager", fullgraph=True)  # type: ignore[operator,union-attr]
    return outer.body


def _compiled_function(outer: nn.Module) -> Any:
    return torch.compile(lambda x: outer(x) * 1.0, backend="eager")


def _compiled_whole(outer: nn.Module) -> Any:
    return torch.compile(outer, backend="eager", fullgraph=True)


def _compiled_and_stanced(outer: nn.Module) -> Any:
    call = torch.compile(outer, backend="eager")

    def run(x: Tensor) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return call(x)

    return run


def _functional(outer: nn.Module) -> Any:
    return lambda x: functional_call(outer, dict(outer.named_parameters()), (x,))


def _checkpointed(outer: nn.Module) -> Any:
    return lambda x: checkpoint(outer, x, use_reentrant=False)


def _exported(outer: nn.Module) -> Any:
    return torch.export.export(outer, (batch(),)).module()


def _traced(outer: nn.Module) -> Any:
    return torch.fx.symbolic_trace(outer)


def _jit_traced(outer: nn.Module) -> Any:
    return torch.jit.trace(outer, (batch(),), check_trace=False)


COMPILED = [
    _compiled_outer, _compiled_itself, _compiled_itself_whole, _compiled_body, _compiled_function,
    _compiled_whole,
]  # fmt: skip


@in_place
@warm
@pytest.mark.parametrize(
    "way",
    [
        *COMPILED,
        _compiled_and_stanced, _functional, _checkpointed, _exported, _traced, _jit_traced,
    ],
    ids=lambda way: way.__name__.strip("_"),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_called_by_another_compiler(way: Any, warm: bool, inplace: bool) -> None:
    """A model that contains the net is compiled, traced or called with other parameters."""
    torch.compiler.reset()
    reference = expected()
    outer = _Outer(dfa(body(), inplace))
    if warm:
        step(outer, outer)
    with _only_grapefx_errors():
        call = way(outer)
        for _ in range(2):
            trained = call if isinstance(call, nn.Module) else outer
            found = step(call, trained)
            torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-12)


@warm
@pytest.mark.parametrize("way", COMPILED, ids=lambda way: way.__name__.strip("_"))
@pytest.mark.filterwarnings("ignore")
def test_inference_by_another_compiler(way: Any, warm: bool) -> None:
    """In place, a call without gradients is the model's own, before steps and after them."""
    torch.compiler.reset()
    outer = _Outer(dfa(body(), inplace=True))
    if warm:
        step(outer, outer)
    call = way(outer)
    with torch.no_grad():
        torch.testing.assert_close(call(batch()), body()(batch()))
    with _only_grapefx_errors():
        step(call, outer)
    with torch.no_grad():
        torch.testing.assert_close(call(batch()), body()(batch()))


def test_compile_of_a_model_in_place_says_what_to_do() -> None:
    """``nn.Module.compile`` takes the call from grapefx; ``restore`` leaves it there."""
    model = dfa(body(), inplace=True)
    model.compile(backend="eager")
    with pytest.raises(OptionError, match=r"on this _Body(.|\n)*remedy(.|\n)*restore"):
        model(batch())
    grapefx.restore(model)
    twin = body()
    torch.testing.assert_close(step(model, model), step(twin, twin))


def _pickled(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@warm
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_copies(copied: Any, warm: bool) -> None:
    """A copy of the wrapper is a net of its own, with the same feedback."""
    net = dfa(body())
    if warm:
        step(net, net)
    other = copied(net)
    check(other, other)
    outer = copied(_Outer(net))
    check(outer, outer)


@in_place
def test_threads(inplace: bool) -> None:
    """Several threads capture and step at once, each its own net."""
    reference = expected()
    nets = [dfa(body(), inplace) for _ in range(3)]
    found: list[Any] = [None] * len(nets)

    def train(k: int) -> None:
        try:
            found[k] = step(nets[k], nets[k])
        except Exception as e:
            found[k] = e

    threads = [threading.Thread(target=train, args=(k,)) for k in range(len(nets))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for f in found:
        if isinstance(f, GrapefxError):
            continue
        assert isinstance(f, Tensor), repr(f)
        torch.testing.assert_close(f, reference, rtol=1e-9, atol=1e-12)


def test_one_net_in_two_threads_captures_once() -> None:
    """Two threads call the same net for the first time."""
    net = dfa(body())
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(net(batch()).detach())
        except Exception as e:
            found.append(e)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for f in found:
        assert isinstance(f, Tensor), repr(f)
        torch.testing.assert_close(f, eager_twin(net._original)(batch()))
    assert len(net._captures.programs) == 1


def test_a_stance_that_lasts() -> None:
    """``force_eager`` for the whole life of a net, over captures for several sizes and modes."""
    model, (x,) = make("mlp")
    reference = dfa(copy.deepcopy(model))
    net = dfa(model)
    with _only_grapefx_errors():
        for size in (len(x), 3, 1):
            for train in (True, False):
                for m in (reference, net):
                    m.train(train)
                    m.zero_grad()
                loss_of(reference(x[:size])).backward()
                with torch.compiler.set_stance("force_eager"):
                    loss_of(net(x[:size])).backward()
                for p, q in zip(net.parameters(), reference.parameters(), strict=True):
                    torch.testing.assert_close(p.grad, q.grad)
