"""Tangents of whole models against forward AD of the eager model with the same noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grapefx.errors import TangentError
from tests.passes.tangent_oracle import Case, first_rows, make_case

aten = torch.ops.aten


class _Conv(nn.Module):
    """Convolutions with batch norm, pooling of both kinds and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c2, self.b2 = nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.l1, self.l2 = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.silu(self.b1(self.c1(x))), 2)
        x = F.avg_pool2d(F.gelu(self.b2(self.c2(x))), 2, ceil_mode=True)
        return self.l2(torch.tanh(self.l1(self.drop(x.flatten(1)))))


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.a, self.na = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.nb = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        h = self.nb(self.b(F.relu(self.na(self.a(x)))))
        return self.out(F.relu(x + h).mean((2, 3)))


class _Branches(nn.Module):
    """Branches that are concatenated, stacked and split again; the input goes round them all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
        self.m, self.o = nn.Linear(14, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([torch.sigmoid(self.a(x)), x, F.softplus(self.b(x))], 1)
        p, q = self.m(h).chunk(2, 1)
        both = torch.stack([p * torch.sigmoid(q), q / (1 + p.abs())], 1)
        return self.o(both.amax(1) + both[:, 1])


class _Encoder(nn.Module):
    def __init__(self, first: bool = True, norm_first: bool = False, causal: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, batch_first=first, norm_first=norm_first, activation="gelu"
        )
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype)
        return self.head(self.enc(x, mask=mask if self.causal else None, **_padding(mask, self)))


def _padding(mask: Tensor | None, model: _Encoder) -> dict[str, Any]:
    return {} if mask is None or model.causal else {"src_key_padding_mask": mask}


class _Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.rnn = kind(4, 5, 2, batch_first=True, dropout=0.2)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(torch.tanh(self.first(x)))
        return self.out(h[:, -1])


class _Gate(nn.Module):
    """Group norm and a squeeze-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6)
        self.down, self.up = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.d, self.o = nn.Conv2d(6, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardswish(self.n(self.c(x)))
        s = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(h, 1)))))
        return self.o(self.d(h * s).flatten(2).logsumexp(-1))


class _Grouped(nn.Module):
    """Attention with fewer key heads than query heads, rotary positions and RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.Parameter(torch.ones(8))
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.o, self.h = nn.Linear(16, 8), nn.Linear(8, 3)

    def _turn(self, x: Tensor) -> Tensor:
        pos = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / 3
        a, b = x.chunk(2, -1)
        return x * pos.cos() + torch.cat([-b, a], -1) * pos.sin()

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        y = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.n
        q = self._turn(self.q(y).view(n, t, 4, 4).transpose(1, 2))
        k = self._turn(self.k(y).view(n, t, 2, 4).transpose(1, 2))
        v = self.v(y).view(n, t, 2, 4).transpose(1, 2)
        k, v = (z.repeat_interleave(2, 1) for z in (k, v))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.h(x + self.o(z.transpose(1, 2).reshape(n, t, 16)))


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.c = nn.Conv2d(7, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 2, 2, stride=2)
        self.o = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.a(x))
        b = F.elu(self.b(F.max_pool2d(a, 2)))
        up = F.interpolate(b, scale_factor=2, mode="bilinear")
        c = self.c(torch.cat([a, F.pad(up[..., 1:], (1, 0, 0, 0), mode="reflect")], 1))
        return self.o(self.up(F.layer_norm(c, c.shape[1:])))


class _Folded(nn.Module):
    """Works on all positions of all samples as on so many samples, in either order of the two."""

    def __init__(self, back: tuple[int, int]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 3)
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(F.silu(self.a(x.flatten(0, 1)))))
        return torch.sigmoid(self.c(h)).view(*self.back, 3)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 5), nn.Mish(),
        nn.Linear(5, 3),
    )  # fmt: skip


def _masked() -> Tensor:
    return torch.tensor([[False] * (5 - k % 3) + [True] * (k % 3) for k in range(6)])


MODELS: dict[str, Callable[[], Any]] = {
    "mlp": lambda: make_case(_mlp(), torch.randn(6, 6)),
    "conv": lambda: make_case(_Conv(), torch.randn(6, 2, 8, 8)),
    "conv-eval": lambda: make_case(_Conv(), torch.randn(6, 2, 8, 8), train=False),
    "residual": lambda: make_case(_Residual(), torch.randn(6, 2, 5, 5)),
    "residual-eval": lambda: make_case(_Residual(), torch.randn(6, 2, 5, 5), train=False),
    "branches": lambda: make_case(_Branches(), torch.randn(6, 6)),
    "encoder": lambda: make_case(_Encoder(), torch.randn(6, 5, 8)),
    "encoder-padding": lambda: make_case(_Encoder(), torch.randn(6, 5, 8), _masked()),
    "encoder-causal": lambda: make_case(
        _Encoder(norm_first=True, causal=True), torch.randn(6, 5, 8)
    ),
    "encoder-sequence-first": lambda: make_case(
        _Encoder(first=False), torch.randn(5, 6, 8), batch_dim=1
    ),
    "lstm": lambda: make_case(_Recurrent(nn.LSTM), torch.randn(6, 4, 4)),
    "gru": lambda: make_case(_Recurrent(nn.GRU), torch.randn(6, 4, 4)),
    "gate": lambda: make_case(_Gate(), torch.randn(6, 2, 7, 7)),
    "grouped": lambda: make_case(_Grouped(), torch.randn(6, 5, 8)),
    "folded": lambda: make_case(_Folded((-1, 4)), torch.randn(6, 4, 6)),
    "folded-batch-second": lambda: make_case(_Folded((4, -1)), torch.randn(4, 6, 6), batch_dim=1),
    "unet": lambda: make_case(_UNet(), torch.randn(6, 1, 6, 6)),
}
BATCH_STATISTICS = {"conv", "residual"}
TAP_DIM = {"encoder-sequence-first": 1, "folded-batch-second": 1}
_CACHE: dict[str, Case] = {}


def case_of(name: str) -> Case:
    """A captured model, shared by the tests."""
    if name not in _CACHE:
        torch.manual_seed(3)
        _CACHE[name] = MODELS[name]()
    return _CACHE[name]


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-7) -> None:
    """Relative error in the Frobenius norm."""
    assert found.shape == wanted.shape
    assert wanted.norm() > 0
    assert (found - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("name", MODELS)
def test_full_batch_equals_forward_ad(name: str) -> None:
    case = case_of(name)
    made = case.tangents(batch_stats="full")
    close(case.run(made), case.expected())
    assert not made.derived


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 4])
def test_sub_batch_equals_its_rows_of_the_full_batch(name: str, rows: int) -> None:
    case = case_of(name)
    whole = case.run(case.tangents())
    part = case.run(case.tangents(rows=3), rows)
    close(part, first_rows(whole, (TAP_DIM.get(name, 0), 1, 1), case.size, rows), 1e-12)


@pytest.mark.parametrize("name", sorted(BATCH_STATISTICS))
def test_frozen_statistics_differ_and_are_per_sample(name: str) -> None:
    """Another sample's noise has no influence on a tangent with frozen statistics."""
    case = case_of(name)
    frozen = case.tangents()
    before = case.run(frozen)
    assert (before - case.expected()).norm() > 1e-3 * before.norm()
    noise = case.noise
    try:
        case.noise = {i: torch.cat([v[:2], -v[2:]]) for i, v in noise.items()}
        close(case.run(frozen)[:2], before[:2], 1e-12)
        case.noise = noise
    finally:
        case.noise = noise


def test_full_statistics_refuse_a_sub_batch() -> None:
    with pytest.raises(TangentError, match="frozen"):
        case_of("conv").tangents(rows=3, batch_stats="full")


def test_a_fixed_batch_of_one_size_can_be_cut_down_too() -> None:
    """Without a batch symbol, shapes in the graph are numbers."""
    case = case_of("branches")
    fixed = make_fixed(case)
    whole = case.run(case.tangents())
    part = fixed.run(fixed.tangents(rows=3), 3)
    close(part, whole[:3], 1e-12)


def test_a_fixed_batch_folded_into_another_dim_is_refused() -> None:
    with pytest.raises(TangentError, match="tangent_fraction"):
        make_fixed(case_of("gru")).tangents(rows=3)


def make_fixed(case: Case) -> Case:
    """The same model with its batch size as a number."""
    from dataclasses import replace

    from grapefx.capture import Scope, capture
    from grapefx.passes.differentiate.joint import trace_joint
    from grapefx.passes.place.placement import place

    found = capture(Scope(case.model, case.args, {}), batch_dim=case.batch_dim, fixed=True)
    cap = found.captured
    trainable = {s.name for s in cap.inputs if s.role == "parameter"}
    size = case.args[0].shape[case.batch_dim]
    placed = place(cap, trainable=trainable, batch_size=size)
    joint = trace_joint(cap, placed, found.examples, trainable)
    return replace(case, cap=cap, placed=placed, joint=joint)


@pytest.mark.parametrize("depth", [2, 5])
def test_an_mlp_costs_one_more_product_a_layer(depth: int) -> None:
    """Zero tangents are symbolic: forward and tangent are 2F, not 3F; the first layer has none."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(6, 6), nn.ReLU()]
    case = make_case(nn.Sequential(*layers[:-1]), torch.randn(4, 6))
    count = _count(case.tangents().gm.graph)
    assert count == depth - 1


def _count(graph: torch.fx.Graph) -> int:
    products = (aten.mm.default, aten.addmm.default, aten.bmm.default)
    tangent = [n for n in graph.nodes if n.meta.get("grapefx_phase") == "tangent"]
    return sum(n.target in products for n in tangent)


def test_relu_and_linear_layers_need_no_other_node() -> None:
    case = make_case(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), torch.randn(4, 6))
    graph = case.tangents().gm.graph
    made = [
        n
        for n in graph.nodes
        if n.meta.get("grapefx_phase") == "tangent" and n.op == "call_function"
    ]
    assert [n.target for n in made] == [aten.mm.default]


def test_attention_dropout_in_a_fused_kernel_is_refused() -> None:
    """The mask is inside the kernel: a second draw would be another mask."""
    from grapefx.passes.differentiate.rules import rules

    class Node:
        def __init__(self, **kw: Any) -> None:
            self.__dict__.update(kw)

    op = aten._scaled_dot_product_flash_attention.default
    node = Node(target=op, args=(None, None, None, 0.1), kwargs={}, name="attention", meta={})
    with pytest.raises(TangentError, match="dropout to 0"):
        rules()[op](None, node)  # type: ignore[arg-type]


class _Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.tanh(self.a(x)))
        return h - h.mean(0, keepdim=True)


def test_samples_that_mix_refuse_a_sub_batch() -> None:
    case = make_case(_Centred(), torch.randn(6, 6))
    close(case.run(case.tangents()), case.expected())
    with pytest.raises(TangentError, match=r"tangent_fraction=1"):
        case.tangents(rows=3)


def test_an_operator_without_derivative_is_named_with_a_remedy() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.b(torch.tanh(self.a(x)))
            index = torch.zeros(3, dtype=torch.long)
            return h.index_reduce(1, index, h, "prod")

    with pytest.raises(TangentError, match=r"index_reduce[\s\S]*remedy"):
        make_case(Model(), torch.randn(6, 6)).tangents()
