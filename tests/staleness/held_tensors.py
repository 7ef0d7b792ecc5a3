"""Where a tensor may be held: beside the parameters, changed in place and replaced."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.staleness.sources import Made, Reader, tensor, whole

TENSOR: Any = None
_HOLDER = SimpleNamespace(t=None)


def _value(changed: bool) -> Tensor:
    return torch.full((4,), 3.0 if changed else 2.0, dtype=torch.float64)


def _set_global(t: Tensor) -> None:
    global TENSOR
    TENSOR = t


class _Slots:
    __slots__ = ("t",)


def _cell() -> tuple[Any, Any, Any]:
    held: Any = None

    def put(_: Any, t: Tensor) -> None:
        nonlocal held
        held = t

    return (lambda self: held), put, (lambda m: held)


def _box(m: Any, make: Any) -> Any:
    return m.__dict__.setdefault("box", make())


# name: (read, put a new tensor, find the tensor)
_PLACES: dict[str, Any] = {
    "attribute": lambda: (lambda self: self.t, lambda m, t: setattr(m, "t", t), lambda m: m.t),
    "attribute_of_a_child": lambda: (
        lambda self: self.first.t,
        lambda m, t: setattr(m.first, "t", t),
        lambda m: m.first.t,
    ),
    "list": lambda: (
        lambda self: self.box[0],
        lambda m, t: _box(m, lambda: [t]).__setitem__(0, t),
        lambda m: m.box[0],
    ),
    "dict": lambda: (
        lambda self: self.box["t"],
        lambda m, t: _box(m, dict).update(t=t),
        lambda m: m.box["t"],
    ),
    "tuple": lambda: (
        lambda self: self.box[0],
        lambda m, t: setattr(m, "box", (t,)),
        lambda m: m.box[0],
    ),
    "deque": lambda: (
        lambda self: self.box[0],
        lambda m, t: _box(m, lambda: deque([t])).__setitem__(0, t),
        lambda m: m.box[0],
    ),
    "object": lambda: (
        lambda self: self.box.t,
        lambda m, t: setattr(_box(m, SimpleNamespace), "t", t),
        lambda m: m.box.t,
    ),
    "slots": lambda: (
        lambda self: self.box.t,
        lambda m, t: setattr(_box(m, _Slots), "t", t),
        lambda m: m.box.t,
    ),
    "list_in_an_object": lambda: (
        lambda self: self.box.row[0],
        lambda m, t: setattr(_box(m, SimpleNamespace), "row", [t]),
        lambda m: m.box.row[0],
    ),
    "global": lambda: (lambda self: TENSOR, lambda m, t: _set_global(t), lambda m: TENSOR),
    "global_object": lambda: (
        lambda self: _HOLDER.t,
        lambda m, t: setattr(_HOLDER, "t", t),
        lambda m: _HOLDER.t,
    ),
    "closure": _cell,
    "class_attribute": lambda: (
        lambda self: self.t,
        lambda m, t: setattr(type(m), "t", t),
        lambda m: type(m).t,
    ),
    "buffer": lambda: (
        lambda self: self.t,
        lambda m, t: m.register_buffer("t", t),
        lambda m: m.t,
    ),
    "loose_buffer": lambda: (
        lambda self: self.t,
        lambda m, t: m.register_buffer("t", t, persistent=False),
        lambda m: m.t,
    ),
    "parameter": lambda: (
        lambda self: self.t,
        lambda m, t: setattr(m, "t", nn.Parameter(t)),
        lambda m: m.t,
    ),
    "frozen_parameter": lambda: (
        lambda self: self.t,
        lambda m, t: setattr(m, "t", nn.Parameter(t, requires_grad=False)),
        lambda m: m.t,
    ),
    "loose_trainable_tensor": lambda: (
        lambda self: self.box[0],
        lambda m, t: setattr(m, "box", [t.requires_grad_()]),
        lambda m: m.box[0],
    ),
    "list_of_parameters": lambda: (
        lambda self: self.box[0],
        lambda m, t: setattr(m, "box", [nn.Parameter(t)]),
        lambda m: m.box[0],
    ),
}


def _in_place(t: Tensor, changed: bool) -> None:
    with torch.no_grad():
        t.copy_(_value(changed))


def _through_data(t: Tensor, changed: bool) -> None:
    t.data = _value(changed)


def _register(name: str, place: Any) -> None:
    def source(how: Any) -> Any:
        def build() -> Any:
            read, put, find = place()
            fresh = True

            def change(m: Any, changed: bool) -> None:
                nonlocal fresh
                if how is None or fresh:
                    put(m, _value(changed))
                else:
                    how(find(m), changed)
                fresh = False

            def seen(m: Any) -> Any:
                found = find(m)
                return found.grad if found.requires_grad else found

            return read, change, {"seen": seen}

        return build

    for how, text in ((_in_place, "in_place"), (_through_data, "data"), (None, "replaced")):
        build = source(how)
        build.__name__ = f"{name}_{text}"
        tensor()(build)


for _name, _place in _PLACES.items():
    _register(_name, _place)


@tensor()
def other_dtype() -> Any:
    return (
        lambda self: self.t,
        lambda m, c: setattr(m, "t", _value(c).to(torch.float32 if c else torch.float64)),
    )


@tensor()
def other_shape() -> Any:
    return lambda self: self.t, lambda m, c: setattr(m, "t", _value(c)[: 1 if c else 4])


@tensor()
def other_strides() -> Any:
    def change(m: Any, c: bool) -> None:
        m.t = torch.full((4, 8), 2.0, dtype=torch.float64)[:, ::2].t() if c else torch.ones(4, 4)

    return lambda self: self.t.double().sum(0), change


@tensor()
def view_of_a_changed_base() -> Any:
    base = torch.zeros(8, dtype=torch.float64)

    def change(m: Any, c: bool) -> None:
        m.t = base[:4]
        base.fill_(3.0 if c else 2.0)

    return lambda self: self.t, change


@tensor()
def same_tensor_or_another() -> Any:
    """Two attributes are one tensor, and then two."""

    def change(m: Any, c: bool) -> None:
        m.a = _value(False)
        m.b = _value(True) if c else m.a

    return lambda self: self.a if self.a is self.b else self.a * self.b, change


@tensor()
def number_of_a_list_of_tensors() -> Any:
    def change(m: Any, c: bool) -> None:
        m.row = [_value(False)] * (3 if c else 2)

    return lambda self: sum(self.row), change


@tensor()
def none_or_a_tensor() -> Any:
    return (
        lambda self: 1.0 if self.t is None else self.t,
        lambda m, c: setattr(m, "t", _value(c) if c else None),
    )


@tensor()
def in_an_argument() -> Any:
    box = SimpleNamespace(t=None)
    return (
        (lambda self, a: a.t),
        lambda m, c: setattr(box, "t", _value(c)),
        {"args": lambda m: (box,)},
    )


@tensor()
def in_a_dict_argument() -> Any:
    held: dict[str, Any] = {}
    return (
        (lambda self, a: a["t"]),
        lambda m, c: held.update(t=_value(c)),
        {"args": lambda m: (held,)},
    )


@tensor()
def more_keys_in_a_dict_argument() -> Any:
    held: dict[str, Any] = {}

    def change(_: Any, c: bool) -> None:
        held.clear()
        held.update({k: _value(c) for k in ("abc" if c else "ab")})

    return (lambda self, a: sum(a.values())), change, {"args": lambda m: (held,)}


@tensor()
def none_or_a_tensor_as_argument() -> Any:
    held: list[Any] = [None]

    def change(_: Any, c: bool) -> None:
        held[0] = _value(c) if c else None

    return (lambda self, a: 1.0 if a is None else a), change, {"args": lambda m: (held[0],)}


@tensor()
def optional_argument() -> Any:
    held: list[Any] = []

    def change(_: Any, c: bool) -> None:
        held[:] = [_value(c)] if c else []

    return (lambda self, a=None: 1.0 if a is None else a), change, {"args": lambda m: tuple(held)}


@tensor()
def argument_that_wants_a_gradient() -> Any:
    held: list[Any] = [None]

    def change(_: Any, c: bool) -> None:
        held[0] = _value(False).requires_grad_(c)

    return (
        (lambda self, a: a),
        change,
        {"args": lambda m: (held[0],), "seen": lambda m: held[0].grad},
    )


@tensor()
def argument_twice() -> Any:
    held: list[Any] = []

    def change(_: Any, c: bool) -> None:
        one = _value(False)
        held[:] = [one, _value(True)] if c else [one, one]

    return (lambda self, a, b: a * b if a is b else a), change, {"args": lambda m: tuple(held)}


@tensor()
def argument_is_a_parameter() -> Any:
    held: list[Any] = [False]
    return (
        (lambda self, a: a),
        lambda m, c: held.__setitem__(0, c),
        {"args": lambda m: (m.first.bias if held[0] else _value(False),)},
    )


@tensor()
def number_in_a_buffer() -> Any:
    """A number that is read out of a buffer, as with ``.item()``."""

    def change(m: Any, c: bool) -> None:
        m.register_buffer("n", torch.tensor(3.0 if c else 2.0, dtype=torch.float64))

    return lambda self: self.n.item(), change


@tensor()
def branch_on_a_buffer() -> Any:
    def change(m: Any, c: bool) -> None:
        m.register_buffer("n", torch.tensor(c))

    return lambda self: 3.0 if self.n else 2.0, change


@tensor()
def loop_over_an_integer_buffer() -> Any:
    def change(m: Any, c: bool) -> None:
        m.register_buffer("n", torch.tensor(3 if c else 2))

    return lambda self: sum(range(int(self.n))), change


@tensor()
def length_of_a_tensor() -> Any:
    return lambda self: len(self.t), lambda m, c: setattr(m, "t", torch.zeros(3 if c else 2))


@tensor("numpy")
def array_in_place() -> Any:
    def change(m: Any, c: bool) -> None:
        m.__dict__.setdefault("a", np.zeros(4))[:] = 3.0 if c else 2.0

    return lambda self: torch.from_numpy(self.a), change


@tensor("numpy")
def array_replaced() -> Any:
    def change(m: Any, c: bool) -> None:
        m.a = np.full(4, 3.0 if c else 2.0)

    return lambda self: torch.from_numpy(self.a), change


@tensor("numpy")
def array_as_tensor() -> Any:
    def change(m: Any, c: bool) -> None:
        m.__dict__.setdefault("a", np.zeros(4))[:] = 3.0 if c else 2.0

    return lambda self: torch.tensor(self.a), change


@tensor("numpy")
def array_argument() -> Any:
    a = np.zeros(4)

    def change(_: Any, c: bool) -> None:
        a[:] = 3.0 if c else 2.0

    return (lambda self, a: torch.from_numpy(a)), change, {"args": lambda m: (a,)}


# parameters and buffers of the model's own layers


class Chain(Reader):
    """The plain model, for changes to its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.second(h)))


def _weights(change: Any) -> None:
    def build() -> Made:
        model = Chain()
        kept = {k: v.detach().clone() for k, v in model.state_dict().items()}
        return Made(model, lambda m, c: change(m, c, kept))

    build.__name__ = change.__name__
    whole("layers")(build)


@_weights
def weight_in_place(m: Any, c: bool, kept: Any) -> None:
    with torch.no_grad():
        m.first.weight.copy_(kept["first.weight"] * (2 if c else 1))


@_weights
def weight_data(m: Any, c: bool, kept: Any) -> None:
    m.first.weight.data = kept["first.weight"].clone() * (2 if c else 1)


@_weights
def weight_replaced(m: Any, c: bool, kept: Any) -> None:
    m.first.weight = nn.Parameter(kept["first.weight"] * (2 if c else 1))


@_weights
def weight_tied(m: Any, c: bool, kept: Any) -> None:
    m.second.weight = m.first.weight if c else nn.Parameter(kept["second.weight"])


@_weights
def weight_untied(m: Any, c: bool, kept: Any) -> None:
    m.second.weight = nn.Parameter(kept["second.weight"]) if c else m.first.weight


@_weights
def bias_removed(m: Any, c: bool, kept: Any) -> None:
    m.first.bias = None if c else nn.Parameter(kept["first.bias"])


@_weights
def weight_wider(m: Any, c: bool, kept: Any) -> None:
    width = 6 if c else 4
    m.first.weight = nn.Parameter(kept["first.weight"].repeat(2, 1)[:width].clone())
    m.first.bias = nn.Parameter(kept["first.bias"].repeat(2)[:width].clone())
    m.second.weight = nn.Parameter(kept["second.weight"].repeat(1, 2)[:, :width].clone())


@_weights
def weight_transposed_in_memory(m: Any, c: bool, kept: Any) -> None:
    w = kept["first.weight"]
    m.first.weight = nn.Parameter(w.t().contiguous().t() if c else w.clone())


@_weights
def state_loaded(m: Any, c: bool, kept: Any) -> None:
    m.load_state_dict({k: v * (2 if c else 1) for k, v in kept.items()})


@_weights
def state_assigned(m: Any, c: bool, kept: Any) -> None:
    m.load_state_dict({k: v * (2 if c else 1) for k, v in kept.items()}, assign=True)


@_weights
def layers_swapped(m: Any, c: bool, kept: Any) -> None:
    m.first, m.second = m.second, m.first
