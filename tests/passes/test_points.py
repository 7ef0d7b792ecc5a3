"""Points and taps that the user chooses, wide heads, granularities, and leaking shortcuts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.errors import OptionError, PlacementError
from grapefx.passes.graph.verify import independence
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


def test_leaking_where_nothing_can() -> None:
    """Weight layers that read the model's inputs alone have no edge to put feedback at."""
    model, x = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), torch.randn(5, 4)
    with pytest.raises(PlacementError, match=r"residual='leak'.*\n  remedy"):
        plan_of(model, x, residual="leak")
    net = grapefx.compile(model, method="bp", residual="leak", backend="eager")
    net(x).square().sum().backward()
    assert model[0].weight.grad is not None


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

    def __init__(self, kind: type[nn.Module] = nn.LSTMCell) -> None:
        super().__init__()
        self.cell, self.out = kind(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 6)
        for t in range(3):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, t], (h, c))
            else:
                h = self.cell(x[:, t], h)
        return self.out(h)


@pytest.mark.parametrize(("kind", "count"), [(nn.LSTMCell, 5), (nn.GRUCell, 3), (nn.RNNCell, 3)])
def test_every_state_of_a_cell_is_a_point(kind: type[nn.Module], count: int) -> None:
    """Each step's states, but for the last cell state, which nothing reads."""
    plan = plan_of(Cells(kind), torch.randn(5, 3, 4))
    own = {n for n, _ in Cells(kind).named_parameters() if n.startswith("cell")}
    assert len(plan.layers) == count
    assert all(set(layer.parameters) == own for layer in plan.layers)
    assert {p: len(found) for p, found in proved(plan).items()} == {
        **dict.fromkeys(own, count), "out.weight": 0, "out.bias": 0,
    }  # fmt: skip


def test_the_states_of_a_cell_by_hand() -> None:
    """The gradient of a shared cell is the sum of its steps', each from its states' cotangents."""
    torch.manual_seed(0)
    model, x = Cells().double(), torch.randn(5, 3, 4).double()
    net = grapefx.compile(model, method="dfa", calib_every=None, backend="eager")
    out = net(x)
    e = torch.randn_like(out)
    out.backward(e)
    tensors = net.feedback_state_dict()["tensors"]
    maps = iter([tensors[f"{m.layer.name}/B"].double() for m in net.plan.maps])
    weight = model.cell.weight_hh
    assert weight.grad is not None
    total = torch.zeros_like(weight)
    h = c = x.new_zeros(5, 6)
    for t in range(3):
        states = model.cell(x[:, t], (h.detach(), c.detach()))
        h, c = states
        used = states if t < 2 else states[:1]
        deltas = [e @ next(maps) for _ in used]
        total += torch.autograd.grad(used, weight, deltas)[0]
    torch.testing.assert_close(weight.grad, total)


class Forked(nn.Module):
    """A value without the batch, read twice: nowhere to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w = self.gate(x.mean(0))
        return x * w, x + w


def test_bp_needs_no_feedback_point() -> None:
    torch.manual_seed(0)
    model, x = Forked().double(), torch.randn(5, 4).double()
    want = torch.autograd.grad(sum(y.square().sum() for y in model(x)), list(model.parameters()))
    net = grapefx.compile(model, method="bp", backend="eager")
    sum(y.square().sum() for y in net(x)).backward()
    for p, g in zip(model.parameters(), want, strict=True):
        assert p.grad is not None and torch.allclose(p.grad, g)
    with pytest.raises(PlacementError, match="no feedback point can be placed behind gate"):
        plan_of(Forked(), torch.randn(5, 4))
    with pytest.raises(PlacementError, match="no feedback point can be placed behind gate"):
        grapefx.inspect(Forked(), torch.randn(5, 4), "dfa")


class WithoutBatch(nn.Module):
    """A gate made from the mean of the batch, which no point can close."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Linear(4, 6), nn.Linear(6, 6)
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        w = self.gate(h.mean(0))
        return self.out(torch.relu(self.a(h * w)) + torch.tanh(self.b(h + w)))


def test_what_cannot_be_cut_is_trained_by_the_points_behind() -> None:
    plan = plan_of(WithoutBatch(), torch.randn(5, 4))
    found = proved(plan)
    assert len(found["gate.weight"]) == 2  # through h * w and through h + w
    assert found["stem.weight"] == ("stem",)
    for own in ("a", "b"):
        assert not set(found[f"{own}.weight"]) & set(found["gate.weight"])


def test_norms_between_frozen_layers_learn() -> None:
    """A frozen layer takes over the norm in front of it."""
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    found = proved(plan_of(model, torch.randn(5, 6)))
    assert found["1.weight"] == ("1",) and found["4.weight"] == ("4",)


class Towers(nn.Module):
    """Two towers whose embeddings meet in a matrix of similarities, as in CLIP."""

    def __init__(self, loss: bool = False) -> None:
        super().__init__()
        self.a = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)
        )
        self.b = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4))
        self.scale, self.loss = nn.Parameter(torch.tensor(0.3)), loss

    def forward(self, x: Tensor, y: Tensor) -> Any:
        u, v = F.normalize(self.a(x), dim=-1), F.normalize(self.b(y), dim=-1)
        logits = u @ v.t() * self.scale.exp()
        if not self.loss:
            return logits, logits.t()
        own = -logits.diagonal()
        return (own + logits.logsumexp(0)).mean() + (own + logits.logsumexp(1)).mean()


@pytest.mark.parametrize("loss", [False, True])
def test_two_towers_take_the_error_of_their_embeddings(loss: bool) -> None:
    """Pairs of samples have no batch dim of their own: the error is that of both embeddings."""
    torch.manual_seed(0)
    model, x, y = Towers(loss).double(), torch.randn(6, 6).double(), torch.randn(6, 5).double()
    net = grapefx.compile(model, method="dfa", calib_every=None, backend="eager")
    assert isinstance(net, nn.Module)

    def total(out: Any) -> Tensor:
        return out if loss else out[0].square().sum() + out[1].sin().sum()

    total(net(x, y)).backward()
    plan = net.plan
    assert {m.error_dim for m in plan.maps} == {8}
    assert names(plan) == ["a.0", "a.2", "b.0"]
    assert set(plan.placement.head) == {
        "a.4.weight", "a.4.bias", "b.2.weight", "b.2.bias", "scale",
    }  # fmt: skip
    got = {n: p.grad.clone() for n, p in model.named_parameters()}  # type: ignore[union-attr]

    # by hand: the heads exactly, the rest from e = [dL/da, dL/db]
    h1 = torch.relu(model.a[0](x))
    h2 = torch.relu(model.a[2](h1.detach()))
    g1 = torch.relu(model.b[0](y))
    a, b = model.a[4](h2.detach()), model.b[2](g1.detach())
    u, v = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    logits = u @ v.t() * model.scale.exp()
    own = -logits.diagonal()
    pairs = (own + logits.logsumexp(0)).mean() + (own + logits.logsumexp(1)).mean()
    end = pairs if loss else total((logits, logits.t()))
    e = torch.cat(torch.autograd.grad(end, (a, b), retain_graph=True), 1)
    tensors = net.feedback_state_dict()["tensors"]
    for name, h in (("a.0", h1), ("a.2", h2), ("b.0", g1)):
        w = model.get_parameter(f"{name}.weight")
        want = torch.autograd.grad(h, w, e @ tensors[f"{name}/B"].double())[0]
        torch.testing.assert_close(got[f"{name}.weight"], want)
    for name in plan.placement.head:
        want = torch.autograd.grad(end, model.get_parameter(name), retain_graph=True)[0]
        torch.testing.assert_close(got[name], want)


class Twins(nn.Module):
    """Returns the distance of two embeddings as its loss; ``each``: a loss for each embedding."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.a, self.b, self.each = nn.Linear(6, 8), nn.Linear(8, 4), each

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u, v = self.b(torch.relu(self.a(x))), self.b(torch.relu(self.a(y)))
        if self.each:
            return (u.square().sum(1) + v.exp().sum(1)).mean()
        return (u - v).square().sum()


@pytest.mark.parametrize(("each", "taps"), [(False, ["sub"]), (True, ["linear_1", "linear_3"])])
def test_twins(each: bool, taps: list[str]) -> None:
    """One value as wide as both stands for them; a loss a sample says nothing."""
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    plan = build_plan(Twins(each), (x, y), method="dfa")
    found = plan.placement.taps
    assert ["sub" if t.target is torch.ops.aten.sub.Tensor else t.name for t in found] == taps
    assert len(plan.layers) == 2 and plan.placement.head == ("b.bias", "b.weight")
    independence(plan.graph("update"), plan.layers)


class Side(nn.Module):
    """A penalty on a hidden value beside the prediction."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
        self.apart = apart

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x))
        penalty = h.square().sum(1).mean() if self.apart else h.mean()
        return self.c(torch.tanh(self.b(h))), penalty


class SideLoss(Side):
    """Both are reduced, in either order."""

    def forward(self, x: Tensor) -> Any:
        y, penalty = super().forward(x)
        loss = y.logsumexp(1).mean()
        return (loss, penalty) if self.first else (penalty, loss)

    first = True


@pytest.mark.parametrize("first", [True, False])
def test_two_reduced_outputs(first: bool) -> None:
    model = SideLoss(True)
    model.first = first
    plan = plan_of(model, torch.randn(5, 6))
    assert {t.name for t in plan.placement.taps} == {"linear_2", "square"}
    assert proved(plan)["b.weight"] == ("b",)


def test_a_reduced_output_beside_the_prediction() -> None:
    """Its tap must not lie in front of another: that error would cross feedback points."""
    plan = plan_of(Side(True), torch.randn(5, 6))
    taps = plan.placement.taps
    assert [t.name for t in taps] == ["linear_2", "square"]
    assert proved(plan)["a.weight"] == ("a",)
    with pytest.raises(PlacementError, match=r"in front of the output 'mean'(.|\n)*error_at="):
        plan_of(Side(False), torch.randn(5, 6))
    assert len(plan_of(Side(False), torch.randn(5, 6), error_at="c").layers) == 2


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
        ({"points": lambda n: n.op == "placeholder"}, PlacementError, "not a real tensor"),
        ({"points": "head", "error_at": "output"}, PlacementError, "is the error tap"),
        ({"points": "head", "error_at": "output", "method": "fg-a"}, PlacementError, "error tap"),
    ],
)
def test_bad_choices(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        plan_of(Decoder(), ids(), **options)


def test_an_error_of_one_entry_is_mentioned() -> None:
    def notes(width: int, **options: object) -> list[str]:
        body = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, width)]
        return plan_of(nn.Sequential(*body), torch.randn(4, 8), **options).notes

    assert any("one entry a sample" in n for n in notes(1))
    assert notes(2) == [] and notes(1, method="bp") == []


def test_one_point_for_a_whole_network_is_mentioned() -> None:
    class Wide(nn.Module):
        """Many layers side by side: one value holds them all."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(8, 2) for _ in range(5))
            self.last = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(torch.cat([p(x) for p in self.parts], 1)))

    tanh = torch.ops.aten.tanh.default
    chosen = plan_of(Wide(), torch.randn(4, 8), points=lambda node: node.target is tanh)
    assert len(chosen.layers) == 1 and chosen.notes == []
    found = replace(chosen, options=replace(chosen.options, points=None))
    assert any("one feedback point" in n for n in found.notes)
