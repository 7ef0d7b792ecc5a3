"""Methods by name: entry points, presets, options that do not go together, clear refusals."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.errors import InputError, MethodError, OptionError
from grapefx.methods import BUILTIN, Method, Rows, registry
from tests.zoo import MLP, compiled, make, train_step


@dataclass(frozen=True)
class Signs(Method):
    """delta_l = the error's signs, spread evenly."""

    scale: float = 1.0

    name: ClassVar[str] = "signs"
    reads: ClassVar[frozenset[str]] = frozenset({"error"})

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.error is not None and rows.value is None
        n = rows.error.shape[1]
        return self.scale * rows.error.sign().mean(1, keepdim=True).expand(-1, 12) / n


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points of a package that is installed for this test only."""
    module = types.ModuleType("signs_package")
    module.Signs = Signs  # type: ignore[attr-defined]
    module.nothing = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "signs_package", module)
    points = [
        importlib.metadata.EntryPoint(name, value, registry.GROUP)
        for name, value in (
            ("signs", "signs_package:Signs"),
            ("nothing", "signs_package:nothing"),
            ("absent", "no_such_package:Method"),
        )
    ]
    monkeypatch.setattr(registry, "_registered", lambda: {p.name: p for p in points})


def test_a_registered_method_is_found_by_name(registered: None) -> None:
    model, args = make("mlp")
    net = compiled(model, "signs", scale=2.0, calib_every=None)
    train_step(net, args)
    assert net._method == Signs(2.0)
    assert "signs" in registry.names() and registry.names()[: len(BUILTIN)] == list(BUILTIN)


def test_a_broken_entry_point_says_which(registered: None) -> None:
    with pytest.raises(MethodError, match=r"absent.*no_such_package:Method.*cannot be loaded"):
        grapefx.compile(MLP(), method="absent")
    with pytest.raises(MethodError, match=r"nothing.*not a subclass"):
        grapefx.compile(MLP(), method="nothing")


def test_an_instance_is_taken_as_it_is() -> None:
    model, args = make("mlp")
    train_step(compiled(model, Signs(3.0), calib_every=None), args)
    with pytest.raises(OptionError, match="go into the 'signs' instance"):
        grapefx.compile(MLP(), method=Signs(), scale=1.0)


def test_a_declaration_without_sense_is_refused() -> None:
    class Wrong(Signs):
        reads = frozenset({"errors"})

    with pytest.raises(MethodError, match=r"reads 'errors'.*Did you mean 'error'"):
        grapefx.compile(MLP(), method=Wrong())

    class Nameless(Signs):
        name = ""

    with pytest.raises(MethodError, match="declares no name"):
        grapefx.compile(MLP(), method=Nameless())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "graep"}, "Did you mean 'grape'"),
        ({"method": "dfa", "alpha": 0.1}, "unknown option 'alpha'"),
        ({"method": "grape", "order": "cosine"}, "order='cosine'.*cosine-then-mean"),
        ({"method": "grape", "streams": 0}, "streams=0"),
        ({"method": "grape", "directions": 0}, "directions=0"),
        ({"method": "grape", "preset": "papper"}, "Did you mean 'paper'"),
        ({"method": "fg-a", "tangent_fraction": 0.5}, "needs the tangent of every sample"),
        ({"method": "dkp", "lr": 0.0}, "lr=0.0 must be a positive"),
        ({"method": "grape-2024", "rule": "3"}, "rule='3'"),
        ({"method": "pepita", "scale": -1}, "scale=-1"),
    ],
)
def test_bad_options(options: dict[str, object], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        grapefx.compile(MLP(), **options)  # type: ignore[arg-type]


def test_presets() -> None:
    paper = grapefx.compile(MLP(), method="grape", preset="paper")
    assert paper._method.norm == "unit"  # type: ignore[attr-defined]
    assert (paper._options.calib_refit, paper._options.calib_init) == ("weights", False)
    assert paper._options.calib_every == 1  # GrAPE 2026 calibrates once an epoch
    assert grapefx.compile(MLP(), method="dfa", preset="paper")._options.calib_every is None
    # what is given wins
    mine = grapefx.compile(MLP(), method="fdfa", preset="paper", calib_every=2, optimizer="ema")
    assert mine._options.calib_every == 2
    assert mine._method.optimizer == "ema"  # type: ignore[attr-defined]
    default = grapefx.compile(MLP(), method="grape")
    assert default._method == BUILTIN["grape"]() and default._options.calib_every == "geometric"
    plain = grapefx.compile(MLP(), method="grape", calib_every=1)._options
    assert (plain.calib_every, plain.radial, plain.calib_forget) == (1, False, None)


class Normed(nn.Module):
    """A normalisation layer of another library, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), RMSNormOfMine(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.norm(self.first(x)).relu())
        return out


class RMSNormOfMine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt()


def test_what_is_recommended_depends_on_the_network() -> None:
    """No norms, and maps that calibrations fit: geometric, remembering, radial; else defaults."""
    for fact in ({}, {"steps_per_epoch": 10}):  # of the loop, which decides nothing
        chosen = grapefx.compile(MLP(), method="dfa", **fact)._options
        assert (chosen.calib_every, chosen.calib_gap, chosen.calib_forget, chosen.radial) == (
            "geometric", 250, 0.7, "auto",
        )  # fmt: skip
    for net in (
        grapefx.compile(Normed(), method="dfa"),
        grapefx.compile(MLP(), method="drtp"),
        grapefx.compile(MLP(), method="dfa", ridge=0.1),
        grapefx.compile(MLP(), method="dfa", preset="paper"),
    ):
        assert net._options.calib_every in (1, None) and net._options.calib_forget is None
    net = grapefx.compile(MLP(), method="dfa", backend="eager")
    net(torch.randn(5, 8)).sum().backward()
    said = str(net.explain())
    assert "Chosen" in said and "without normalisation" in said and "exact_late=True" in said
    deep = nn.Sequential(*(nn.Linear(8, 8) for _ in range(18)))
    net = grapefx.compile(deep, method="dfa", backend="eager")
    net(torch.randn(5, 8)).sum().backward()
    said = str(net.explain())
    assert "without normalisation" in said and "exact_late=True" not in said
    plain = grapefx.compile(MLP(), method="dfa", backend="eager", calib_every=None)
    plain(torch.randn(5, 8)).sum().backward()
    assert "Chosen" not in str(plain.explain())


@pytest.mark.parametrize("kind", ["attention", "batch norms", "few batch norms"])
def test_what_measured_better_with_a_chain_is_said_not_chosen(kind: str) -> None:
    norms = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(9)]
    models: dict[str, nn.Module] = {
        "attention": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        "batch norms": nn.Sequential(*norms, nn.Linear(8, 2)),
        "few batch norms": nn.Sequential(*norms[:2], nn.Linear(8, 2)),
    }
    x = torch.randn(6, 3, 8) if kind == "attention" else torch.randn(6, 8)
    net = grapefx.compile(models[kind], method="dfa", backend="eager")
    net(x).sum().backward()
    assert net._options.exact_rows == 0 and net._options.mean_field is None
    said = str(net.explain())
    words = {"attention": "granularity='block'", "batch norms": "exact_weight=3.0"}
    assert words[kind] in said if kind in words else "Chosen" not in said
    exact = grapefx.compile(models[kind], method="bp", backend="eager", calib_every=1)
    exact(x).sum().backward()
    assert "Chosen" not in str(exact.explain())


# class targets


def logits(method: str, **options: object) -> tuple[grapefx.Method, nn.Module]:
    torch.manual_seed(0)
    net = compiled(MLP().double(), method, calib_every=None, **options)
    return net._method, net


@pytest.mark.parametrize("method", ["drtp", "pepita", "lg-fg-a"])
def test_missing_targets_say_how_to_pass_them(method: str) -> None:
    _, net = logits(method)
    x, y = torch.randn(6, 8).double(), torch.randint(5, (6,))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(MethodError, match=r"net\.targets\(y\) before loss\.backward"):
        F.cross_entropy(net(x), y).backward()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    out = net(x)
    net.targets(y)  # type: ignore[operator]
    F.cross_entropy(out, y).backward()
    with pytest.raises(MethodError, match="none were given"):  # they hold for one backward
        F.cross_entropy(net(x), y).backward()


def test_targets_may_be_rows_and_must_fit() -> None:
    found = []
    y = torch.randint(5, (6,))
    x = torch.randn(6, 8).double()
    for given in (y, F.one_hot(y, 5), F.one_hot(y, 5).float()):
        _, net = logits("drtp")
        out = net(x)
        net.targets(given)  # type: ignore[operator]
        F.cross_entropy(out, y).backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for g in found[1:] for a, b in zip(found[0], g, strict=True))  # type: ignore[arg-type]
    for wrong, match in ((y + 5, "has 5 classes"), (torch.ones(6, 4), "do not fit the output")):
        out = net(x)
        net.targets(wrong)  # type: ignore[operator]
        with pytest.raises(InputError, match=match):
            F.cross_entropy(out, y).backward()


def test_padding_has_no_target() -> None:
    """A negative class is a row of zeros: drtp's cotangent there is zero."""
    _, net = logits("drtp")
    x, y = torch.randn(6, 8).double(), torch.randint(5, (6,))
    out = net(x)
    net.targets(torch.full_like(y, -100))  # type: ignore[operator]
    F.cross_entropy(out, y).backward()
    assert not net.layers[0].weight.grad.any()  # type: ignore[union-attr,index]


# where a method is not defined


def test_pepita_names_the_node_that_is_no_stack() -> None:
    for name, match in (
        ("branches", "branches of different depth meet"),
        ("residual", "'blocks.0.bn1.weight' belongs to no Linear or Conv"),
        ("tied", "one floating-point input"),
    ):
        model, args = make(name)
        with pytest.raises(MethodError, match=match):
            compiled(model, "pepita")(*args)


def test_targets_belong_to_one_output() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.relu(self.a(x))
            return self.b(h), self.c(h)

    net = compiled(Two(), "drtp", calib_every=None)
    with pytest.raises(MethodError, match="this model has 2 outputs"):
        net(torch.randn(4, 8))


def test_a_reparametrised_weight_has_no_stand_in() -> None:
    model = nn.Sequential(
        nn.Linear(8, 6), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    )
    with pytest.raises(MethodError, match="computed from several parameters"):
        compiled(model, "fa", calib_every=None)(torch.randn(4, 8))


def test_parameter_noise_has_no_input_gradient() -> None:
    net = compiled(MLP(), "fg-w", calib_every=None)
    with pytest.raises(MethodError, match="gradients for parameters alone"):
        net(torch.randn(4, 8, requires_grad=True))
