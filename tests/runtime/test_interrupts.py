"""A step that is interrupted, or runs out of memory, is done or not done, never half."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grapefx.errors import MethodError
from grapefx.runtime import call as call_module
from grapefx.runtime.function import Step
from grapefx.runtime.module import FeedbackModule
from grapefx.runtime.training_state import TrainingState
from tests.zoo import compiled, eager_twin, loss_of, make, train_step

ERRORS = (KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError)


def everything(net: FeedbackModule) -> dict[str, Any]:
    """All that a step may change."""
    state = net.feedback_state_dict()
    return {
        **{f"model/{k}": v.clone() for k, v in net.state_dict().items()},
        **{f"maps/{k}": v for k, v in state["tensors"].items()},
        **{f"momentum/{k}": v for k, v in state["momentum"].items()},
        "schedule": dict(state["schedule"]),
        "skipped": state["skipped"],
        "alignment": net.alignment(),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


class FailAt(TorchDispatchMode):
    """Raises before the k-th operator: where an allocation fails, or Ctrl-C arrives."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.error = at, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error("simulated")
        return func(*args, **(kwargs or {}))


def breaking(
    net: FeedbackModule, part: str, at: int, error: type[BaseException]
) -> Callable[[], None]:
    """Make one of the compiled callables fail before its ``at``-th operator; returns the undo."""
    held = []
    for program in net._captures.programs.values():
        for key, step in list(program.steps.items()):
            held.append((program, key, step))
            run = getattr(step, part)

            def fails(inputs: list[Any], run: Any = run) -> Any:
                with FailAt(at, error):
                    return run(inputs)

            program.steps[key] = dataclasses.replace(step, **{part: fails})

    def undo() -> None:
        for program, key, step in held:
            program.steps[key] = step

    return undo


def trained(name: str = "cnn", **options: Any) -> tuple[FeedbackModule, FeedbackModule, Any]:
    """Two nets in the same state, each graph compiled."""
    model, args = make(name)
    other = eager_twin(model)
    options = {"calib_unit": "step", "calib_every": 2, **options}
    nets = [compiled(m, "grape", **options) for m in (model, other)]
    for net in nets:
        for _ in range(3):  # calibration, aligned, calibration
            train_step(net, args)
    return nets[0], nets[1], args


def operators(net: FeedbackModule, part: str, args: Any) -> int:
    counter = FailAt(-1, RuntimeError)
    step = next(
        s for p in net._captures.programs.values() for (k, _), s in p.steps.items() if k == "align"
    )
    seen = []

    def counts(inputs: list[Any]) -> Any:
        with counter:
            return getattr(step, part)(inputs)

    for program in net._captures.programs.values():
        for key, s in list(program.steps.items()):
            if s is step:
                program.steps[key] = dataclasses.replace(s, **{part: counts})
                seen.append((program, key))
    train_step(net, args)
    for program, key in seen:
        program.steps[key] = step
    return -1 - counter.left


@pytest.mark.parametrize("part", ["forward", "update"])
def test_failing_anywhere_in_a_graph(part: str) -> None:
    net, twin, args = trained()
    count = operators(net, part, args)  # one step more for each
    train_step(twin, args)
    train_step(net, args)
    train_step(twin, args)
    assert count > 20
    # the buffers are written by the last operators of the forward
    points = {1, 2, count // 2, *range(max(count - 7, 3), count + 1)}
    for at, error in zip(sorted(points), itertools.cycle(ERRORS), strict=False):
        undo = breaking(net, part, at, error)
        torch.manual_seed(5)
        if part == "forward":
            before = everything(net)
            with pytest.raises(error):
                net(*args)
            assert same(everything(net), before), at
        else:
            net.zero_grad()
            loss = loss_of(net(*args))
            before = everything(net)  # a forward alone has written its statistics
            with pytest.raises(error):
                loss.backward()
            assert same(everything(net), before), at
            assert all(p.grad is None for p in net.parameters())
        undo()
    if part == "update":
        net.load_state_dict(twin.state_dict())  # the statistics of forwards without a backward
    for _ in range(3):
        assert train_step(net, args) == train_step(twin, args)
    assert same(everything(net), everything(twin))


def test_an_interrupted_inference_leaves_the_statistics() -> None:
    model, args = make("cnn")
    net = compiled(model, "grape")
    with torch.no_grad():
        net(*args)
        (program,) = net._captures.programs.values()
        ((key, whole),) = program.forwards.items()
        before = {k: v.clone() for k, v in net.state_dict().items()}

        def late(inputs: list[Any]) -> Any:
            whole.forward(inputs)
            raise KeyboardInterrupt

        program.forwards[key] = dataclasses.replace(whole, forward=late)
        with pytest.raises(KeyboardInterrupt):
            net(*args)
        for k, v in net.state_dict().items():
            assert torch.equal(v, before[k]), k
        program.forwards[key] = whole
        net(*args)
    assert int(net.get_buffer("1.num_batches_tracked")) == 2


def lines(function: Any) -> Iterator[int]:
    first = function.__code__.co_firstlineno
    yield from sorted({n for _, _, n in function.__code__.co_lines() if n and n > first})


def interrupt_at(function: Any, line: int) -> Any:
    """A trace function that raises when ``line`` of ``function`` is about to run."""

    def tracer(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code is not function.__code__:
            return None

        def local(frame: Any, event: str, _: Any) -> Any:
            if event == "line" and frame.f_lineno == line:
                raise KeyboardInterrupt
            return local

        return local(frame, event, None)

    return tracer


@pytest.mark.parametrize("options", [{}, {"calib_update": "sgd", "calib_every": 1}])
def test_ctrl_c_before_every_line_of_the_commit(options: dict[str, Any]) -> None:
    """All that a step changes is changed, or nothing is."""
    net, _, args = trained("mlp", **options)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    learned, metrics = net.feedback_state_dict(), net._state.metrics

    def rewind() -> dict[str, Any]:
        net.load_state_dict(weights)
        net.load_feedback_state_dict(learned)
        net._state.metrics = metrics
        return everything(net)

    train_step(net, args)
    finished = everything(net)
    for function in (
        Step.backward,
        call_module.TrainingCall.commit,
        call_module.TrainingCall._finish,
        TrainingState.commit,
    ):
        outcomes = set()
        for line in lines(function):
            before = rewind()
            loss = loss_of(net(*args))
            tracer = interrupt_at(function, line)
            threading.settrace(tracer)
            old = sys.gettrace()
            sys.settrace(tracer)
            try:
                loss.backward()
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(old)
                threading.settrace(None)  # type: ignore[arg-type]
            after = everything(net)
            done, undone = same(after, finished), same(after, before)
            assert done or undone, f"half a step after an interrupt at {function}, line {line}"
            outcomes.add(done)
        assert False in outcomes  # the tracer did interrupt
    rewind()
    train_step(net, args)
    assert same(everything(net), finished)


def test_an_interrupted_walk_over_the_modules_is_done_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, args = make("mlp")
    net = compiled(model, "bp")
    train_step(net, args)
    model.layers[0] = nn.Linear(8, 12, bias=False).double()  # type: ignore[index,operator]
    named = nn.Module.named_modules
    monkeypatch.setattr(
        nn.Module, "named_modules", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        net(*args)
    monkeypatch.setattr(nn.Module, "named_modules", named)
    twin = eager_twin(model)
    assert train_step(net, args) == pytest.approx(float(train_step(twin, args)))


def test_class_targets_survive_a_step_that_failed() -> None:
    model, args = make("mlp")
    net = compiled(model, "drtp", calib_every=None)
    net.targets(torch.arange(6) % 5)
    train_step(net, args)
    net.targets(torch.arange(6) % 5)
    undo = breaking(net, "update", 3, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        train_step(net, args)
    undo()
    train_step(net, args)
    with pytest.raises(MethodError, match="class targets"):
        train_step(net, args)
