"""What the joint trace writes out by itself: views of another layout, recurrent cells."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grapefx.errors import VerifyError
from grapefx.passes.differentiate.joint import _viewed
from grapefx.passes.graph.verify import check
from tests.passes.tangent_oracle import make_case
from tests.zoo import assert_same_gradients, compiled, eager_twin, plan_of, train_step


class _Biased(nn.Module):
    """Attention with a learned table of positions, as T5 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)
        self.table = nn.Embedding(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (y.view(n, t, 2, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        at = torch.arange(t)
        bias = self.table(at[:, None] - at[None, :] + 4).permute(2, 0, 1).unsqueeze(0)
        mask = torch.zeros(n, 1, t, t, dtype=x.dtype)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias + mask)
        return self.out(z.transpose(1, 2).reshape(n, t, 8))


def test_views_of_any_layout() -> None:
    x = torch.randn(2, 3, 4)
    assert _viewed(x, [2, 12]).data_ptr() == x.data_ptr()
    turned = x.transpose(1, 2)
    torch.testing.assert_close(_viewed(turned, [2, 12]), turned.reshape(2, 12))


def test_attention_with_a_learned_bias() -> None:
    torch.manual_seed(0)
    model = _Biased().double()
    x = torch.randn(3, 5, 8).double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin)


class _Cells(nn.Module):
    """Three steps of a cell, written as a loop."""

    def __init__(self, kind: type[nn.Module], bias: bool) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 4), nn.Linear(6, 3)
        self.cell = kind(4, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 6)
        for step in torch.tanh(self.first(x)).unbind(1):
            state = self.cell(step, state)
        return self.out(state)


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.RNNCell])
def test_cells_have_gradients_and_tangents(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = _Cells(kind, bias=kind is not nn.RNNCell).double(), torch.randn(4, 3, 5).double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin)
    case = make_case(model, x)
    torch.testing.assert_close(case.run(case.tangents()), case.expected())


class _Counted(nn.Module):
    """Takes the batch size as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) + torch.ones(len(x), 4, dtype=x.dtype))


@pytest.mark.filterwarnings("ignore::grapefx.errors.GrapefxWarning")
def test_a_batch_size_taken_as_a_number_is_captured_as_it_came() -> None:
    torch.manual_seed(0)
    model = _Counted().double()
    twin = eager_twin(model)
    net = compiled(model, "dfa", calib_unit="step", calib_every=1)
    for size in (3, 5):
        x = torch.randn(size, 5).double()
        train_step(net, (x,))
        train_step(twin, (x,))
        assert_same_gradients(net, twin)


class _ChannelsLast(nn.Module):
    """Pools what a permutation has laid out with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)).permute(0, 3, 1, 2)
        return self.b(F.adaptive_avg_pool2d(h, 1).flatten(1))


class _PooledTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)).transpose(1, 2)  # as Swin's pooler
        return self.b(F.adaptive_avg_pool1d(h, 1).flatten(1))


def test_pooling_tokens_keeps_its_gradient() -> None:
    torch.manual_seed(0)
    model, x = _PooledTokens().double(), torch.randn(4, 5, 3).double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin)


def test_a_write_that_a_graph_cannot_follow_is_refused() -> None:
    plan = plan_of("mlp", "bp")
    step = plan.joint.copy()
    some = next(n for n in step.gm.graph.nodes if n.op == "call_function")
    with step.gm.graph.inserting_after(some):
        write = step.gm.graph.call_function(torch.ops.aten.copy_.default, (some, some))
    write.meta["val"] = some.meta["val"]
    with pytest.raises(VerifyError, match="writes into a view"):
        check(step, "joint")


def test_pooling_channels_last_keeps_its_gradient() -> None:
    torch.manual_seed(0)
    model, x = _ChannelsLast().double(), torch.randn(4, 2, 3, 5).double()
    twin = eager_twin(model)
    net = compiled(model, "bp")
    train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin)


class _Spectral(nn.Module):
    """A complex weight between Fourier transforms: their derivatives write into views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.w = nn.Parameter(torch.randn(5, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(torch.fft.irfft(torch.fft.rfft(self.a(x)) * self.w, n=8)))


def _orthogonal(how: str) -> nn.Module:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 8), orthogonal_map=how)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("kind", ["spectral", "matrix_exp", "cayley", "householder"])
def test_derivatives_that_write_into_views(kind: str) -> None:
    torch.manual_seed(0)
    model = (_Spectral() if kind == "spectral" else _orthogonal(kind)).double()
    twin = eager_twin(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    net = compiled(model, "grape", calib_every=None)
    with net.calibration():
        train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin)
    net.zero_grad()
    train_step(net, (x,))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


class _Aligned(nn.Module):
    """A spatial transformer: the derivative of ``affine_grid`` takes no symbolic size."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.out = nn.Linear(16, 6), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        at = self.place(x.flatten(1)).view(-1, 2, 3)
        grid = F.affine_grid(at, list(x.shape), align_corners=False)
        return self.out(F.grid_sample(x, grid, align_corners=False).flatten(1))


_OPERATORS = {
    "circular": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(32, 3)
    ),
    "instance norm": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2, track_running_stats=True),
        nn.Flatten(), nn.Linear(32, 3),
    ),
    "affine_grid": _Aligned,
}  # fmt: skip


@pytest.mark.parametrize("kind", list(_OPERATORS))
def test_composite_operators_train(kind: str) -> None:
    torch.manual_seed(0)
    model = _OPERATORS[kind]().double()
    twin = eager_twin(model)
    net = compiled(model, "grape", calib_every=None)
    for n in (4, 5):
        x = torch.randn(n, 1, 4, 4, dtype=torch.float64)
        with net.calibration():
            train_step(net, (x,))
        train_step(twin, (x,))
        assert_same_gradients(net, twin)
        train_step(net, (x,))
        twin.zero_grad()
        net.zero_grad()


class _Of(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(4, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        square = h.view(-1, 3, 3) + 3 * torch.eye(3, dtype=h.dtype)
        made = {
            "cumprod": lambda: h.cumprod(1),
            "solve": lambda: torch.linalg.solve(square, h.view(-1, 3, 3)).flatten(1),
            "inverse": lambda: torch.inverse(square).flatten(1),
            "cholesky": lambda: torch.linalg.cholesky(square @ square.mT).flatten(1),
            "rfft": lambda: torch.cat([torch.fft.rfft(h).abs(), h], 1)[:, :9],
        }
        return self.b(made[self.kind]())


@pytest.mark.parametrize("kind", ["cumprod", "solve", "inverse", "cholesky", "rfft"])
def test_operators_that_torch_takes_apart_with_writes_or_checks(kind: str) -> None:
    torch.manual_seed(0)
    model = _Of(kind).double()
    twin = eager_twin(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    train_step(compiled(model, "bp"), (x,))
    train_step(twin, (x,))
    assert_same_gradients(model, twin)
    train_step(compiled(model, "dfa", calib_every=None), (x,))


class _Shifted(nn.Module):
    """The gradient of an input is a cotangent as it came; the other result is the input's own."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x + self.shift, x.detach() * 2, z.t() * self.shift[:, None]


def test_a_gradient_that_is_a_cotangent() -> None:
    model = _Shifted().double()
    net = compiled(eager_twin(model), "bp")
    grads = []
    for m in (net, model):
        torch.manual_seed(0)
        x, z = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        a, _, c = m(x, z)
        (a.pow(3).sum() + c.sin().sum()).backward()
        grads.append([x.grad, z.grad])
    for mine, true in zip(*grads, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=0)
    assert_same_gradients(net, model)
