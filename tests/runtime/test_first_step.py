"""What makes the first step come sooner changes nothing but when things are done."""

from __future__ import annotations

import platform
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile

from grapefx import lowering
from grapefx.runtime import captures
from grapefx.torch_compat import (
    PendingKernels,
    forward_of,
    graph_module,
    inductor_counts,
    prepare_inductor,
)
from tests.zoo import MLP, compiled, train_step

X = torch.randn(6, 8)


def test_the_update_is_lowered_before_the_forward_waits_for_its_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    lower, wait = lowering.inductor_compile, AsyncCompile.wait

    def lowered(*args: Any, **kwargs: Any) -> Any:
        done.append("lower")
        return lower(*args, **kwargs)

    def waited(self: AsyncCompile, scope: dict[str, Any]) -> None:
        done.append("wait")
        wait(self, scope)

    monkeypatch.setattr(lowering, "inductor_compile", lowered)
    monkeypatch.setattr(AsyncCompile, "wait", waited)
    with inductor_counts():
        train_step(compiled(MLP(depth=1), "bp", backend="inductor"), (X,))
    assert done == ["lower", "lower", "wait", "wait"]
    assert AsyncCompile.wait is waited


def test_a_kernel_that_does_not_compile_is_an_error_and_no_step_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wait, waits = AsyncCompile.wait, 0

    def fails_once(self: AsyncCompile, scope: dict[str, Any]) -> None:
        nonlocal waits
        waits += 1
        if waits == 2:  # the forward's, behind the update's
            raise RuntimeError("no compiler")
        wait(self, scope)

    monkeypatch.setattr(AsyncCompile, "wait", fails_once)
    net = compiled(MLP(depth=1), "bp", backend="inductor")
    with inductor_counts():
        with pytest.raises(RuntimeError, match="no compiler"):
            net(X)
        train_step(net, (X,))


def test_other_threads_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []

    def note(self: AsyncCompile, scope: dict[str, Any]) -> None:
        waited.append(threading.get_ident())

    monkeypatch.setattr(AsyncCompile, "wait", note)
    with PendingKernels() as pending:
        other = threading.Thread(target=lambda: AsyncCompile().wait({}))
        other.start()
        other.join()
        AsyncCompile().wait({})
        assert len(waited) == 1 and waited[0] != threading.get_ident()
    pending.wait()
    pending.wait()
    assert len(waited) == 2 and waited[1] == threading.get_ident()


@pytest.mark.parametrize(("backend", "asks"), [("inductor", True), ("eager", False)])
def test_vector_instructions_are_asked_for_at_the_capture(
    backend: str, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(captures, "prepare_inductor", lambda: asked.append(True))
    net = compiled(MLP(depth=1), "bp", backend=backend)
    with inductor_counts():
        train_step(net, (X,))
        train_step(net, (X,))
    assert asked == [True] * asks


def test_a_graphs_python_is_written_when_it_is_called() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.add, (x, 1)))
    gm = graph_module(nn.Module(), graph)
    assert "_code" not in gm.__dict__
    assert forward_of(gm)(torch.tensor(1.0)) == 2
    x.users.copy().popitem()[0].args = (x, 2)
    gm.recompile()
    assert forward_of(gm)(torch.tensor(1.0)) == 3


def test_asking_for_vector_instructions_leaves_inductors_objects_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A class-wide answer, or flags that are changed meanwhile, would reach Inductor's kernels."""
    asked: list[object] = []

    def build(self: object, code: str) -> bool:
        asked.append(self)
        return False

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", build)
    before = [dict(vars(isa)) for isa in cpu_vec_isa.supported_vec_isa_list]
    prepare_inductor.cache_clear()
    prepare_inductor()
    for thread in threading.enumerate():
        if thread.name.startswith("grapefx"):
            thread.join()
    expected = platform.machine() == "x86_64" and hasattr(cpu_vec_isa.VecISA, "_probe_load")
    assert bool(asked) == expected
    assert not any(a is isa for a in asked for isa in cpu_vec_isa.supported_vec_isa_list)
    assert [dict(vars(isa)) for isa in cpu_vec_isa.supported_vec_isa_list] == before
    monkeypatch.undo()
    assert cpu_vec_isa.valid_vec_isa_list.__wrapped__() == cpu_vec_isa.valid_vec_isa_list()
