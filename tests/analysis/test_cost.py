"""Costs of single ops, and agreement with FlopCounterMode on whole models."""

from __future__ import annotations

import time

import pytest
import torch
import torchvision
from torch import nn
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from grapefx.analysis import Price, build_dag, graph_cost, register_cost
from grapefx.torch_compat import FakeTensorMode
from tests.analysis.step_graphs import Builder

aten = torch.ops.aten


def cost_of(function, *shapes, dtype=torch.float32):
    """Costs of a traced function's nodes, by op name without namespace."""
    with FakeTensorMode() as mode:
        args = [torch.empty(s, dtype=dtype) for s in shapes]
    graph = make_fx(function, tracing_mode="fake")(*args).graph
    del mode
    return {c.op.split("::")[1]: c for c in graph_cost(graph).nodes.values()}


def test_products():
    c = cost_of(lambda a, b: a @ b, (3, 4), (4, 5))["mm"]
    assert (c.matmul_flops, c.vector_flops) == (2 * 3 * 4 * 5, 0)
    assert (c.read_bytes, c.written_bytes) == (4 * (12 + 20), 4 * 15)
    c = cost_of(torch.addmm, (5,), (3, 4), (4, 5))["addmm"]
    assert (c.matmul_flops, c.vector_flops) == (120, 15)
    c = cost_of(torch.bmm, (2, 3, 4), (2, 4, 5))["bmm"]
    assert c.matmul_flops == 240
    c = cost_of(torch.mv, (3, 4), (4,))["mv"]
    assert c.matmul_flops == 24
    c = cost_of(lambda a, b: torch.linalg.solve(a, b), (6, 6), (6, 2))
    assert c["_linalg_solve_ex"].matmul_flops == int(2 / 3 * 216 + 2 * 36 * 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_and_its_backward(groups):
    x, w = torch.empty(2, 4, 8, 8), torch.empty(6, 4 // groups, 3, 3)
    products = 2 * 2 * 8 * 8 * 6 * (4 // groups) * 9
    c = cost_of(
        lambda x, w: aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], groups),
        x.shape,
        w.shape,
    )["convolution"]
    assert c.matmul_flops == products

    def backward(mask):
        return cost_of(
            lambda g, x, w: [
                t
                for t in aten.convolution_backward(
                    g, x, w, [6], [1, 1], [1, 1], [1, 1], False, [0, 0], groups, mask
                )
                if t is not None
            ],
            (2, 6, 8, 8),
            x.shape,
            w.shape,
        )["convolution_backward"]

    both, weight = backward([True, True, True]), backward([False, True, False])
    assert both.matmul_flops == 2 * products and weight.matmul_flops == products
    assert both.vector_flops == 2 * 6 * 64 and weight.vector_flops == 0
    assert weight.written_bytes == 4 * w.numel()
    assert weight.read_bytes == 4 * (2 * 6 * 64 + x.numel())


def test_transposed_convolution_agrees_with_torch():
    model = nn.ConvTranspose2d(4, 6, 3, stride=2)
    assert_agrees(model, (torch.empty(2, 4, 5, 5),))


def test_pointwise_reductions_norms_softmax_pools():
    n = 4 * 10
    assert cost_of(torch.relu, (4, 10))["relu"].flops == n
    assert cost_of(lambda a: a.sum(1), (4, 10))["sum"].flops == n
    assert cost_of(lambda a: a.softmax(1), (4, 10))["_softmax"].flops == 5 * n
    assert (
        cost_of(lambda a: nn.functional.layer_norm(a, [10]), (4, 10))["native_layer_norm"].flops
        == 8 * n
    )
    c = cost_of(lambda a: nn.functional.max_pool2d(a, 2), (1, 3, 8, 8))
    assert c["max_pool2d_with_indices"].flops == 4 * 3 * 16
    c = cost_of(lambda a: nn.functional.avg_pool2d(a, 2), (1, 3, 8, 8))
    assert c["avg_pool2d"].flops == 4 * 3 * 16


def test_broadcast_reads_what_is_stored():
    c = cost_of(lambda a, b: a + b.expand(4, 10), (4, 10), (1, 10))
    assert c["expand"].bytes == 0
    assert c["add"].read_bytes == 4 * (40 + 10)


def test_embedding_reads_rows():
    with FakeTensorMode():
        table, index = torch.empty(1000, 16), torch.empty(7, dtype=torch.long)
    graph = make_fx(aten.embedding.default, tracing_mode="fake")(table, index).graph
    (c,) = graph_cost(graph).nodes.values()
    assert (c.read_bytes, c.written_bytes) == (7 * 16 * 4 + 7 * 8, 7 * 16 * 4)


def test_views_and_sizes_are_free():
    costs = cost_of(lambda a: a.t().reshape(-1).view(2, 20)[0].unsqueeze(0).detach(), (10, 4))
    free = {k: c for k, c in costs.items() if k != "clone"}
    assert all(c.flops == 0 and c.bytes == 0 for c in free.values())
    assert costs["clone"].bytes == 2 * 160


def test_unknown_ops_are_flagged_and_never_zero():
    lib = torch.library.Library("grapefx_test", "DEF")
    lib.define("mystery(Tensor x) -> Tensor")
    lib.impl("mystery", lambda x: x.clone(), "CompositeExplicitAutograd")
    lib.impl("mystery", torch.empty_like, "Meta")
    b = Builder()
    x = b.input("x", 4, 10)
    y = b(torch.ops.grapefx_test.mystery.default, x)
    graph = b.done([y])
    costs = graph_cost(graph)
    assert costs.unknown_ops() == {"grapefx_test::mystery": 1}
    assert costs.total() == 40 and costs.total("bytes") == 320
    assert not build_dag(graph).tasks[0].known
    register_cost(
        "grapefx_test::mystery", lambda call: Price("pointwise", vector=3 * call.out.numel)
    )
    assert graph_cost(graph).unknown_ops() == {} and graph_cost(graph).total() == 120


class Gpt(nn.Module):
    """A decoder with fused attention, as GPT-2's blocks."""

    def __init__(self, width=64, heads=4, depth=2, words=100):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, tokens):
        h = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.head(h)


def joint_graph(model, args):
    """Forward and backward of ``model(*args).sum()``, traced on fake tensors."""
    params = dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    def step(params, *args):
        out = torch.func.functional_call(model, {**params, **buffers}, args)
        return out, torch.autograd.grad(out.sum(), list(params.values()), allow_unused=True)

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = {k: mode.from_tensor(v).requires_grad_() for k, v in params.items()}
    return make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(
        fake, *(mode.from_tensor(a) for a in args)
    )


counts_attention = pytest.mark.skipif(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry,
    reason="this torch counts no attention on a CPU",
)


def assert_agrees(model, args):
    graph = joint_graph(model, args)
    costs = graph_cost(graph)
    with FlopCounterMode(display=False) as counter:
        model(*args).sum().backward()
    assert costs.total("matmul_flops") == counter.get_total_flops()
    assert costs.unknown_ops() == {}
    return graph


@pytest.mark.parametrize(
    ("make", "args"),
    [
        (torchvision.models.resnet18, (torch.randn(2, 3, 32, 32),)),
        (torchvision.models.mobilenet_v3_small, None),
        pytest.param(
            lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 128),
            (torch.randn(2, 3, 32, 32),),
            marks=counts_attention,
        ),
        pytest.param(Gpt, (torch.randint(0, 100, (2, 16)),), marks=counts_attention),
    ],
    ids=["resnet18", "mobilenet_v3", "vit", "gpt"],
)
def test_agrees_with_flop_counter_mode(make, args):
    model = make()
    if args is None:
        # depthwise: torch counts the weight gradient of a grouped convolution `groups` times
        graph = joint_graph(model, (torch.randn(2, 3, 32, 32),))
        assert graph_cost(graph).unknown_ops() == {}
        return
    assert_agrees(model, args)


def test_twenty_thousand_nodes_in_seconds():
    b = Builder()
    x = b.input("x", 8, 16, dynamic=True)
    w = b.input("w", 16, 16)
    with b.at("forward", "a"):
        node = b(aten.mm.default, x, w)
        relu = b(aten.relu.default, node)
    graph: Graph = b.graph
    for i in range(10_000):
        for op, args, like in ((aten.mm.default, (relu, w), node), (aten.relu.default, None, relu)):
            new = graph.call_function(op, args or (last,))  # noqa: F821
            new.meta = {**like.meta, "grapefx_layer": f"l{i // 50}"}
            last = new
        relu = last
    gm = b.done([relu])
    began = time.perf_counter()
    dag = build_dag(gm)
    dag.by_stage()
    dag.by_layer()
    assert dag.span("seconds") == pytest.approx(dag.work("seconds"))
    assert len(dag.tasks) == 20_002
    assert time.perf_counter() - began < 15
