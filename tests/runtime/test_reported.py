"""Situations from users' reports: each works as in eager mode, or says what to do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.errors import CaptureError, GrapefxError, InputError, OptionError

METHODS = ("bp", "dfa")


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.b(torch.tanh(self.a(x)))


def loss_of(out: Any) -> Tensor:
    found = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
    return sum(t.square().mean() for t in found)  # type: ignore[return-value]


def as_eager(model: nn.Module, *args: Any, method: str = "bp") -> None:
    """Values equal; gradients too with ``bp``, else those of the layer called ``b``."""
    twin = copy.deepcopy(model)
    loss_of(twin(*args)).backward()
    net = grapefx.compile(model, method=method, calib_every=None, backend="eager")
    loss_of(net(*args)).backward()
    true = dict(twin.named_parameters())
    for name, p in nn.Module.named_parameters(model):
        if method == "bp" or name.startswith("b."):
            torch.testing.assert_close(p.grad, true[name].grad, msg=name)
        else:
            assert p.grad is not None and p.grad.any()
    with torch.no_grad():
        torch.testing.assert_close(net(*args), twin(*args))


def test_an_instance_attribute_called_modules() -> None:
    model = Base()
    model.modules = [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in METHODS:
            as_eager(copy.deepcopy(model), torch.randn(6, 4), method=method)


# what grapefx asks of a model, or torch on its behalf
ASKED = (
    "modules", "parameters", "named_parameters", "buffers", "named_buffers",
    "children", "named_children", "train", "eval", "state_dict", "apply", "type", "extra_repr",
)  # fmt: skip


@pytest.mark.parametrize("where", ["model", "child"])
@pytest.mark.parametrize("name", ASKED)
def test_an_instance_attribute_that_hides_a_method(name: str, where: str) -> None:
    torch.manual_seed(0)
    model, x = Base(), torch.randn(6, 4)
    true = torch.autograd.grad(loss_of(model(x)), list(model.parameters()))
    weights = list(model.parameters())
    vars(model if where == "model" else model.a)[name] = 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = grapefx.compile(model, method="bp", backend="eager")
        loss_of(net(x)).backward()
        torch.testing.assert_close([p.grad for p in weights], list(true))
        with torch.no_grad():
            net(x)


@pytest.mark.parametrize("where", ["model", "child"])
def test_a_hidden_named_modules_is_refused(where: str) -> None:
    """Dynamo calls it itself, in every version."""
    model = Base()
    vars(model if where == "model" else model.a)["named_modules"] = 3
    net = grapefx.compile(model, method="bp", backend="eager")
    with pytest.raises(CaptureError, match="not callable"):
        net(torch.randn(6, 4))


@pytest.mark.parametrize("graph", ["freed", "before any call"])
def test_swapping_parameters_on_conversion(graph: str) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model, x = Base(), torch.randn(6, 4)
        net = grapefx.compile(model, method="dfa", calib_every=None, backend="eager")
        if graph == "freed":
            loss_of(net(x)).backward()
        weight = model.a.weight
        net.double()
        assert model.a.weight is weight and weight.dtype is torch.float64
        model.zero_grad()
        loss_of(net(x.double())).backward()
        assert weight.grad is not None and weight.grad.dtype is torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


class NoInput(Base):
    def forward(self) -> Any:  # type: ignore[override]
        return super().forward(torch.ones(6, 4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grad", [True, False])
def test_calls_without_a_tensor(method: str, grad: bool) -> None:
    net = grapefx.compile(NoInput(), method=method, backend="eager")
    with torch.set_grad_enabled(grad), pytest.raises(InputError, match=r"(?s)no batch.*remedy"):
        net()
    net = grapefx.compile(Base(), method=method, backend="eager")
    with torch.set_grad_enabled(grad), pytest.raises(InputError, match=r"missing.*'x'"):
        net()
    assert net(torch.randn(6, 4)).shape == (6, 3)


class Distribution(Base):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(super().forward(x))


D = torch.distributions
DISTRIBUTIONS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda y: D.Normal(y, F.softplus(y) + 0.1).log_prob(torch.zeros(3)),
    "categorical": lambda y: (D.Categorical(logits=y).logits, D.Categorical(logits=y).entropy()),
    "kl": lambda y: (y, D.kl_divergence(D.Normal(y, y.exp()), D.Normal(y * 0, y * 0 + 1))),
    "bernoulli": lambda y: D.Bernoulli(logits=y).log_prob((y > 0).float()),
    "independent": lambda y: D.Independent(D.Normal(y, 1.0), 1).log_prob(y.detach() + 1),
    "dirichlet": lambda y: D.Dirichlet(y.exp()).mean,
    "beta": lambda y: D.Beta(y.exp(), y.exp() + 1).log_prob(y.sigmoid()),
}
CHECKED: dict[str, Callable[[Tensor], Any]] = {
    "checked": lambda y: D.Normal(y, 1.0, validate_args=True).log_prob(y * 0),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*DISTRIBUTIONS, "checked"])
def test_distributions(name: str, method: str) -> None:
    torch.manual_seed(0)
    as_eager(Distribution({**DISTRIBUTIONS, **CHECKED}[name]), torch.randn(6, 4), method=method)


class Quantized(Base):
    def __init__(self, kind: str) -> None:
        super().__init__()
        from torch.ao import quantization as q

        made = q.default_fake_quant if kind == "plain" else q.default_fused_act_fake_quant
        self.q = made()

    def forward(self, x: Tensor) -> Any:
        return self.b(self.q(torch.tanh(self.a(x))))


class CTC(Base):
    def forward(self, x: Tensor, t: Tensor, il: Any, tl: Any) -> Any:  # type: ignore[override]
        y = super().forward(x).log_softmax(-1)
        return F.ctc_loss(y.transpose(0, 1), t, il, tl)


class Drawn(Base):
    def forward(self, x: Tensor, g: Any) -> Any:  # type: ignore[override]
        h = torch.tanh(self.a(x))
        return self.b(h + torch.randn(h.shape, generator=g))


class Packed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.GRU(4, 5, batch_first=True)  # type: ignore[assignment]

    def forward(self, x: Any) -> Any:
        return self.b(self.a(x)[1][-1])


def quantized(kind: str) -> tuple[nn.Module, Any]:
    return Quantized(kind), lambda: (torch.randn(6, 4),)


def ctc() -> tuple[nn.Module, Any]:
    t, il, tl = torch.randint(1, 3, (3, 4)), torch.tensor([8, 8, 8]), torch.tensor([4, 3, 2])
    return CTC(), lambda: (torch.randn(3, 8, 4), t, il, tl)


def drawn() -> tuple[nn.Module, Any]:
    return Drawn(), lambda: (torch.randn(6, 4), torch.Generator().manual_seed(1))


def packed() -> tuple[nn.Module, Any]:
    pack = nn.utils.rnn.pack_padded_sequence
    return Packed(), lambda: (pack(torch.randn(3, 8, 4), [8, 6, 3], batch_first=True),)


REPORTED = {
    "fake quantize": (lambda: quantized("plain"), "FusedMovingAvgObsFakeQuantize"),
    "ctc": (ctc, "outside the model"),
    "generator": (drawn, "torch.Generator"),
    "packed": (packed, "PackedSequence"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", REPORTED)
def test_works_or_says_what_to_do(name: str, method: str) -> None:
    make, remedy = REPORTED[name]
    model, args_of = make()
    net = grapefx.compile(model, method=method, calib_every=None, backend="eager")
    try:
        loss_of(net(*args_of()))
    except GrapefxError as e:
        assert "remedy: " in str(e) and remedy in str(e).partition("remedy: ")[2]
        return
    model, args_of = make()
    twin = copy.deepcopy(model)
    net = grapefx.compile(model, method=method, calib_every=None, backend="eager")
    torch.manual_seed(0)
    args = args_of()
    found = net(*args)
    torch.manual_seed(0)
    torch.testing.assert_close(found, twin(*args_of()))


@pytest.mark.parametrize("method", METHODS)
def test_fused_fake_quantize(method: str) -> None:
    torch.manual_seed(0)
    model = Quantized("fused")
    twin, x = copy.deepcopy(model), torch.randn(6, 4)
    loss_of(twin(x)).backward()
    own = {"method": method, "calib_every": None, "backend": "eager"}
    with pytest.raises(CaptureError, match=r"(?s)FakeQuantize.*capture='export'"):
        grapefx.compile(model, **own)(x)
    net = grapefx.compile(model, capture="export", **own)
    loss_of(net(x)).backward()
    torch.testing.assert_close(model.b.weight.grad, twin.b.weight.grad)
    if method == "bp":
        torch.testing.assert_close(model.a.weight.grad, twin.a.weight.grad)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(twin.named_buffers())[name], msg=name)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cond_with_weights_inside_its_branches(sign: float) -> None:
    class Branches(Base):
        def forward(self, x: Tensor) -> Any:
            h = sign * torch.tanh(self.a(x)).abs()
            return torch.cond(h.sum() > 0, lambda h: self.b(h), lambda h: self.b(h) * 2, (h,))

    as_eager(Branches(), torch.randn(6, 4))


@pytest.fixture
def mesh(tmp_path: Any) -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_available() or dist.is_initialized():
        pytest.skip("no process group can be made here")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_spread_parameters_are_refused_at_compile(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    with pytest.raises(OptionError, match=r"DTensor.*fully_shard\(grapefx.compile"):
        grapefx.compile(fully_shard(Base(), mesh=mesh), method="dfa")
    model = Base()
    model.b.weight = nn.Parameter(distribute_tensor(model.b.weight.data, mesh, [Replicate()]))
    with pytest.raises(OptionError, match=r"'b' of the model.*DTensor"):
        grapefx.compile(model, method="dfa")
    net = grapefx.compile(Base(), method="dfa", calib_every=None, backend="eager")
    x = torch.randn(6, 4)
    for _ in range(2):
        with pytest.raises(InputError, match=r"DTensor.*\n.*to_local"):
            net(distribute_tensor(x, mesh, [Replicate()]))
        loss_of(net(x)).backward()
    sharded = fully_shard(grapefx.compile(Base(), method="dfa", backend="eager"), mesh=mesh)
    loss_of(sharded(x)).backward()
