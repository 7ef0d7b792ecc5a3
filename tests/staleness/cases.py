"""The product of sources, uses and modes; what each came to; and what is known to come to no good.

A case runs an eager model and a compiled one of the same weights side by side: a call, a change, a
call, the change undone, a call. It is *right* if everything that can be seen is the same after each
call, *refused* if the net raised an error of grapefx, *wrong* if it answered something else, and
*crashed* if it raised anything else.

``run(case, TORCH)`` takes the same case through ``torch.compile``: what is wrong there as well is
torch's, what is wrong here alone is a fault of ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

import grapefx
from grapefx.errors import GrapefxError
from tests.staleness import held_tensors, plain_numbers, structure  # noqa: F401  they register
from tests.staleness.sources import SOURCES, Made, Source, Use

MODES = ("training", "no_grad", "inplace")
ONE_IN = 7
VERSION = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])


@dataclass(frozen=True)
class Case:
    """A source, how what it gives is used, and how the model is called.

    ``rank`` 0 is a case for one source in ``ONE_IN``, 1 one for each source per mode, 2 the rest.
    """

    source: Source
    use: Use
    mode: str
    rank: int

    @property
    def name(self) -> str:
        return f"{self.source.kind}/{self.source.name}/{self.use.name}/{self.mode}"


def _cases() -> Iterator[Case]:
    """Every combination; those of a low rank go through the modes and the uses in turn."""
    for i, source in enumerate(SOURCES):
        for j, mode in enumerate(MODES):
            for k, use in enumerate(source.uses):
                in_turn = k == (i + j) % len(source.uses)
                first = in_turn and i % ONE_IN == 0 and j == i % len(MODES)
                yield Case(source, use, mode, 0 if first else 1 if in_turn else 2)


CASES = tuple(_cases())


@dataclass(frozen=True)
class Known:
    """A pattern of case names, why they are as they are, and the torch versions that have it."""

    pattern: str
    reason: str
    since: tuple[int, int] = (0, 0)
    before: tuple[int, int] = (99, 0)

    def fits(self, case: Case) -> bool:
        here = self.since <= VERSION < self.before
        return here and fnmatch.fnmatchcase(case.name, self.pattern)


# Silently wrong: what torch's guards do not see. Each is a line of README's Limits.
UNGUARDED: tuple[Known, ...] = (
    Known("environment/getenv/*", "torch guards no os.getenv"),
    Known("modules/forward-swapped-on-the-class-of-a-child/*", "torch guards no class's methods"),
    Known("random/python-shuffle/*", "drawn once, while torch traces", since=(2, 12)),
    Known("random/generator-of-python/*", "drawn once, while torch traces"),
    Known("random/numpy-array/*", "torch draws NumPy's arrays by its own generator"),
    *(
        Known(f"classes/{name}/*", "torch 2.11 guards no attribute of a class", before=(2, 12))
        for name in ("through-type-of-self", "another-class")
    ),
)

# An error of grapefx instead of a step.
REFUSED: tuple[Known, ...] = (
    Known("hooks/backward-*", "a backward hook of a module inside would never run"),
    Known(
        "numpy/scalar-replaced/branch/*", "a branch on a NumPy number, which is a tensor to Dynamo"
    ),
    Known("random/python-branch/*", "a branch on a random number"),
    *(
        Known(f"random/numpy-{name}/*", "Dynamo makes no number of NumPy's draws")
        for name in ("normal", "rand", "randint")
    ),
    Known("random/generator-of-numpy/*", "Dynamo follows no numpy.random.Generator"),
    Known("random/generator-of-torch/*", "Dynamo gives no torch.Generator to an operator"),
    Known("random/python-randint/*", "an integer that is drawn is a size to Dynamo"),
    Known("random/python-choice/*", "Dynamo follows no random.choice"),
    Known("effects/object-with-a-tensor/*", "Dynamo writes no attribute of a SimpleNamespace"),
    *(
        Known(f"random/python-{name}/*", "torch 2.11 follows few of random's", before=(2, 12))
        for name in ("random", "shuffle")
    ),
    Known("effects/counter-class/*", "torch 2.11 sets no attribute of a class", before=(2, 12)),
)

# Sources whose change makes no difference: the call itself has an effect, or none is allowed.
INERT: tuple[str, ...] = (
    "effects/*",
    "random/*",
    "hooks/what-it-keeps",
    "settings/default-device-context",
    "layers/weight-transposed-in-memory",
)


def known(table: tuple[Known, ...], case: Case) -> Known | None:
    """The first entry of a table that a case fits."""
    return next((k for k in table if k.fits(case)), None)


@dataclass(frozen=True)
class Outcome:
    """What a case came to: "right", "refused", "wrong" or "crashed"; and the particulars."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class Front:
    """Who captures: ``compile(model, inplace)`` and the errors by which it refuses a model."""

    name: str
    compile: Callable[[nn.Module, bool], Any]
    refusals: tuple[type[Exception], ...]


def _by_grapefx(model: nn.Module, inplace: bool) -> Any:
    return grapefx.compile(model, method="bp", backend="eager", calib_every=None, inplace=inplace)


def _by_torch(model: nn.Module, inplace: bool) -> Any:
    torch.compiler.reset()
    if not inplace:
        return torch.compile(model, backend="eager", fullgraph=True)
    model.compile(backend="eager", fullgraph=True)
    return model


OURS = Front("grapefx", _by_grapefx, (GrapefxError,))
TORCH = Front("torch.compile", _by_torch, (TorchDynamoException,))


def makes_a_difference(source: Source, use: Use) -> bool:
    """Whether the change is to be seen in the eager model: else its cases show nothing."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    made = source.make(use)
    try:
        found = []
        for value in use.values:
            made.change(made.model, value)
            found.append(_call(made, made.model, "training", 0))
        return _difference(found[0], found[1]) != ""
    finally:
        made.restore()
        torch.set_default_dtype(old)


def run(case: Case, front: Front = OURS) -> Outcome:
    """Run a case."""
    old = torch.get_default_dtype()
    made: list[Made] = []
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                torch.manual_seed(0)
                made.append(case.source.make(case.use))
            return _run(case, front, made[0], made[1])
    finally:
        for m in made:
            m.restore()
        torch.set_default_dtype(old)


def _run(case: Case, front: Front, twin: Made, ours: Made) -> Outcome:
    first, second = case.use.values
    for m in (twin, ours):
        m.change(m.model, first)
    net = ours.model
    for turn, value in enumerate((first, second, first)):
        if turn:
            for m in (twin, ours):
                m.change(m.model, value)
        expected = _call(twin, twin.model, case.mode, turn)
        try:
            if turn == 0:
                net = front.compile(ours.model, case.mode == "inplace")
            found = _call(ours, net, case.mode, turn)
        except front.refusals as e:
            return Outcome("refused", f"call {turn + 1}: {e}")
        except Exception as e:
            return Outcome("crashed", f"call {turn + 1}: {type(e).__name__}: {e}")
        if difference := _difference(expected, found):
            return Outcome("wrong", f"call {turn + 1}: {difference}")
    return Outcome("right")


def _call(made: Made, net: nn.Module, mode: str, turn: int) -> dict[str, Any]:
    """Everything that one call leaves to be seen."""
    model = made.model
    dtype = next(nn.Module.parameters(model)).dtype
    x = torch.linspace(-1, 2, 20).reshape(5, 4).sin().to(dtype)
    x.requires_grad_(mode != "no_grad")
    nn.Module.zero_grad(model)
    random.seed(turn)
    np.random.seed(turn)
    torch.manual_seed(turn)
    args, kwargs = made.args(model), made.kwargs(model)
    grads = torch.no_grad() if mode == "no_grad" else contextlib.nullcontext()
    with grads, made.around():
        out = net(x, *args, **kwargs)
    loss = sum((t.double() * _weights(t)).sum() for t in _tensors(out) if t.requires_grad)
    trains = isinstance(loss, Tensor)
    if trains:
        loss.backward()
    # the order in which both draw random numbers is the same, so they end in the same state
    state = (random.random(), np.random.rand(), torch.rand(()))
    return {
        "output": _plain(out),
        "trains": trains,
        "gradients": {k: _plain(p.grad) for k, p in nn.Module.named_parameters(model)},
        "input gradient": _plain(x.grad),
        "buffers": {k: _plain(b) for k, b in nn.Module.named_buffers(model)},
        "seen": _plain(made.seen(model)),
        "random state": state,
    }


def _weights(t: Tensor) -> Tensor:
    return torch.arange(1.0, t.numel() + 1, dtype=torch.float64).reshape(t.shape).cos()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in an output, whatever holds them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)
    elif fields := _fields(value):
        yield from _tensors(fields)


def _fields(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    names = getattr(type(value), "__slots__", ())
    if names and not isinstance(value, (str, bytes)):
        return {n: getattr(value, n) for n in names}
    return dict(getattr(value, "__dict__", {}))


def _plain(value: Any) -> Any:
    """A value with its tensors detached and copied; objects become their class and fields."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, [_plain(v) for v in value])
    fields = _fields(value)
    return (type(value).__name__, {k: _plain(v) for k, v in fields.items()}) if fields else value


def _difference(a: Any, b: Any, at: str = "") -> str:
    """Where two values differ, in words; "" where they do not."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{at}: {a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}"
        tol = 1e-9 if a.dtype == torch.float64 else 1e-5 if a.dtype == torch.float32 else 1e-2
        if torch.allclose(a, b, rtol=tol, atol=tol, equal_nan=True):
            return ""
        return f"{at}: {a.flatten()[:3].tolist()} against {b.flatten()[:3].tolist()}"
    if type(a) is not type(b):
        return f"{at}: {type(a).__name__} {a!r:.80} against {type(b).__name__} {b!r:.80}"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{at}: keys {list(a)} against {list(b)}"
        return next((d for k in a if (d := _difference(a[k], b[k], f"{at} {k}"))), "")
    if isinstance(a, (tuple, list)):
        if len(a) != len(b):
            return f"{at}: {len(a)} items against {len(b)}"
        found = (_difference(p, q, f"{at}[{i}]") for i, (p, q) in enumerate(zip(a, b, strict=True)))
        return next((d for d in found if d), "")
    return "" if a == b else f"{at}: {a!r:.80} against {b!r:.80}"


__all__ = [
    "CASES",
    "INERT",
    "MODES",
    "OURS",
    "REFUSED",
    "TORCH",
    "UNGUARDED",
    "VERSION",
    "Case",
    "Front",
    "Known",
    "Outcome",
    "known",
    "makes_a_difference",
    "run",
]  # fmt: skip
