"""Modules, hooks, modes, settings, random numbers and side effects: changed as a whole."""

from __future__ import annotations

import contextlib
import random
from collections import deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.staleness.sources import Made, Reader, whole


class Plain(Reader):
    """Two layers with a child between them, and a dropout that is off."""

    def __init__(self, child: nn.Module | None = None) -> None:
        super().__init__()
        self.child = child if child is not None else nn.Tanh()

    def forward(self, x: Tensor) -> Any:
        return self.last(self.child(self.first(x)))


def _model(forward: Any, **children: nn.Module) -> Reader:
    model: Any = type("Model", (Reader,), {"forward": forward})()
    for name, child in children.items():
        setattr(model, name, child)
    return model


# hooks


class _Handle:
    """A hook that ``change`` adds and takes away."""

    def __init__(self, add: Any, backwards: bool = False) -> None:
        self.add, self.backwards, self.handle = add, backwards, None

    def __call__(self, m: Any, changed: bool) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        if changed != self.backwards:
            self.handle = self.add(m)

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()


def _hook(name: str, add: Any) -> None:
    """A hook that is added between the calls, and one that is removed."""
    for backwards in (False, True):

        def build(backwards: bool = backwards) -> Made:
            handle = _Handle(add, backwards)
            return Made(Plain(), handle, restore=handle.remove)

        build.__name__ = f"{name}_{'removed' if backwards else 'added'}"
        whole("hooks")(build)


def _times(m: Any, args: Any, out: Any) -> Any:
    return out * 3


def _pre_times(m: Any, args: Any) -> Any:
    return (args[0] * 3,)


def _keyword_times(m: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return out * 3


_hook("forward", lambda m: m.child.register_forward_hook(_times))
_hook("forward_on_the_root", lambda m: m.register_forward_hook(_times))
_hook("pre", lambda m: m.child.register_forward_pre_hook(_pre_times))
_hook("pre_on_the_root", lambda m: m.register_forward_pre_hook(_pre_times))
_hook("with_kwargs", lambda m: m.child.register_forward_hook(_keyword_times, with_kwargs=True))
_hook("global", lambda m: nn.modules.module.register_module_forward_hook(_global_times))
_hook("gradient_of_a_parameter", lambda m: m.first.weight.register_hook(lambda g: g * 2))
_hook("backward", lambda m: m.child.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)))


def _global_times(m: Any, args: Any, out: Any) -> Any:
    return out * 3 if isinstance(m, nn.Tanh) else None


@whole("hooks")
def second_forward_hook() -> Made:
    model = Plain()
    model.child.register_forward_hook(_times)
    handle = _Handle(lambda m: m.child.register_forward_hook(lambda m, a, o: o + 1))
    return Made(model, handle)


@whole("hooks")
def order_of_two() -> Made:
    handles: list[Any] = []

    def change(m: Any, c: bool) -> None:
        for h in handles:
            h.remove()
        both = [lambda m, a, o: o + 1, _times]
        handles[:] = [m.child.register_forward_hook(h) for h in (both[::-1] if c else both)]

    return Made(Plain(), change)


@whole("hooks")
def number_that_it_reads() -> Made:
    box = SimpleNamespace(n=2.0)
    model = Plain()
    model.child.register_forward_hook(lambda m, a, o: o * box.n)
    return Made(model, lambda m, c: setattr(box, "n", 3.0 if c else 2.0))


@whole("hooks")
def cell_that_it_reads() -> Made:
    n = 2.0

    def change(_: Any, c: bool) -> None:
        nonlocal n
        n = 3.0 if c else 2.0

    model = Plain()
    model.child.register_forward_hook(lambda m, a, o: o * n)
    return Made(model, change)


@whole("hooks")
def attribute_that_it_reads() -> Made:
    model = Plain()
    model.child.register_forward_pre_hook(lambda m, a: (a[0] * m.n,))
    return Made(model, lambda m, c: setattr(m.child, "n", 3.0 if c else 2.0))


@whole("hooks")
def number_that_the_root_reads() -> Made:
    box = SimpleNamespace(n=2.0)
    model = Plain()
    model.register_forward_hook(lambda m, a, o: o * box.n)
    return Made(model, lambda m, c: setattr(box, "n", 3.0 if c else 2.0))


@whole("hooks")
def what_it_keeps() -> Made:
    kept: list[Any] = []
    model = Plain()
    model.child.register_forward_hook(lambda m, a, o: kept.append(o.detach()))
    return Made(model, lambda m, c: None, seen=lambda m: list(kept))


@whole("hooks")
def parametrization() -> Made:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 2

    def change(m: Any, c: bool) -> None:
        if parametrize.is_parametrized(m.first):
            parametrize.remove_parametrizations(m.first, "weight", leave_parametrized=False)
        if c:
            parametrize.register_parametrization(m.first, "weight", Double())

    return Made(Plain(), change)


@whole("hooks")
def weight_norm() -> Made:
    def change(m: Any, c: bool) -> None:
        if parametrize.is_parametrized(m.first):
            parametrize.remove_parametrizations(m.first, "weight")
        if c:
            parametrizations.weight_norm(m.first)

    return Made(Plain(), change)


# modes


def _modes(child: Any, change: Any, name: str) -> None:
    def build() -> Made:
        return Made(Plain(child()), change)

    build.__name__ = name
    whole("modes")(build)


for _name, _child in (
    ("dropout", lambda: nn.Dropout(0.5)),
    ("batch_norm", lambda: nn.BatchNorm1d(4)),
    ("rrelu", nn.RReLU),
    ("deep", lambda: nn.Sequential(nn.Sequential(nn.Dropout(0.5)))),
):
    _modes(_child, lambda m, c: m.child.train(not c), f"{_name}_eval")
    _modes(_child, lambda m, c: m.child.train(c), f"{_name}_train")
    _modes(_child, lambda m, c: m.train(not c), f"{_name}_root_eval")
_modes(lambda: nn.Dropout(0.0), lambda m, c: setattr(m.child, "p", float(c)), "dropout_0_to_1")
_modes(lambda: nn.Dropout(1.0), lambda m, c: setattr(m.child, "p", float(not c)), "dropout_1_to_0")
_modes(lambda: nn.Dropout(0.5), lambda m, c: setattr(m.child, "p", 0.25 if c else 0.5), "dropout_p")
_modes(
    lambda: nn.BatchNorm1d(4), lambda m, c: setattr(m.child, "momentum", 0.3 if c else 0.1),
    "batch_norm_momentum",
)  # fmt: skip
_modes(
    lambda: nn.BatchNorm1d(4), lambda m, c: setattr(m.child, "eps", 0.3 if c else 1e-5),
    "batch_norm_eps",
)  # fmt: skip
_modes(nn.Tanh, lambda m, c: m.first.requires_grad_(not c), "layer_frozen")
_modes(nn.Tanh, lambda m, c: m.first.requires_grad_(c), "layer_thawed")
_modes(nn.Tanh, lambda m, c: m.first.bias.requires_grad_(not c), "bias_frozen")
_modes(nn.Tanh, lambda m, c: m.last.requires_grad_(not c), "last_frozen")


@whole("modes")
def training_flag() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.first(x).tanh() * (2 if self.training else 3))

    return Made(_model(forward), lambda m, c: m.train(not c))


@whole("modes")
def functional_dropout() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(F.dropout(self.first(x), 0.5, self.training))

    return Made(_model(forward), lambda m, c: m.train(not c))


@whole("modes")
def requires_grad_read() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.first(x) * (2 if self.last.weight.requires_grad else 3))

    return Made(_model(forward), lambda m, c: m.last.weight.requires_grad_(not c))


@whole("modes")
def no_grad_inside() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        with torch.set_grad_enabled(self.grad):
            h = self.first(x)
        return self.last(h.tanh())

    return Made(_model(forward), lambda m, c: setattr(m, "grad", not c))


@whole("modes")
def grad_mode_read() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.first(x) * (2 if torch.is_grad_enabled() else 3))

    state = SimpleNamespace(off=False)
    return Made(
        _model(forward),
        lambda m, c: setattr(state, "off", c),
        around=lambda: torch.no_grad() if state.off else contextlib.nullcontext(),
    )


@whole("modes")
def inference_mode() -> Made:
    state = SimpleNamespace(off=False)
    return Made(
        Plain(nn.BatchNorm1d(4)),
        lambda m, c: setattr(state, "off", c),
        around=lambda: torch.inference_mode() if state.off else contextlib.nullcontext(),
    )


# modules


def _child(name: str, before: Any, after: Any) -> None:
    def build() -> Made:
        model = Plain(before())
        made = [model.child, after()]
        return Made(model, lambda m, c: setattr(m, "child", made[c]))

    build.__name__ = name
    whole("modules")(build)


_child("activation_swapped", nn.Tanh, nn.Sigmoid)
_child("identity_swapped", nn.Identity, nn.Tanh)
_child("norm_swapped", nn.Identity, lambda: nn.BatchNorm1d(4))
_child("same_class_swapped", lambda: nn.Linear(4, 4), lambda: nn.Linear(4, 4))
_child("other_number_swapped", lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.5))
_child("deeper", nn.Tanh, lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)))


@whole("modules")
def none_or_a_module() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        h = self.first(x)
        return self.last(h if self.extra is None else self.extra(h))

    extra = nn.Linear(4, 4)
    return Made(_model(forward), lambda m, c: setattr(m, "extra", extra if c else None))


@whole("modules")
def module_list_grows() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        h = self.first(x)
        for block in self.blocks:
            h = block(h).tanh()
        return self.last(h)

    extra = nn.Linear(4, 4)

    def change(m: Any, c: bool) -> None:
        if c:
            m.blocks.append(extra)
        elif len(m.blocks) > 1:
            del m.blocks[1]

    return Made(_model(forward, blocks=nn.ModuleList([nn.Linear(4, 4)])), change)


@whole("modules")
def module_list_item() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.blocks[0](self.first(x)))

    both = [nn.Tanh(), nn.Sigmoid()]

    def change(m: Any, c: bool) -> None:
        m.blocks[0] = both[c]

    return Made(_model(forward, blocks=nn.ModuleList([nn.Tanh()])), change)


@whole("modules")
def module_dict_item() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.blocks["a"](self.first(x)))

    both = [nn.Tanh(), nn.Sigmoid()]
    return Made(
        _model(forward, blocks=nn.ModuleDict({"a": nn.Tanh()})),
        lambda m, c: m.blocks.update({"a": both[c]}),
    )


@whole("modules")
def module_dict_key() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.blocks[self.key](self.first(x)))

    return Made(
        _model(forward, blocks=nn.ModuleDict({"a": nn.Tanh(), "b": nn.Linear(4, 4)})),
        lambda m, c: setattr(m, "key", "b" if c else "a"),
    )


@whole("modules")
def sequential_item_removed() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.blocks(self.first(x)))

    extra = nn.Linear(4, 4)

    def change(m: Any, c: bool) -> None:
        m.blocks = nn.Sequential(nn.Tanh()) if c else nn.Sequential(nn.Tanh(), extra)

    return Made(_model(forward), change)


@whole("modules")
def function_of_a_child() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.act(self.first(x)))

    return Made(_model(forward), lambda m, c: setattr(m, "act", torch.sigmoid if c else F.silu))


@whole("modules")
def module_in_a_list() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.row[0](self.first(x)))

    both = [nn.Tanh(), nn.Sigmoid()]
    return Made(_model(forward), lambda m, c: setattr(m, "row", [both[c]]))


@whole("modules")
def module_as_argument() -> Made:
    model = type(
        "Model", (Reader,), {"forward": lambda self, x, act: self.last(act(self.first(x)))}
    )()
    both = [nn.Tanh(), nn.Sigmoid()]
    state = SimpleNamespace(c=False)
    return Made(model, lambda m, c: setattr(state, "c", c), args=lambda m: (both[state.c],))


@whole("modules")
def forward_swapped_on_a_child() -> Made:
    def change(m: Any, c: bool) -> None:
        m.child.__dict__.pop("forward", None)
        if c:
            m.child.forward = lambda x: torch.relu(x)

    return Made(Plain(), change)


@whole("modules")
def forward_swapped_on_the_root() -> Made:
    def change(m: Any, c: bool) -> None:
        m.__dict__.pop("forward", None)
        if c:
            m.forward = lambda x: m.last(torch.relu(m.first(x)))

    return Made(Plain(), change)


@whole("modules")
def forward_swapped_on_the_class_of_a_child() -> Made:
    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    old = Act.forward
    return Made(
        Plain(Act()),
        lambda m, c: setattr(Act, "forward", (lambda self, x: x.relu()) if c else old),
    )


@whole("modules")
def class_of_a_child() -> Made:
    def change(m: Any, c: bool) -> None:
        m.child.__class__ = nn.Sigmoid if c else nn.Tanh

    return Made(Plain(), change)


for _name, _make, _attribute, _values in (
    ("layer_norm_eps", lambda: nn.LayerNorm(4), "eps", (1e-5, 0.5)),
    ("leaky_relu_slope", lambda: nn.LeakyReLU(), "negative_slope", (0.1, 0.5)),
    ("softmax_dim", lambda: nn.Softmax(1), "dim", (1, 0)),
    ("group_norm_groups", lambda: nn.GroupNorm(2, 4), "num_groups", (2, 4)),
    ("gelu_kind", nn.GELU, "approximate", ("none", "tanh")),
):

    def _build(make: Any = _make, name: str = _attribute, values: Any = _values) -> Made:
        return Made(Plain(make()), lambda m, c: setattr(m.child, name, values[c]))

    _build.__name__ = _name
    whole("modules")(_build)


# settings


@whole("settings")
def default_dtype() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last((self.first(x) * torch.full((4,), 0.1)).double()), torch.ones(2)

    old = torch.get_default_dtype()
    return Made(
        _model(forward),
        lambda m, c: torch.set_default_dtype(torch.float64 if c else torch.float32),
        restore=lambda: torch.set_default_dtype(old),
    )


def _autocast(name: str, before: Any, after: Any) -> None:
    def build() -> Made:
        state = SimpleNamespace(c=False)

        def around() -> Any:
            dtype = after if state.c else before
            return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)

        model = Plain().float()
        return Made(model, lambda m, c: setattr(state, "c", c), around=around)

    build.__name__ = name
    whole("settings")(build)


_autocast("autocast_on", None, torch.bfloat16)
_autocast("autocast_off", torch.bfloat16, None)
_autocast("autocast_dtype", torch.bfloat16, torch.float16)


@whole("settings")
def autocast_inside() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.on):
            h = self.first(x)
        return self.last(h.to(self.last.weight.dtype))

    model = _model(forward).float()
    return Made(model, lambda m, c: setattr(m, "on", c))


@whole("settings")
def autocast_read() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.first(x) * (2 if torch.is_autocast_enabled("cpu") else 3))

    state = SimpleNamespace(c=False)
    return Made(
        _model(forward).float(),
        lambda m, c: setattr(state, "c", c),
        around=lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=state.c),
    )


@whole("settings")
def deterministic_algorithms_read() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.first(x) * (2 if torch.are_deterministic_algorithms_enabled() else 3))

    return Made(
        _model(forward),
        lambda m, c: torch.use_deterministic_algorithms(c),
        restore=lambda: torch.use_deterministic_algorithms(False),
    )


@whole("settings")
def default_device_context() -> Made:
    """Tensors that a forward makes are on the default device, which is given as a context."""

    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.first(x) * torch.full((4,), 2.0, dtype=x.dtype))

    state = SimpleNamespace(c=False)
    return Made(
        _model(forward),
        lambda m, c: setattr(state, "c", c),
        around=lambda: torch.device("cpu") if state.c else contextlib.nullcontext(),
    )


# random numbers: each call starts from its own seed, the same for eager and for the net


def _random(name: str, draw: Any) -> None:
    def build() -> Made:
        def forward(self: Any, x: Tensor) -> Any:
            return self.last(self.first(x) * draw())

        return Made(_model(forward), lambda m, c: None)

    build.__name__ = name
    whole("random")(build)


_random("python_random", lambda: random.random())
_random("python_uniform", lambda: random.uniform(1, 2))
_random("python_randint", lambda: float(random.randint(1, 100)))
_random("python_branch", lambda: 3.0 if random.random() < 0.5 else 2.0)
_random("python_choice", lambda: random.choice([1.0, 2.0, 3.0]))
_random("python_shuffle", lambda: random.sample([1.0, 2.0, 3.0, 4.0], 3)[0])
_random("numpy_rand", lambda: np.random.rand())
_random("numpy_normal", lambda: float(np.random.normal()))
_random("numpy_randint", lambda: int(np.random.randint(1, 100)))
_random("numpy_array", lambda: torch.from_numpy(np.random.rand(4)))
_random("torch_rand", lambda: torch.rand(4))
_random("torch_randn_twice", lambda: torch.randn(4) * torch.randn(4))
_random("torch_randint", lambda: torch.randint(1, 9, (4,)))
_random("torch_permutation", lambda: torch.randperm(4))


@whole("random")
def generator_of_python() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.first(x) * self.generator.random())

    model: Any = _model(forward)
    model.generator = random.Random(3)
    return Made(model, lambda m, c: None)


@whole("random")
def generator_of_numpy() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.first(x) * float(self.generator.random()))

    model: Any = _model(forward)
    model.generator = np.random.default_rng(3)
    return Made(model, lambda m, c: None)


@whole("random")
def generator_of_torch() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.first(x) * torch.rand(4, generator=self.generator))

    model: Any = _model(forward)
    model.generator = torch.Generator().manual_seed(3)
    return Made(model, lambda m, c: None)


# side effects


def _effect(name: str, act: Any, start: Any, seen: Any, restore: Any = lambda: None) -> None:
    """``act(model, h)`` does something beside computing; ``seen(model)`` is what is left."""

    def build() -> Made:
        def forward(self: Any, x: Tensor) -> Any:
            h = self.first(x).tanh()
            found = act(self, h)
            return self.last(h if found is None else found)

        model = _model(forward)
        start(model)
        return Made(model, lambda m, c: None, seen=seen, restore=restore)

    build.__name__ = name
    whole("effects")(build)


COUNT = 0


def _count(self: Any, h: Tensor) -> None:
    self.calls += 1


def _count_and_use(self: Any, h: Tensor) -> Tensor:
    self.calls += 1
    return h * self.calls


def _every_other(self: Any, h: Tensor) -> Tensor:
    self.calls += 1
    return h.relu() if self.calls % 2 else h.sin()


def _count_global(self: Any, h: Tensor) -> None:
    global COUNT
    COUNT += 1


def _count_class(self: Any, h: Tensor) -> None:
    type(self).calls += 1


def _reset_global(_: Any) -> None:
    global COUNT
    COUNT = 0


_effect("counter", _count, lambda m: setattr(m, "calls", 0), lambda m: m.calls)
_effect("counter_used", _count_and_use, lambda m: setattr(m, "calls", 0), lambda m: m.calls)
_effect("counter_float", _count_and_use, lambda m: setattr(m, "calls", 0.5), lambda m: m.calls)
_effect("counter_branch", _every_other, lambda m: setattr(m, "calls", 0), lambda m: m.calls)
_effect("counter_class", _count_class, lambda m: setattr(type(m), "calls", 0), lambda m: m.calls)
_effect(
    "counter_in_a_child",
    lambda m, h: setattr(m.first, "calls", m.first.calls + 1),
    lambda m: setattr(m.first, "calls", 0),
    lambda m: m.first.calls,
)
_effect(
    "list_of_numbers",
    lambda m, h: m.row.append(len(m.row)),
    lambda m: setattr(m, "row", []),
    lambda m: m.row,
)
_effect(
    "list_of_tensors",
    lambda m, h: m.row.append(h.detach()),
    lambda m: setattr(m, "row", []),
    lambda m: m.row,
)
_effect(
    "deque_of_tensors",
    lambda m, h: m.row.append(h.detach()),
    lambda m: setattr(m, "row", deque(maxlen=2)),
    lambda m: list(m.row),
)
_effect(
    "dict_of_tensors",
    lambda m, h: m.box.update(h=h.detach()),
    lambda m: setattr(m, "box", {}),
    lambda m: m.box,
)
_effect(
    "object_with_a_tensor",
    lambda m, h: setattr(m.box, "h", h.detach()),
    lambda m: setattr(m, "box", SimpleNamespace(h=None)),
    lambda m: m.box.h,
)
_effect(
    "attribute_tensor",
    lambda m, h: setattr(m, "h", h.detach()),
    lambda m: None,
    lambda m: m.h,
)
_effect(
    "attribute_shape",
    lambda m, h: setattr(m, "size", tuple(h.shape)),
    lambda m: None,
    lambda m: m.size,
)
_effect(
    "buffer_reassigned",
    lambda m, h: setattr(m, "mean", 0.9 * m.mean + 0.1 * h.detach().mean(0)),
    lambda m: m.register_buffer("mean", torch.zeros(4, dtype=torch.float64)),
    lambda m: m.mean,
)


def _buffer_used(self: Any, h: Tensor) -> Tensor:
    self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
    return h - self.mean


def _buffer_in_place(self: Any, h: Tensor) -> Tensor:
    self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return h - self.mean


def _buffer_data(self: Any, h: Tensor) -> Tensor:
    self.mean.data = self.mean * 0.9 + h.detach().mean(0)
    return h - self.mean


def _buffer_copied(self: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        self.mean.copy_(h.mean(0))
    return h - self.mean


def _ring(self: Any, h: Tensor) -> None:
    self.mean[self.calls % 4] = h.detach().mean()
    self.calls += 1


for _name, _act in (
    ("buffer_reassigned_and_used", _buffer_used),
    ("buffer_in_place", _buffer_in_place),
    ("buffer_data", _buffer_data),
    ("buffer_copied", _buffer_copied),
):
    _effect(
        _name,
        _act,
        lambda m: m.register_buffer("mean", torch.zeros(4, dtype=torch.float64)),
        lambda m: m.mean,
    )


def _start_ring(m: Any) -> None:
    m.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
    m.calls = 0


_effect("buffer_ring", _ring, _start_ring, lambda m: (m.mean, m.calls))
_effect(
    "tensor_in_place",
    lambda m, h: m.t.add_(h.detach().mean(0)),
    lambda m: setattr(m, "t", torch.zeros(4, dtype=torch.float64)),
    lambda m: m.t,
)


@whole("effects")
def counter_global() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        _count_global(self, x)
        return self.last(self.first(x) * COUNT)

    def around() -> Any:
        _reset_global(None)
        return contextlib.nullcontext()

    return Made(_model(forward), lambda m, c: None, around=around)


@whole("effects")
def counter_in_a_cell() -> Made:
    calls = 0

    def forward(self: Any, x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return self.last(self.first(x) * calls)

    return Made(_model(forward), lambda m, c: None, seen=lambda m: calls)


@whole("effects")
def argument_written_in_place() -> Made:
    state = torch.zeros(4, dtype=torch.float64)

    def forward(self: Any, x: Tensor, state: Tensor) -> Any:
        h = self.first(x).tanh()
        state.add_(h.detach().mean(0))
        return self.last(h + state)

    return Made(
        _model(forward), lambda m, c: None, args=lambda m: (state,), seen=lambda m: state.clone()
    )


@whole("effects")
def dict_argument_filled() -> Made:
    box: dict[str, Any] = {}

    def forward(self: Any, x: Tensor, box: Any) -> Any:
        h = self.first(x).tanh()
        box["h"] = h.detach()
        return self.last(h)

    return Made(_model(forward), lambda m, c: None, args=lambda m: (box,), seen=lambda m: dict(box))


# outputs

Pair = namedtuple("Pair", ["a", "b"])


@dataclass
class Result:
    """A dataclass with a tensor, a number and nothing."""

    a: Any
    n: Any = None


@dataclass(frozen=True)
class FrozenResult:
    """A frozen dataclass with a tensor."""

    a: Any
    n: Any = None


class OwnResult:
    """An object of a plain class."""

    def __init__(self, a: Any, n: Any) -> None:
        self.a, self.n = a, n


class SlotsResult:
    """An object with slots."""

    __slots__ = ("a", "n")

    def __init__(self, a: Any, n: Any) -> None:
        self.a, self.n = a, n


def _output(name: str, wrap: Any) -> None:
    """The output depends on ``self.n``, which changes."""

    def build() -> Made:
        def forward(self: Any, x: Tensor) -> Any:
            h = self.first(x).tanh()
            return wrap(self.last(h) * self.n, h, self.n)

        return Made(_model(forward), lambda m, c: setattr(m, "n", 3.0 if c else 2.0))

    build.__name__ = name
    whole("outputs")(build)


_output("tuple", lambda y, h, n: (y, h, n))
_output("list", lambda y, h, n: [y, [h], n])
_output("dict", lambda y, h, n: {"y": y, "n": n})
_output("nested", lambda y, h, n: {"y": (y, [h, {"n": n}])})
_output("namedtuple", lambda y, h, n: Pair(y, n))
_output("dataclass", lambda y, h, n: Result(y, n))
_output("frozen_dataclass", lambda y, h, n: FrozenResult(y, n))
_output("object", lambda y, h, n: OwnResult(y, n))
_output("slots_object", lambda y, h, n: SlotsResult(y, n))
_output("namespace", lambda y, h, n: SimpleNamespace(a=y, n=n))
_output("dataclass_in_a_list", lambda y, h, n: [Result(y, n), Result(h)])
_output("same_twice", lambda y, h, n: (y, y))
_output("none_and_string", lambda y, h, n: (y, None, f"{n}"))
_output("shape", lambda y, h, n: (y, y.shape, y.shape[0], n))
_output("detached", lambda y, h, n: (y, h.detach()))
_output("integer_tensor", lambda y, h, n: (y, y.argmax(1)))
_output("view", lambda y, h, n: (y, y[:, :1]))


@whole("outputs")
def input_itself() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.first(x) * self.n), x

    return Made(_model(forward), lambda m, c: setattr(m, "n", 3.0 if c else 2.0))


@whole("outputs")
def parameter_itself() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        return self.last(self.first(x) * self.n), self.first.weight

    return Made(_model(forward), lambda m, c: setattr(m, "n", 3.0 if c else 2.0))


@whole("outputs")
def kind_changes() -> Made:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.last(self.first(x))
        return (y, x) if self.pair else y

    return Made(_model(forward), lambda m, c: setattr(m, "pair", c))
