"""batch, order, prune, restride: the small passes on graphs made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from grapefx.maps import from_samples, to_samples
from grapefx.passes.graph.folds import Fold, batch_folds
from grapefx.passes.graph.order import dead_code, topological
from grapefx.passes.graph.prune import prune_masks
from grapefx.passes.graph.restride import restride
from grapefx.passes.peephole.size_inputs import Place, size_inputs
from grapefx.passes.place.sweep import sample_shape
from grapefx.torch_compat import batch_symbol, fake_tensor, make_fx, new_fake_mode
from tests.zoo import live_input_gradients

aten = torch.ops.aten


def traced(fn: Any, shape: tuple[int, ...], dim: int = 0) -> tuple[GraphModule, Any]:
    """A graph of ``fn`` on one tensor whose dim ``dim`` is the symbolic batch."""
    mode = new_fake_mode()
    x = fake_tensor(mode, torch.empty(shape), [dim])
    with mode:
        gm = make_fx(fn, tracing_mode="real")(x)
    return gm, batch_symbol(x.shape[dim])


def folds_of(fn: Any, shape: tuple[int, ...], dim: int = 0) -> tuple[list[Node], list[Any]]:
    gm, batch = traced(fn, shape, dim)
    folds = batch_folds(gm.graph, batch)
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    return nodes, [folds.get(n) for n in nodes]


def test_the_batch_is_followed_through_views() -> None:
    def windows(x: Tensor) -> Tensor:  # (N, 8, 8, 3), as Swin folds windows into the batch
        n = x.shape[0]
        y = x.view(n, 2, 4, 2, 4, 3).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(n * 4, 16, 3).relu()

    nodes, folds = folds_of(windows, (5, 8, 8, 3))
    assert folds[-1] == Fold(0, 1, 4)
    assert sample_shape(nodes[-1], folds[-1]) == (4, 16, 3)


def test_the_batch_may_sit_behind_another_dim() -> None:
    def heads(x: Tensor) -> Tensor:  # (T, N, D) -> (T, N * H, D / H)
        return x.reshape(7, x.shape[1] * 2, 4).transpose(0, 1)

    _, folds = folds_of(heads, (7, 5, 8), dim=1)
    assert folds[-1] == Fold(0, 1, 2)

    def outer(x: Tensor) -> Tensor:  # (3, N, 4) -> (3 * N, 4)
        return x.reshape(3 * x.shape[1], 4).sin()

    _, folds = folds_of(outer, (3, 5, 4), dim=1)
    assert folds[-1] == Fold(0, 3, 1)


def test_a_value_without_the_batch_has_no_fold() -> None:
    _, folds = folds_of(lambda x: x.sum(0), (5, 4))
    assert folds[-1] is None
    # the batch in two dims cannot be followed
    _, folds = folds_of(lambda x: x @ x.t(), (5, 4))
    assert folds[-1] is None


def test_a_fixed_batch_is_the_first_dim_of_that_size() -> None:
    mode = new_fake_mode()
    x = fake_tensor(mode, torch.empty(1, 6))
    with mode:
        gm = make_fx(lambda x: (x * 2, x.sum()), tracing_mode="real")(x)
    folds = batch_folds(gm.graph, None, 1)
    nodes = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert [folds.get(n) for n in nodes] == [Fold(0), None]


@pytest.mark.parametrize("fold", [(0, 1, 1), (1, 1, 1), (0, 1, 4), (1, 3, 1), (1, 2, 3)])
def test_samples_and_back(fold: tuple[int, int, int]) -> None:
    dim, outer, inner = fold
    shape = [2, 3, 4]
    shape[dim] = outer * 5 * inner
    x = torch.randn(shape)
    samples = to_samples(x, fold)
    rest = [s for d, s in enumerate(shape) if d != dim]
    assert list(samples.shape) == [5, *([outer * inner] if outer * inner > 1 else []), *rest]
    assert torch.equal(from_samples(samples, fold), x)


def test_topological_order() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    out = graph.output((x,))
    with graph.inserting_before(out):
        c = graph.call_function(torch.relu, (x,))
        a = graph.call_function(torch.sin, (x,))
        b = graph.call_function(torch.cos, (a,))
    c.args = (b,)  # used before it is made
    out.args = ((c,),)
    with pytest.raises(RuntimeError):
        graph.lint()
    topological(graph)
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [
        torch.sin, torch.cos, torch.relu,
    ]  # fmt: skip


def test_dead_code_keeps_writes() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.sin.default, (x,))
    graph.call_function(aten.cos.default, (y,))
    graph.call_function(aten.copy_.default, (x, y))
    graph.output((x,))
    assert dead_code(graph) == 1
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [
        aten.sin.default, aten.copy_.default,
    ]  # fmt: skip


def test_masks_follow_use() -> None:
    def grads(g: Tensor, x: Tensor, w: Tensor) -> Any:
        return aten.convolution_backward.default(
            g, x, w, [4], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, True]
        )[1]

    args = (torch.randn(2, 4, 3, 3), torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3))
    gm = make_fx(grads)(*args)
    gm.graph.eliminate_dead_code()
    before = gm(*args)
    assert live_input_gradients(gm.graph) == 1
    assert prune_masks(gm.graph) == 2
    assert live_input_gradients(gm.graph) == 0
    gm.recompile()
    torch.testing.assert_close(gm(*args), before)


def test_new_strides_turn_a_view_into_a_reshape() -> None:
    """A projected cotangent need not lie in memory as the true gradient did."""
    mode = new_fake_mode()
    a = fake_tensor(mode, torch.empty(2, 3, 4))
    b = fake_tensor(mode, torch.empty(2, 4, 3))
    with mode:
        gm = make_fx(lambda a, b: (a.sin().view(2, 12) * 2, b.transpose(1, 2)))(a, b)
    nodes = {str(n.target): n for n in gm.graph.nodes if n.op == "call_function"}
    old, new = nodes["aten.sin.default"], nodes["aten.transpose.int"]
    view = nodes["aten.view.default"]
    view.args = (new, [2, 12])
    topological(gm.graph)
    assert old.meta["val"].stride() != new.meta["val"].stride()
    assert restride(gm.graph, [new]) == 1
    gm.recompile()
    x, y = torch.randn(2, 3, 4), torch.randn(2, 4, 3)
    torch.testing.assert_close(gm(x, y)[0], y.transpose(1, 2).reshape(2, 12) * 2)


def test_every_size_symbol_becomes_an_input() -> None:
    """Found in a multiple, of a tensor's size or of a plain one; known symbols are left alone."""

    def fn(x: Tensor) -> tuple[Tensor, Any]:
        y = x.reshape(x.shape[0] * 6, 2)
        return y, x.shape[0] * 4

    gm, batch = traced(fn, (5, 3, 4))
    y, four = gm.graph.output_node().args[0]
    fold, size = y.meta["val"], four.meta["val"]

    graph = Graph()
    a, n = graph.placeholder("a"), graph.placeholder("n")
    a.meta["val"], n.meta["val"] = fold, size
    out = graph.call_function(aten.mul.Tensor, (a, 2))
    graph.output((out, n))
    half = GraphModule(torch.nn.Module(), graph)

    made, places = size_inputs(half, [fold, size])
    assert places == (Place(0, 0, 6),)
    added = [p for p in made.graph.nodes if p.op == "placeholder"]
    assert [p.name for p in added] == ["a", "n", "size_0"] and len(half.graph.nodes) == 4
    assert batch_symbol(added[-1].meta["val"]) == batch
    assert places[0].read([torch.empty(42, 2), 28]) == 7

    _, places = size_inputs(half, [torch.empty(42, 2), size])  # only a plain size has the symbol
    assert places == (Place(1, None, 4),) and places[0].read([torch.empty(42, 2), 28]) == 7
    same, places = size_inputs(half, [fold, added[-1].meta["val"]])
    assert same is half and places == ()
