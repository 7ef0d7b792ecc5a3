"""Where a number may be found: globals, closures, classes, attributes, containers, callables."""

from __future__ import annotations

import collections
import enum
import functools
import os
import types
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

import tests.staleness.elsewhere as elsewhere
from tests.staleness.sources import USES, Made, Reader, number

FLOATS = tuple(u for u in USES if u.name in ("factor", "branch"))

# globals

NUMBER: Any = None
HOLDER = SimpleNamespace(number=None, inner=SimpleNamespace(number=None))
TABLE: dict[str, Any] = {}
ROW: list[Any] = [None]


def _set_global(_: Any, v: Any) -> None:
    global NUMBER
    NUMBER = v


def _global_function() -> Any:
    return NUMBER


@number("globals")
def plain() -> Any:
    return lambda self: NUMBER, _set_global


@number("globals")
def in_a_function() -> Any:
    return lambda self: _global_function(), _set_global


@number("globals")
def attribute_of_a_global() -> Any:
    return lambda self: HOLDER.number, lambda m, v: setattr(HOLDER, "number", v)


@number("globals")
def two_attributes_deep() -> Any:
    return lambda self: HOLDER.inner.number, lambda m, v: setattr(HOLDER.inner, "number", v)


@number("globals")
def global_dict() -> Any:
    return lambda self: TABLE["n"], lambda m, v: TABLE.update(n=v)


@number("globals")
def global_list() -> Any:
    return lambda self: ROW[0], lambda m, v: ROW.__setitem__(0, v)


@number("globals")
def of_another_module() -> Any:
    return lambda self: elsewhere.NUMBER, lambda m, v: setattr(elsewhere, "NUMBER", v)


@number("globals")
def function_of_another_module() -> Any:
    return lambda self: elsewhere.number(), lambda m, v: setattr(elsewhere, "NUMBER", v)


# closures


@number("closures")
def cell() -> Any:
    n: Any = None

    def change(_: Any, v: Any) -> None:
        nonlocal n
        n = v

    return lambda self: n, change


@number("closures")
def cell_of_a_cell() -> Any:
    n: Any = None

    def inner() -> Any:
        return n

    def change(_: Any, v: Any) -> None:
        nonlocal n
        n = v

    return lambda self: inner(), change


@number("closures")
def object_in_a_cell() -> Any:
    box = SimpleNamespace(n=None)
    return lambda self: box.n, lambda m, v: setattr(box, "n", v)


@number("closures")
def list_in_a_cell() -> Any:
    row = [0, None]
    return lambda self: row[1], lambda m, v: row.__setitem__(1, v)


@number("closures")
def dict_in_a_cell() -> Any:
    table: dict[str, Any] = {}
    return lambda self: table["n"], lambda m, v: table.update(n=v)


# classes


class _Class:
    n: Any = None


@number("classes")
def own_class() -> Any:
    return lambda self: self.n, lambda m, v: setattr(type(m), "n", v)


@number("classes")
def through_type_of_self() -> Any:
    return lambda self: type(self).n, lambda m, v: setattr(type(m), "n", v)


@number("classes")
def base_class() -> Any:
    return (
        lambda self: self.number_of_base,
        lambda m, v: setattr(Reader, "number_of_base", v),
        {
            "restore": lambda: (
                hasattr(Reader, "number_of_base") and delattr(Reader, "number_of_base")
            )
        },
    )


@number("classes")
def another_class() -> Any:
    return lambda self: _Class.n, lambda m, v: setattr(_Class, "n", v)


@number("classes")
def class_of_an_object() -> Any:
    class Box:
        n: Any = None

    box = Box()
    return lambda self: box.n, lambda m, v: setattr(Box, "n", v)


@number("classes")
def shadowed_by_the_instance() -> Any:
    def change(m: Any, v: Any) -> None:
        type(m).n = 2
        m.__dict__.pop("n", None)
        if v == 3:
            m.n = v

    return lambda self: self.n, change


@number("classes")
def class_method() -> Any:
    class Box:
        n: Any = None

        @classmethod
        def get(cls) -> Any:
            return cls.n

    return lambda self: Box.get(), lambda m, v: setattr(Box, "n", v)


# defaults


@number("defaults")
def of_a_function() -> Any:
    def get(n: Any = None) -> Any:
        return n

    return lambda self: get(), lambda m, v: setattr(get, "__defaults__", (v,))


@number("defaults")
def of_a_method() -> Any:
    def read(self: Any, n: Any = None) -> Any:
        return n

    return read, lambda m, v: setattr(read, "__defaults__", (v,))


@number("defaults")
def keyword_of_a_function() -> Any:
    def get(*, n: Any = None) -> Any:
        return n

    return lambda self: get(), lambda m, v: setattr(get, "__kwdefaults__", {"n": v})


@number("defaults")
def keyword_changed_in_place() -> Any:
    def get(*, n: Any = None) -> Any:
        return n

    return lambda self: get(), lambda m, v: get.__kwdefaults__.update(n=v)


@number("defaults")
def keyword_of_a_method() -> Any:
    def read(self: Any, *, n: Any = None) -> Any:
        return n

    return read, lambda m, v: setattr(read, "__kwdefaults__", {"n": v})


@number("defaults")
def list_as_default() -> Any:
    row = [None]

    def get(given: Any = row) -> Any:
        return given[0]

    return lambda self: get(), lambda m, v: row.__setitem__(0, v)


# attributes


class _Plain:
    def __init__(self, n: Any = None) -> None:
        self.n = n


class _Slots:
    __slots__ = ("n",)

    def __init__(self, n: Any = None) -> None:
        self.n = n


@dataclass
class _Data:
    n: Any = None


@dataclass(frozen=True)
class _Frozen:
    n: Any = None


@dataclass(slots=True)
class _SlotsData:
    n: Any = None


class _Property:
    def __init__(self, n: Any = None) -> None:
        self._n = n

    @property
    def n(self) -> Any:
        return self._n

    @n.setter
    def n(self, v: Any) -> None:
        self._n = v


class _GetAttr:
    def __init__(self, n: Any = None) -> None:
        self.table = {"n": n}

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["table"][name]

    def __setattr__(self, name: str, v: Any) -> None:
        if name == "n":
            self.table["n"] = v
        else:
            self.__dict__[name] = v


_Pair = namedtuple("_Pair", ["n", "other"])


@number("attributes")
def depth_1() -> Any:
    return lambda self: self.n, lambda m, v: setattr(m, "n", v)


@number("attributes")
def of_a_child() -> Any:
    return lambda self: self.first.n, lambda m, v: setattr(m.first, "n", v)


def _held(name: str, box: type) -> None:
    """An object of a class, held at depths 2 and 3: changed in place, and replaced."""

    def two() -> Any:
        def change(m: Any, v: Any) -> None:
            m.__dict__.setdefault("box", box()).n = v

        return lambda self: self.box.n, change

    def three() -> Any:
        def change(m: Any, v: Any) -> None:
            m.__dict__.setdefault("outer", SimpleNamespace(box=box())).box.n = v

        return lambda self: self.outer.box.n, change

    def replaced() -> Any:
        return lambda self: self.box.n, lambda m, v: setattr(m, "box", box(v))

    def deep_replaced() -> Any:
        def change(m: Any, v: Any) -> None:
            m.__dict__.setdefault("outer", _Plain()).n = box(v)

        return lambda self: self.outer.n.n, change

    for build in (two, three, replaced, deep_replaced):
        if box is _Frozen and build in (two, three):
            continue
        build.__name__ = f"{name}_{build.__name__}"
        number("attributes")(build)


_held("object", _Plain)
_held("slots", _Slots)
_held("dataclass", _Data)
_held("slots_dataclass", _SlotsData)
_held("frozen_dataclass", _Frozen)
_held("namespace", lambda n=None: SimpleNamespace(n=n))  # type: ignore[arg-type]
_held("property", _Property)
_held("getattr", _GetAttr)


@number("attributes")
def namedtuple_replaced() -> Any:
    return lambda self: self.pair.n, lambda m, v: setattr(m, "pair", _Pair(v, 0))


@number("attributes")
def enum_member_replaced() -> Any:
    class Choice(enum.Enum):
        A = 2
        B = 3

    members = {2: Choice.A, 3: Choice.B}
    return lambda self: self.choice.value, lambda m, v: setattr(m, "choice", members[v])


@number("attributes")
def enum_compared() -> Any:
    class Choice(enum.Enum):
        A = 2
        B = 3

    members = {2: Choice.A, 3: Choice.B}
    return (
        lambda self: 2 if self.choice is Choice.A else 3,
        lambda m, v: setattr(m, "choice", members[v]),
    )


@number("attributes")
def int_enum_replaced() -> Any:
    class Choice(enum.IntEnum):
        A = 2
        B = 3

    return lambda self: self.choice, lambda m, v: setattr(m, "choice", Choice(v))


@number("attributes")
def property_of_the_model() -> Any:
    return property_read, lambda m, v: setattr(m, "_n", v)


def property_read(self: Any) -> Any:
    """Reads a property that is defined on the class."""
    return self.doubled / 2 if isinstance(self._n, float) else self.doubled // 2


Reader.doubled = property(lambda self: self._n * 2)  # type: ignore[attr-defined]


@number("attributes")
def present_or_absent() -> Any:
    def change(m: Any, v: Any) -> None:
        m.__dict__.pop("n", None)
        if v == 3:
            m.n = v

    return lambda self: getattr(self, "n", 2), change


@number("attributes")
def hasattr_of_an_object() -> Any:
    def change(m: Any, v: Any) -> None:
        box = m.__dict__.setdefault("box", _Plain())
        box.__dict__.pop("extra", None)
        if v == 3:
            box.extra = True

    return lambda self: 3 if hasattr(self.box, "extra") else 2, change


@number("attributes")
def through_vars() -> Any:
    def change(m: Any, v: Any) -> None:
        m.__dict__.setdefault("box", _Plain()).n = v

    return lambda self: self.box.__dict__["n"], change


@number("attributes")
def none_or_a_number() -> Any:
    return (
        lambda self: 2 if self.n is None else self.n,
        lambda m, v: setattr(m, "n", None if v == 2 else v),
    )


@number("attributes")
def boolean() -> Any:
    return lambda self: 3 if self.flag else 2, lambda m, v: setattr(m, "flag", v == 3)


@number("attributes")
def string() -> Any:
    return (
        lambda self: 3 if self.mode == "b" else 2,
        lambda m, v: setattr(m, "mode", "b" if v == 3 else "a"),
    )


@number("attributes")
def string_length() -> Any:
    return lambda self: len(self.text), lambda m, v: setattr(m, "text", "x" * int(v))


# containers


def _container(name: str, build: Any, change: Any, read: Any, uses: Any = USES) -> None:
    """A container on the model, changed in place (``change``) after it was made (``build``)."""

    def source() -> Any:
        def set_to(m: Any, v: Any) -> None:
            if change is None or "box" not in m.__dict__:
                m.box = build(v)
            else:
                change(m.box, v)

        return (lambda self: read(self.box)), set_to

    source.__name__ = name
    number("containers", uses)(source)


def _refill(box: Any, v: Any) -> None:
    box.clear()
    (box.add if isinstance(box, set) else box.append)(v)


_container("list", lambda v: [0, v], lambda b, v: b.__setitem__(1, v), lambda b: b[1])
_container("list_from_the_end", lambda v: [0, v], lambda b, v: b.__setitem__(1, v), lambda b: b[-1])
_container("list_replaced", lambda v: [0, v], None, lambda b: b[1])
_container("list_sum", lambda v: [1, v - 1], lambda b, v: b.__setitem__(1, v - 1), lambda b: sum(b))
_container(
    "list_length",
    lambda v: [0] * int(v),
    lambda b, v: b.append(0) if v > len(b) else b.pop(),
    lambda b: len(b),
)
_container("dict", lambda v: {"n": v}, lambda b, v: b.update(n=v), lambda b: b["n"])
_container("dict_replaced", lambda v: {"n": v}, None, lambda b: b["n"])
_container("dict_get", lambda v: {}, lambda b, v: b.update(n=v), lambda b: b.get("n", 2))
_container("dict_of_integers", lambda v: {7: v}, lambda b, v: b.update({7: v}), lambda b: b[7])
_container(
    "dict_length",
    lambda v: dict.fromkeys(range(int(v))),
    lambda b, v: b.update({9: 0}) if v > len(b) else b.pop(9),
    lambda b: len(b),
)
_container(
    "dict_key_found",
    lambda v: {},
    lambda b, v: b.update(k=1) if v == 3 else b.pop("k"),
    lambda b: 3 if "k" in b else 2,
)
_container(
    "dict_order",
    lambda v: {"a": 2, "b": 3},
    lambda b, v: b.update(a=b.pop("a")) if v == 3 else b.update(b=b.pop("b")),
    lambda b: next(iter(b.values())),
)
_container("ordered_dict", lambda v: OrderedDict(n=v), lambda b, v: b.update(n=v), lambda b: b["n"])
_container(
    "default_dict",
    lambda v: defaultdict(int, n=v),
    lambda b, v: b.update(n=v),
    lambda b: b["n"],
)
_container(
    "counter", lambda v: Counter(n=v), lambda b, v: b.update({"n": v - b["n"]}), lambda b: b["n"]
)
_container(
    "chain_map",
    lambda v: ChainMap({}, {"n": v}),
    lambda b, v: b.maps[1].update(n=v),
    lambda b: b["n"],
)
_container("tuple_replaced", lambda v: (0, v), None, lambda b: b[1])
_container("set", lambda v: {v}, _refill, lambda b: max(b))
_container("set_member", lambda v: {v}, _refill, lambda b: 3 if 3 in b else 2)
_container("frozenset_replaced", lambda v: frozenset([v]), None, lambda b: max(b))
_container("deque", lambda v: deque([v]), _refill, lambda b: b[0])
_container(
    "bounded_deque", lambda v: deque([0, v], maxlen=2), lambda b, v: b.append(v), lambda b: b[-1]
)
_container("range_replaced", lambda v: range(int(v)), None, lambda b: len(b))
_container(
    "user_list",
    lambda v: collections.UserList([v]),
    lambda b, v: b.__setitem__(0, v),
    lambda b: b[0],
)
_container("mapping_proxy", lambda v: types.MappingProxyType({"n": v}), None, lambda b: b["n"])
_container(
    "list_in_dict",
    lambda v: {"a": [0, v]},
    lambda b, v: b["a"].__setitem__(1, v),
    lambda b: b["a"][1],
)
_container("dict_in_list", lambda v: [{"n": v}], lambda b, v: b[0].update(n=v), lambda b: b[0]["n"])
_container(
    "dict_in_tuple_in_dict",
    lambda v: {"a": ({"n": v},)},
    lambda b, v: b["a"][0].update(n=v),
    lambda b: b["a"][0]["n"],
)
for _name, _cls in (("objects", _Plain), ("slots", _Slots), ("dataclasses", _Data)):
    _container(
        f"list_of_{_name}",
        lambda v, c=_cls: [c(0), c(v)],
        lambda b, v: setattr(b[1], "n", v),
        lambda b: b[1].n,
    )
    _container(
        f"dict_of_{_name}",
        lambda v, c=_cls: {"a": c(v)},
        lambda b, v: setattr(b["a"], "n", v),
        lambda b: b["a"].n,
    )
    _container(
        f"tuple_of_{_name}",
        lambda v, c=_cls: (c(v),),
        lambda b, v: setattr(b[0], "n", v),
        lambda b: b[0].n,
    )
    _container(
        f"deque_of_{_name}",
        lambda v, c=_cls: deque([c(v)]),
        lambda b, v: setattr(b[0], "n", v),
        lambda b: b[0].n,
    )
_container(
    "loop_over_objects",
    lambda v: [_Plain(1), _Plain(v - 1)],
    lambda b, v: setattr(b[1], "n", v - 1),
    lambda b: sum(o.n for o in b),
)
_container(
    "object_with_a_list",
    lambda v: _Plain([v]),
    lambda b, v: b.n.__setitem__(0, v),
    lambda b: b.n[0],
)
_container(
    "namedtuple_of_lists",
    lambda v: _Pair([v], 0),
    lambda b, v: b.n.__setitem__(0, v),
    lambda b: b.n[0],
)


# callables


def _first(n: Any, *_: Any) -> Any:
    return n


@number("callables")
def partial_argument() -> Any:
    return (
        lambda self: self.get(),
        lambda m, v: setattr(m, "get", functools.partial(_first, v)),
    )


@number("callables")
def partial_keyword() -> Any:
    return (
        lambda self: self.get(),
        lambda m, v: setattr(m, "get", functools.partial(_first, n=v)),
    )


@number("callables")
def partial_keyword_in_place() -> Any:
    def change(m: Any, v: Any) -> None:
        m.__dict__.setdefault("get", functools.partial(_first, n=v)).keywords["n"] = v

    return lambda self: self.get(), change


@number("callables")
def lambda_replaced() -> Any:
    return lambda self: self.get(), lambda m, v: setattr(m, "get", lambda: v)


@number("callables")
def function_replaced() -> Any:
    two, three = (lambda n: n * 1), (lambda n: n * 1 + 1)
    return (
        lambda self: self.get(2),
        lambda m, v: setattr(m, "get", three if v == 3 else two),
    )


@number("callables")
def attribute_of_a_function() -> Any:
    def get() -> Any:
        return get.n  # type: ignore[attr-defined]

    return lambda self: get(), lambda m, v: setattr(get, "n", v)


@number("callables")
def code_of_a_function() -> Any:
    def get() -> Any:
        return 2

    def two() -> Any:
        return 2

    def three() -> Any:
        return 3

    return (
        lambda self: get(),
        lambda m, v: setattr(get, "__code__", (three if v == 3 else two).__code__),
    )


@number("callables")
def global_function_replaced() -> Any:
    original = elsewhere.number
    return (
        lambda self: elsewhere.number(),
        lambda m, v: setattr(elsewhere, "number", lambda: v),
        {"restore": lambda: setattr(elsewhere, "number", original)},
    )


@number("callables")
def callable_object() -> Any:
    class Get:
        n: Any = None

        def __call__(self) -> Any:
            return self.n

    def change(m: Any, v: Any) -> None:
        m.__dict__.setdefault("get", Get()).n = v

    return lambda self: self.get(), change


@number("callables")
def bound_method() -> Any:
    class Box:
        n: Any = None

        def get(self) -> Any:
            return self.n

    box = Box()

    def change(m: Any, v: Any) -> None:
        box.n = v
        m.get = box.get

    return lambda self: self.get(), change


@number("callables")
def bound_method_of_another() -> Any:
    def change(m: Any, v: Any) -> None:
        m.get = _Bound(v).get

    return lambda self: self.get(), change


class _Bound:
    def __init__(self, n: Any) -> None:
        self.n = n

    def get(self) -> Any:
        return self.n


@number("callables")
def method_swapped_on_the_class() -> Any:
    return lambda self: 2, lambda m, v: setattr(type(m), "read", lambda self: v)


@number("callables")
def method_swapped_on_the_class_of_an_object() -> Any:
    class Box:
        def get(self) -> Any:
            return 2

    box = Box()
    return lambda self: box.get(), lambda m, v: setattr(Box, "get", lambda self: v)


@number("callables")
def method_swapped_on_the_instance() -> Any:
    def change(m: Any, v: Any) -> None:
        m.__dict__.pop("read", None)
        if v == 3:
            m.read = lambda: v

    return lambda self: 2, change


@number("callables")
def static_method_swapped() -> Any:
    class Box:
        @staticmethod
        def get() -> Any:
            return 2

    return lambda self: Box.get(), lambda m, v: setattr(Box, "get", staticmethod(lambda: v))


@number("callables")
def list_of_functions() -> Any:
    return lambda self: self.all[0](), lambda m, v: setattr(m, "all", [lambda: v])


# NumPy


@number("numpy")
def scalar_replaced() -> Any:
    kinds = {float: np.float64, int: np.int64}
    return lambda self: self.n, lambda m, v: setattr(m, "n", kinds[type(v)](v))


@number("numpy", FLOATS)
def scalar_to_float() -> Any:
    return lambda self: float(self.n), lambda m, v: setattr(m, "n", np.float64(v))


@number("numpy")
def array_item_in_place() -> Any:
    def change(m: Any, v: Any) -> None:
        m.__dict__.setdefault("a", np.zeros(3, np.array(v).dtype))[1] = v

    return lambda self: self.a[1], change


@number("numpy", FLOATS)
def array_item_to_float() -> Any:
    def change(m: Any, v: Any) -> None:
        m.__dict__.setdefault("a", np.zeros(3))[1] = v

    return lambda self: float(self.a[1]), change


@number("numpy")
def array_length() -> Any:
    return lambda self: len(self.a), lambda m, v: setattr(m, "a", np.zeros(int(v)))


@number("numpy")
def array_shape() -> Any:
    return lambda self: self.a.shape[0], lambda m, v: setattr(m, "a", np.zeros((int(v), 2)))


@number("numpy")
def array_to_list() -> Any:
    return lambda self: self.a.tolist()[0], lambda m, v: setattr(m, "a", np.array([v]))


# the environment


def _environment(name: str, read: Any) -> None:
    def source() -> Any:
        kinds = {"2": 2, "3": 3}
        return (
            lambda self: kinds[read()],
            lambda m, v: os.environ.update(GRAPEFX_STALE=str(int(v))),
            {"restore": lambda: os.environ.pop("GRAPEFX_STALE", None)},
        )

    source.__name__ = name
    number("environment")(source)


_environment("environ_item", lambda: os.environ["GRAPEFX_STALE"])
_environment("environ_get", lambda: os.environ.get("GRAPEFX_STALE"))
_environment("getenv", lambda: os.getenv("GRAPEFX_STALE"))


# arguments


def _argument(name: str, read: Any, given: Any, uses: Any = USES) -> None:
    """``given(box)`` is the argument; ``read`` takes the number out of it again."""

    def source() -> Any:
        box = _Plain()
        return (
            (lambda self, a: read(a)),
            lambda m, v: setattr(box, "n", v),
            {"args": lambda m: (given(box),)},
        )

    source.__name__ = name
    number("arguments", uses)(source)


_argument("number", lambda a: a, lambda b: b.n)
_argument("object", lambda a: a.n, lambda b: b)
_argument("object_made_anew", lambda a: a.n, lambda b: _Plain(b.n))
_argument("slots", lambda a: a.n, lambda b: _Slots(b.n))
_argument("dataclass", lambda a: a.n, lambda b: _Data(b.n))
_argument("frozen_dataclass", lambda a: a.n, lambda b: _Frozen(b.n))
_argument("object_in_an_object", lambda a: a.n.n, lambda b: _Plain(b))
_argument("dict", lambda a: a["n"], lambda b: {"n": b.n})
_argument("list", lambda a: a[0], lambda b: [b.n])
_argument("tuple", lambda a: a[0], lambda b: (b.n,))
_argument("namedtuple", lambda a: a.n, lambda b: _Pair(b.n, 0))
_argument("list_of_objects", lambda a: a[0].n, lambda b: [b])
_argument("list_length", lambda a: len(a), lambda b: [0] * int(b.n))
_argument("string", lambda a: 3 if a == "b" else 2, lambda b: "b" if b.n == 3 else "a")
_argument("boolean", lambda a: 3 if a else 2, lambda b: b.n == 3)
_argument("none_or_a_number", lambda a: 2 if a is None else a, lambda b: None if b.n == 2 else b.n)
_argument("type", lambda a: 3 if isinstance(a, float) else 2, lambda b: 1.0 if b.n == 3 else 1)
_argument("integer_or_float", lambda a: a, lambda b: 2 if b.n == 2 else 2.75, FLOATS)
_argument(
    "class",
    lambda a: 3 if isinstance(a, _Slots) else 2,
    lambda b: (_Slots if b.n == 3 else _Plain)(),
)
_argument("lambda", lambda a: a(), lambda b: lambda: b.n)
_argument("numpy_scalar", lambda a: a, lambda b: np.array(b.n)[()])


@number("arguments")
def keyword() -> Any:
    box = _Plain()
    return (
        (lambda self, *, n: n),
        lambda m, v: setattr(box, "n", v),
        {"kwargs": lambda m: {"n": box.n}},
    )


@number("arguments")
def keyword_left_out() -> Any:
    box = _Plain()
    return (
        (lambda self, *, n=2: n),
        lambda m, v: setattr(box, "n", v),
        {"kwargs": lambda m: {"n": 3} if box.n == 3 else {}},
    )


__all__ = ["Made"]
