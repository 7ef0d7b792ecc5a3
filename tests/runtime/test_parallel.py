"""Forms of an update: all compute the same; the fastest is kept; captures never change results.

CUDA graphs are replaced by a stand-in that runs the call again and writes its results into the same
memory, which is what a replay does.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grapefx.errors import GrapefxWarning, OptionError
from grapefx.lowering import PARALLEL, lower_tasks
from grapefx.options import Options
from grapefx.passes.divide.tasks import REST, SHARED, Task, Tasks, split_tasks
from grapefx.runtime import parallel
from grapefx.runtime.cudagraph import CAPTURES, MISSES, WARM, Graphed
from grapefx.runtime.parallel import ON_CPU, ON_CUDA, Fastest, StreamRunner, assign, forms_of
from tests.passes.test_horizontal import case, kind_of, parts_of, real_inputs
from tests.zoo import MLP, assert_same_gradients, compiled, eager_twin, train_step
from tools.common import networks

# the option


def test_every_choice_has_forms() -> None:
    for table in (ON_CPU, ON_CUDA):
        assert set(table) == set(PARALLEL)
    assert Options().parallel == "off"
    assert forms_of("auto", "cuda", fixed=True) == parallel.FORMS
    assert forms_of("auto", "cpu", fixed=True) == ("off", "horizontal")
    assert forms_of("horizontal", "cuda", fixed=False) == ("off",)


def test_option_is_checked() -> None:
    with pytest.raises(OptionError, match="Did you mean 'horizontal'"):
        Options(parallel="horisontal")


@pytest.mark.parametrize("form", ["horizontal", "streams", "auto"])
def test_training_is_the_same(form: str) -> None:
    torch.manual_seed(0)
    model = MLP(depth=4).double()
    x = torch.randn(6, 8, dtype=torch.float64)
    plain = compiled(eager_twin(model), "grape")
    net = compiled(model, "grape", parallel=form)
    for step in range(3):  # the first calibrates
        train_step(net, (x,))
        train_step(plain, (x,))
        assert_same_gradients(net, plain, 1e-10)
        if step == 0:
            (program,) = net._captures.programs.values()
            assert list(program.steps) == [("calibration", 6)]
    for k, v in net.feedback.items():
        torch.testing.assert_close(v, plain.feedback[k], rtol=1e-10, atol=1e-12)
    # another batch size has a symbolic one, which nothing batches
    train_step(net, (x[:5],))
    train_step(plain, (x[:5],))
    assert_same_gradients(net, plain, 1e-10)


def test_calibration_and_chains_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forms = parallel.forms_of

    def spy(choice: str | None, device: str, *, fixed: bool) -> tuple[str, ...]:
        seen.append(choice)
        return forms(choice, device, fixed=fixed)

    monkeypatch.setattr("grapefx.runtime.program.forms_of", spy)
    x = torch.randn(6, 8)
    net = compiled(MLP(), "dfa", parallel="horizontal")
    for _ in range(2):
        train_step(net, (x,))
    train_step(compiled(MLP(), "fa", parallel="horizontal", calib_every=None), (x,))
    assert seen == ["off", "horizontal", "off"]


@pytest.mark.slow
def test_batched_updates_through_inductor() -> None:
    torch.manual_seed(0)
    model = networks.Transformer(11, 6, 8, 2, 2, 12, 0.0)
    x = torch.randint(0, 11, (4, 6))
    plain = compiled(eager_twin(model), "grape", calib_every=None)
    net = compiled(model, "grape", calib_every=None, parallel="horizontal", backend="inductor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grapefx.passes.divide.horizontal.WORTH", {"cpu": 2**60})
        for _ in range(2):
            train_step(net, (x,))
            train_step(plain, (x,))
            assert_same_gradients(net, plain, 1e-3)


# the choice


class Clock:
    """Seconds by name, handed out instead of measured; the run still takes place."""

    def __init__(self, **times: float) -> None:
        self.times = times
        self.runs: list[str] = []

    def __call__(self, name: str, run: Callable[[], Any]) -> float:
        self.runs.append(name)
        run()
        return self.times[name]


@pytest.mark.parametrize("best", ["off", "horizontal"])
def test_the_fastest_is_kept(best: str) -> None:
    def made(name: str) -> Callable[[list[Any]], Any]:
        def call(inputs: list[Any]) -> Any:
            called.append(name)
            inputs.clear()
            return name

        return call

    called: list[str] = []
    times = {"off": 2.0, "horizontal": 2.0, best: 1.0}
    clock = Clock(**times)
    fastest = Fastest({n: made(n) for n in times}, clock)
    x = torch.ones(3)
    given = [x]
    assert fastest(given) == best and given == []
    assert set(clock.runs) == set(times) and fastest.found == times
    called.clear()
    assert fastest([x]) == best and called == [best]


def test_a_form_that_breaks_is_left_out() -> None:
    def broken(inputs: list[Any]) -> Any:
        raise RuntimeError("no such stream\nmore")

    fastest = Fastest({"off": lambda i: "off", "streams": broken}, Clock(off=2.0))
    with pytest.warns(
        GrapefxWarning, match=r"'streams' is left out: RuntimeError: no such stream$"
    ):
        assert fastest([torch.ones(3)]) == "off"
    assert fastest([]) == "off" and fastest.found == {"off": 2.0}


def test_auto_measures_the_real_step() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    clock = Clock(off=2.0, horizontal=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "seconds", clock)
        net = compiled(MLP(depth=4), "dfa", parallel="auto", calib_every=None)
        train_step(net, (x,))
    (program,) = net._captures.programs.values()
    (step,) = program.steps.values()
    assert step.update.chosen == "horizontal"  # type: ignore[attr-defined]
    assert set(clock.runs) == {"off", "horizontal"}


# tasks and streams


@functools.cache
def cut(name: str, method: str) -> tuple[Any, Tasks, list[Any]]:
    plan, model, args = case(name, method)
    kind = kind_of(plan)
    parts = parts_of(plan, kind, args, "inductor", True)
    return parts, split_tasks(parts.update), real_inputs(plan, kind, parts, model, args)


@pytest.mark.parametrize(("name", "method"), [("mlp", "grape"), ("micro", "dfa")])
def test_tasks_are_the_update_bit_for_bit(name: str, method: str) -> None:
    parts, tasks, inputs = cut(name, method)
    calls = lower_tasks(tasks, [], "eager")
    order, lanes = assign(tasks, 4, "h100")
    found = StreamRunner(tasks, calls, order, lanes)(list(inputs))
    for old, new in zip(parts.update(*inputs), found, strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())
    names = [t.name for t in tasks.tasks]
    assert len(names) == len(set(names)) > 4
    layers = [t for t in tasks.tasks if t.name not in (SHARED, REST)]
    first = [i for i, t in enumerate(tasks.tasks) if t.name == SHARED]
    assert all(set(t.preds) <= set(first) for t in layers)


def test_equal_tasks_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tasks, _ = cut("mlp", "dfa")
    made = []
    monkeypatch.setattr(
        "grapefx.lowering._lower", lambda gm, *_: (made.append(gm) or (lambda i: i), [])
    )
    calls = lower_tasks(tasks, [], "inductor")
    layers = [c for c, t in zip(calls, tasks.tasks, strict=True) if t.name.startswith("layers")]
    # the first of five reads an input of another width
    assert len(layers) == 5 and len(set(map(id, layers))) == 2 and len(made) < len(calls)


def fan(count: int) -> Tasks:
    """A shared task, ``count`` layers that wait for it, and the rest."""
    gm = nn.Identity()
    one = Task(SHARED, gm, (), (), ())  # type: ignore[arg-type]
    layers = [Task(f"l{i}", gm, (), (0,), ()) for i in range(count)]  # type: ignore[arg-type]
    rest = Task(REST, gm, (), tuple(range(1, count + 1)), ())  # type: ignore[arg-type]
    return Tasks((one, *layers, rest), ())


def test_layers_spread_over_streams() -> None:
    order, lanes = assign(fan(8), 4, "h100", costs=[1.0, *[2.0] * 8, 1.0])
    assert sorted(lanes[1:9]) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert order[0] == 0 and order[-1] == 9
    # one long layer: nobody else gets on its stream
    order, lanes = assign(fan(4), 2, "h100", costs=[0.0, 9.0, 3.0, 3.0, 3.0, 0.0])
    assert lanes[1] not in (lanes[2], lanes[3], lanes[4])
    position = {t: k for k, t in enumerate(order)}
    assert all(position[p] < position[i] for i, t in enumerate(fan(4).tasks) for p in t.preds)


class FakeStreams:
    """Stands for ``torch.cuda``: records who waits for what."""

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.device_index, self.seen = name, 0, set[str]()

        def wait_event(self, event: Any) -> None:
            self.seen |= event.seen

    class Event:
        def __init__(self) -> None:
            self.seen: set[str] = set()

        def record(self, stream: Any) -> None:
            self.seen = set(stream.seen)

    def __init__(self) -> None:
        self.main = self.now = FakeStreams.Stream("main")
        self.main.seen.add("inputs")

    def stream(self, s: Any) -> Any:
        outer = self

        class Use:
            def __enter__(self) -> None:
                outer.now = s

            def __exit__(self, *_: object) -> None:
                outer.now = outer.main

        return Use()


def test_streams_wait_for_what_they_read_and_join(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeStreams()
    count = iter(range(9))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: FakeStreams.Stream(f"s{next(count)}"))
    monkeypatch.setattr(torch.cuda, "Event", FakeStreams.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: fake.main)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    tasks = fan(5)
    ran: list[tuple[str, str]] = []

    def call(i: int) -> Callable[[list[Any]], Any]:
        def run(_: list[Any]) -> list[Any]:
            task = tasks.tasks[i]
            assert "inputs" in fake.now.seen
            assert {tasks.tasks[p].name for p in task.preds} <= fake.now.seen, task.name
            fake.now.seen.add(task.name)
            ran.append((task.name, fake.now.name))
            return []

        return run

    order, lanes = assign(tasks, 3, "h100", costs=[1.0, *[2.0] * 5, 1.0])
    runner = StreamRunner(tasks, [call(i) for i in range(7)], order, lanes)
    for _ in range(2):
        runner._on_streams([], [None] * 7, torch.device("cuda"))
        assert {t.name for t in tasks.tasks} <= fake.main.seen
        fake.main.seen = {"inputs"}
    assert len(ran) == 14 and len({s for _, s in ran}) == 3


# CUDA graphs


def unowned(value: Any) -> Any:
    """The same memory, which it does not keep alive: a CUDA graph knows addresses only."""
    if not isinstance(value, Tensor) or not value.numel():
        return value
    size = value.untyped_storage().nbytes() - value.storage_offset() * value.element_size()
    memory = (ctypes.c_char * size).from_address(value.data_ptr())
    return torch.frombuffer(memory, dtype=value.dtype).as_strided(value.shape, value.stride())


class Recorder:
    """A replay runs the call again and writes into the memory of the capture."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, fn: Any, inputs: list[Any]) -> tuple[Callable[[], Any], list[Any]]:
        self.captures += 1
        outputs = list(fn(list(inputs)))
        sources, targets = ([unowned(v) for v in vs] for vs in (inputs, outputs))

        def replay() -> None:
            self.replays += 1
            for out, new in zip(targets, fn(list(sources)), strict=True):
                if isinstance(out, Tensor):
                    out.copy_(new)

        return replay, outputs


def graphed(recorder: Recorder) -> Graphed:
    """(w, x) -> (x w, sum): w stays, the sum outlives the step."""

    def call(inputs: list[Any]) -> list[Any]:
        w, x = inputs
        inputs.clear()
        return [w * x, (w * x).sum(), None]

    return Graphed(call, stable=frozenset([0]), lasting=frozenset([1]), recorder=recorder)


def test_a_capture_replays_with_new_values() -> None:
    recorder, w = Recorder(), torch.full((3,), 2.0)
    net = graphed(recorder)
    sums = []
    for k in range(WARM + 4):
        w.fill_(k + 1)
        x = torch.full((3,), float(k))
        out = net([w, x])
        assert out[0].tolist() == [(k + 1.0) * k] * 3 and out[2] is None
        sums.append(out[1])
        del out
    assert recorder.captures == 1 and recorder.replays == 4
    assert [float(s) for s in sums] == [3.0 * k * (k + 1) for k in range(WARM + 4)]


def test_what_is_held_is_never_overwritten() -> None:
    recorder, w = Recorder(), torch.full((3,), 2.0)
    net = graphed(recorder)
    held = []
    for k in range(WARM + 4):
        held.append(net([w, torch.full((3,), float(k))])[0])
    assert [float(h[0]) for h in held] == [2.0 * k for k in range(WARM + 4)]
    assert recorder.replays == 1
    held.clear()
    net([w, torch.ones(3)])
    assert recorder.replays == 2


def test_a_view_or_a_detached_copy_holds_as_well() -> None:
    recorder, w = Recorder(), torch.full((3,), 2.0)
    net = graphed(recorder)
    for _ in range(WARM):
        net([w, torch.ones(3)])
    view = net([w, torch.ones(3)])[0].detach()[:1]
    assert recorder.replays == 1
    net([w, torch.zeros(3)])
    assert recorder.replays == 1 and float(view) == 2.0


def test_moved_parameters_are_captured_again_but_not_for_ever() -> None:
    recorder = Recorder()
    net = graphed(recorder)
    w = torch.full((3,), 2.0)
    for _ in range(WARM + 1):
        net([w, torch.ones(3)])
    w = torch.full((3,), 5.0)
    for _ in range(MISSES + WARM + 2):
        assert net([w, torch.ones(3)])[0].tolist() == [5.0] * 3
    assert recorder.captures == 2
    kept = []
    for k in range(100):
        kept.append(torch.full((3,), float(k)))  # another address each time
        assert net([kept[-1], torch.ones(3)])[0].tolist() == [float(k)] * 3
    assert recorder.captures <= CAPTURES + 1


def test_a_number_on_the_host_is_not_baked_in() -> None:
    recorder = Recorder()
    net = graphed(recorder)
    net.fn = lambda inputs: [inputs[1], inputs[1], None]
    for _ in range(WARM + 2):
        net([torch.ones(3, device="meta"), torch.ones(3)])
    assert recorder.captures == 0


def test_a_failed_capture_is_said_once_and_left() -> None:
    def refuse(fn: Any, inputs: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    net = graphed(Recorder())
    net.recorder = refuse
    w, x = torch.full((3,), 2.0), torch.ones(3)
    with pytest.warns(GrapefxWarning, match="not permitted") as caught:
        for _ in range(WARM + 5):
            assert net([w, x])[0].tolist() == [2.0] * 3
    assert len(caught) == 1


@pytest.mark.parametrize("method", ["dfa", "grape"])
def test_training_through_captures(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wiring of a CUDA device on a CPU: every graph captured, every update form measured."""
    recorder = Recorder()
    monkeypatch.setattr("grapefx.runtime.program._device_of", lambda _: "cuda")
    monkeypatch.setattr("grapefx.runtime.cudagraph.record_cuda", recorder)
    monkeypatch.setattr(parallel, "seconds", Clock(off=2, graphs=3, horizontal=1, streams=4))
    torch.manual_seed(0)
    model = MLP(depth=4).double()
    plain = compiled(eager_twin(model), method, calib_every=None, parallel="off")
    net = compiled(model, method, calib_every=None, parallel="auto")
    for step in range(12):
        x = torch.randn(6, 8, dtype=torch.float64)
        if step == 6:  # two forwards in flight, gradients that add up, a gradient that is kept
            for n in (net, plain):
                n.zero_grad()
                first, second = n(x), n(2 * x)
                second.square().mean().backward()
                (3 * first).square().mean().backward()
        else:
            train_step(net, (x,))
            train_step(plain, (x,))
        assert_same_gradients(net, plain, 1e-10)
        if step == 8:
            kept = [p.grad for p in net.parameters()]
            copies = [g.clone() for g in kept if g is not None]
        for p in (*net.parameters(), *plain.parameters()):
            p.data.mul_(0.99)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))  # type: ignore[arg-type]
    for k, v in net.feedback.items():
        torch.testing.assert_close(v, plain.feedback[k], rtol=1e-9, atol=1e-12)
    # captured: the forward, three forms while they are measured, the chosen one. Replayed: each of
    # the three 7 times, then all but warm-up, a second forward in flight, and kept gradients
    assert recorder.captures == 5 and recorder.replays >= 21 + 9 + 6
