"""Points and taps that the user chooses, wide heads, granularities, and leaking shortcuts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.errors import OptionError, PlacementError
from grapefx.passes.verify import independence
from grapefx.plan import Plan, build_plan


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Decoder(nn.Module):
    """Embedding, blocks, a vocabulary head."""

    def __init__(self, vocabulary: int = 20, depth: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.ln = nn.LayerNorm(8)
        self.head = nn.Linear(8, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


class Shortcuts(nn.Module):
    """Two residual blocks of two layers each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.a1, self.a2, self.b1, self.b2 = (nn.Linear(8, 8) for _ in range(4))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.a2(torch.relu(self.a1(x))))
        x = torch.relu(x + self.b2(torch.relu(self.b1(x))))
        return self.out(x)


def plan_of(model: nn.Module, x: Tensor, **options: object) -> Plan:
    torch.manual_seed(0)
    return build_plan(model, (x,), **{"method": "dfa", **options})  # type: ignore[arg-type]


def ids(n: int = 4, t: int = 5) -> Tensor:
    return torch.randint(0, 20, (n, t))


def names(plan: Plan) -> list[str]:
    return [layer.name for layer in plan.layers]


def proved(plan: Plan) -> dict[str, tuple[str, ...]]:
    return independence(plan.graph("update"), plan.layers)


def test_granularities_of_a_decoder() -> None:
    """Micro (a point a sub-layer: behind each residual sum) and macro (a point a block)."""
    model, x = Decoder(), ids()
    fine = plan_of(model, x, granularity="layer")
    micro = plan_of(model, x, granularity="sublayer")
    macro = plan_of(model, x, granularity="block")
    sums = [n for n in (f"blocks.{i}" for i in range(3))]
    assert len(micro.layers) == 1 + 2 * 3  # the embedding, then attention and feed-forward
    assert len(macro.layers) == 3 and all(
        b in name for b, name in zip(sums, names(macro), strict=True)
    )
    assert len(fine.layers) > len(micro.layers) > len(macro.layers)
    for plan in (fine, micro, macro):
        assert {p for layer in plan.layers for p in layer.parameters} <= set(proved(plan))
    # every parameter in front of the last point learns from some point
    inside = {p for layer in micro.layers for p in layer.parameters}
    assert inside == {n for n, _ in model.named_parameters() if not n.startswith("head")}


@pytest.mark.parametrize(
    ("points", "want"),
    [
        ("blocks.1", ["blocks.1"]),
        (["blocks.0", "blocks.2"], ["blocks.0", "blocks.2"]),
        ("blocks.?", ["blocks.0", "blocks.1", "blocks.2"]),
        (Block, ["blocks.0", "blocks.1", "blocks.2"]),
        (lambda n: "gelu" in str(n.target), ["blocks.0", "blocks.1", "blocks.2"]),
    ],
)
def test_points_by_name_glob_class_and_function(points: object, want: list[str]) -> None:
    plan = plan_of(Decoder(), ids(), points=points)
    assert names(plan) == want
    found = proved(plan)
    # whatever lies before a point learns from it; a point in a branch leaves the sum to others
    assert found["tokens.weight"][0] == want[0]
    assert len(found["tokens.weight"]) == (1 if isinstance(points, (str, list, type)) else 3)


def test_points_train() -> None:
    torch.manual_seed(0)
    net = grapefx.compile(Decoder(), points="blocks.*.down", method="grape", backend="eager")
    x = ids(16)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        opt.zero_grad()
        loss = F.cross_entropy(net(x).flatten(0, 1), x.flatten())
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert list(net.alignment()) == ["blocks.0.down", "blocks.1.down", "blocks.2.down"]


def test_a_wide_head_is_tapped_in_front() -> None:
    model, x = Decoder(vocabulary=2000), ids()
    plan = plan_of(model, x)
    assert {m.error_dim for m in plan.maps} == {8}
    assert any("in front of the output layer (8 wide, its output 2000)" in n for n in plan.notes)
    assert {"head.weight", "head.bias", "ln.weight"} <= set(plan.placement.head)
    whole = plan_of(model, x, error_at="output")
    assert {m.error_dim for m in whole.maps} == {2000} and not whole.notes
    assert {m.error_dim for m in plan_of(Decoder(), x).maps} == {20}  # narrow: the output


def test_the_head_behind_a_tap_gets_its_exact_gradient() -> None:
    torch.manual_seed(0)
    model, x = Decoder(vocabulary=2000).double(), ids()
    loss = F.cross_entropy(model(x).flatten(0, 1), x.flatten())
    want = dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        )
    )
    net = grapefx.compile(model, method="dfa", calib_every=None, backend="eager")
    F.cross_entropy(net(x).flatten(0, 1), x.flatten()).backward()
    for name in ("head.weight", "head.bias", "ln.weight", "ln.bias"):
        assert torch.allclose(model.get_parameter(name).grad, want[name])  # type: ignore[arg-type]
    assert not torch.allclose(model.tokens.weight.grad, want["tokens.weight"])


def test_a_tied_wide_head_leaves_updates_independent() -> None:
    """The sum of a tied weight's gradients waits for the error, not for the head's update."""
    model = Decoder(vocabulary=2000)
    model.head = nn.Linear(8, 2000, bias=False)
    model.head.weight = model.tokens.weight
    report = grapefx.inspect(model, ids(), "grape")
    assert report.method("grape").independent
    assert report.method("grape").shown.phases  # the product in front of the tap is the error's
    product = next(r for r in report.method("grape").shown.phases if r.phase == "error")
    assert product.flops >= 2 * 4 * 5 * 8 * 2000


def test_error_at_a_module() -> None:
    plan = plan_of(Decoder(), ids(), error_at="ln")
    assert {m.error_dim for m in plan.maps} == {8}
    assert all(m.rows == "token" for m in plan.maps)
    plan = plan_of(Decoder(), ids(), error_at="blocks.1")
    inside = [n for n in names(plan) if n.startswith("blocks.")]
    assert inside and not any(n.startswith("blocks.2") for n in inside)
    assert any(p.startswith("blocks.2") for p in plan.placement.head)


def test_a_method_that_reads_targets_taps_the_output() -> None:
    model, x = Decoder(vocabulary=2000), ids()
    plan = plan_of(model, x, method="drtp", calib_every=None)
    assert {m.error_dim for m in plan.maps} == {2000}
    with pytest.raises(PlacementError, match="error_at='output'"):
        plan_of(model, x).for_method("drtp", plan.options)


def test_auto_takes_the_finest_that_fits() -> None:
    model, x = Decoder(), ids()
    sizes = {g: plan_of(model, x, granularity=g) for g in ("layer", "sublayer", "block")}
    need = {g: sum(m.bytes for m in p.maps) for g, p in sizes.items()}
    assert need["layer"] > need["sublayer"] > need["block"]
    for g, p in sizes.items():
        auto = plan_of(model, x, granularity="auto", feedback_budget=need[g])
        assert names(auto) == names(p)


def test_leaking_shortcuts() -> None:
    """Beside a point at each layer's input, shortcuts carry the true gradient of the head."""
    torch.manual_seed(0)
    model, x = Shortcuts().double(), torch.randn(5, 6).double()
    plan = plan_of(model, x, residual="leak", calib_every=None)
    assert len(plan.layers) == 5
    net = grapefx.compile(
        model, method="dfa", residual="leak", calib_every=None, backend="eager", error_at="output"
    )
    y = torch.randint(0, 3, (5,))
    F.cross_entropy(net(x), y).backward()
    leak = {n: p.grad.clone() for n, p in model.named_parameters()}  # type: ignore[union-attr]

    # by hand: each weight layer's input gradient is e B, added to what the shortcut brings
    maps = {m.layer.name: net.feedback_state_dict()["tensors"][f"{m.layer.name}/B"]
            for m in net.plan.maps}  # fmt: skip
    b = dict(zip(("a1", "a2", "b1", "b2", "out"), maps.values(), strict=True))
    h0 = torch.relu(model.stem(x))
    s1 = torch.relu(model.a1(h0))
    p1 = h0 + model.a2(s1)
    h1 = torch.relu(p1)
    s2 = torch.relu(model.b1(h1))
    p2 = h1 + model.b2(s2)
    h2 = torch.relu(p2)
    logits = model.out(h2)
    e = torch.autograd.grad(F.cross_entropy(logits, y), logits)[0]
    d_p2 = (e @ b["out"]) * (p2 > 0)
    d_p1 = (e @ b["b1"] + d_p2) * (p1 > 0)  # the shortcut leaks
    want = {
        "b2.weight": d_p2.t() @ s2,
        "b1.weight": ((e @ b["b2"]) * (s2 > 0)).t() @ h1,
        "a2.weight": d_p1.t() @ s1,
        "stem.weight": ((e @ b["a1"] + d_p1) * (h0 > 0)).t() @ x,
    }
    for name, value in want.items():
        assert torch.allclose(leak[name], value), name


class Cells(nn.Module):
    """Recurrent cells, whose two states leave no single value to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 6)
        for t in range(3):
            h, c = self.cell(x[:, t], (h, c))
        return self.out(h)


def test_bp_needs_no_feedback_point() -> None:
    torch.manual_seed(0)
    model, x = Cells().double(), torch.randn(5, 3, 4).double()
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    net = grapefx.compile(model, method="bp", backend="eager")
    net(x).square().sum().backward()
    for p, g in zip(model.parameters(), want, strict=True):
        assert p.grad is not None and torch.allclose(p.grad, g)
    with pytest.raises(PlacementError, match="no feedback point can be placed behind"):
        plan_of(Cells(), torch.randn(5, 3, 4))
    with pytest.raises(PlacementError, match="no feedback point can be placed behind"):
        grapefx.inspect(Cells(), torch.randn(5, 3, 4), "dfa")


def test_inspect_places_as_asked() -> None:
    """Its plans start from bp's, which must hold the points that were asked for."""
    count = {
        g: len(grapefx.inspect(Decoder(), ids(), "dfa", granularity=g).methods[1].feedback)
        for g in ("layer", "block")
    }
    assert count["layer"] > count["block"]
    with pytest.raises(PlacementError, match="nothing in the model matches"):
        plan_of(Decoder(), ids(), method="bp", points="nowhere")


def test_group_norm_behind_a_frozen_layer() -> None:
    """Masks of backward operators are narrowed by name, not by position."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).double()
    model[0].requires_grad_(False)
    x = torch.randn(5, 2, 8, 8).double()
    own = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(model(x).square().sum(), own)
    net = grapefx.compile(model, method="bp", backend="eager")
    net(x).square().sum().backward()
    for p, g in zip(own, want, strict=True):
        assert p.grad is not None and torch.allclose(p.grad, g)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"points": "blocs.*"}, PlacementError, "points: nothing in the model matches 'blocs"),
        ({"points": nn.Conv2d}, PlacementError, "matches 'Conv2d'"),
        ({"points": 3}, OptionError, "module names or globs"),
        ({"error_at": "heads"}, PlacementError, "error_at: nothing"),
        ({"granularity": "blok"}, OptionError, "block"),
        ({"residual": "leak", "points": "*"}, OptionError, "chooses its own points"),
        ({"points": lambda n: n.op == "placeholder"}, PlacementError, "not a floating-point"),
    ],
)
def test_bad_choices(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        plan_of(Decoder(), ids(), **options)
