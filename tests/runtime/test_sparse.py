"""Sparse tensors, which have no strides, as arguments and buffers (graph networks)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grapefx
from grapefx.errors import GrapefxWarning, InputError

LAYOUTS = ("coo", "uncoalesced", "csr")
NODES = 7


def adjacency(layout: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(NODES, NODES, generator=generator, dtype=torch.float64)
    dense = torch.where(dense < 0.5, dense, 0.0)
    if layout == "csr":
        return dense.to_sparse_csr()
    if layout == "csc":
        return dense.to_sparse_csc()
    found = dense.to_sparse()
    if layout == "uncoalesced":
        ids = torch.cat([found.indices()] * 2, 1)
        values = torch.cat([found.values() / 2] * 2)
        return torch.sparse_coo_tensor(ids, values, found.shape)
    return found.coalesce()


class GCN(nn.Module):
    """Three graph convolutions; the adjacency is a buffer or an argument."""

    def __init__(self, adj: Tensor | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((4, 6), (6, 5), (5, 3)))
        self.register_buffer("adj", adj)

    def forward(self, x: Tensor, adj: Tensor | None = None) -> Tensor:
        adj = self.adj if adj is None else adj
        for k, layer in enumerate(self.layers):
            x = torch.sparse.mm(adj, layer(x)) if k % 2 else adj @ layer(x)
            x = torch.tanh(x) if k < 2 else x
        return x


def setting(layout: str, where: str) -> tuple[GCN, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    adj = adjacency(layout)
    model = GCN(adj if where == "buffer" else None).double()
    x = torch.randn(NODES, 4, dtype=torch.float64)
    return model, (x,) if where == "buffer" else (x, adj)


def gradients(model: nn.Module, run: Any, args: tuple[Any, ...]) -> list[Tensor | None]:
    model.zero_grad()
    run(*args).square().mean().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("where", ["argument", "buffer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bp_and_calibration_are_exact(layout: str, where: str) -> None:
    model, args = setting(layout, where)
    true = [g.clone() for g in gradients(model, model, args)]
    for method in ("bp", "grape"):
        net = grapefx.compile(
            model, method=method, calib_every=1, backend="eager", capture="export"
        )
        for g, t in zip(gradients(model, net, args), true, strict=True):
            torch.testing.assert_close(g, t)
        with torch.no_grad():
            torch.testing.assert_close(net(*args), model(*args))


@pytest.mark.parametrize("where", ["argument", "buffer"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["dfa", "grape", "fa", "fg-w"])
def test_every_kind_of_method_trains(method: str, layout: str, where: str) -> None:
    model, args = setting(layout, where)
    true = [g.clone() for g in gradients(model, model, args)]
    net = grapefx.compile(model, method=method, calib_every=None, backend="eager", capture="export")
    for _ in range(2):
        found = gradients(model, net, args)
    assert all(g is not None and g.isfinite().all() for g in found)
    if not method.startswith("fg"):  # the output layer's
        torch.testing.assert_close(found[-2:], true[-2:])


def test_another_sparsity_is_another_value() -> None:
    model, (x, _) = setting("coo", "argument")
    net = grapefx.compile(model, method="bp", backend="eager", capture="export")
    for seed in range(3):
        args = (x, adjacency("coo", seed))
        true = [g.clone() for g in gradients(model, model, args)]
        torch.testing.assert_close(gradients(model, net, args), true)
    args = (x, adjacency("csr"))  # another layout: another capture
    true = [g.clone() for g in gradients(model, model, args)]
    torch.testing.assert_close(gradients(model, net, args), true)


@pytest.mark.parametrize("where", ["argument", "buffer"])
def test_a_layout_that_torch_cannot_trace_is_named(where: str) -> None:
    model, args = setting("csc", where)
    net = grapefx.compile(model, method="dfa", calib_every=None, backend="eager", capture="export")
    name = "the buffer 'adj'" if where == "buffer" else "the argument 1"
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(InputError, match=f"{name}.*sparse_csc"):
            net(*args)


def test_sparse_features_and_the_tangent_of_their_product() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(NODES, 5, dtype=torch.float64))
            self.out = nn.Linear(5, 3).double()
            self.register_buffer("features", adjacency("csr"))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(torch.sparse.mm(self.features, self.w) + x))

    torch.manual_seed(0)
    model, args = Sparse(), (torch.randn(NODES, 5, dtype=torch.float64),)
    true = [g.clone() for g in gradients(model, model, args)]
    net = grapefx.compile(model, method="bp", backend="eager", capture="export")
    torch.testing.assert_close(gradients(model, net, args), true)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_inductor_leaves_sparse_graphs_uncompiled_and_says_so(layout: str) -> None:
    for where, name in (("argument", "tensor 2 of the arguments"), ("buffer", "'adj'")):
        model, args = setting(layout, where)
        true = [g.clone() for g in gradients(model, model, args)]
        net = grapefx.compile(
            model, method="grape", calib_every=1, parallel="horizontal", capture="export"
        )
        with pytest.warns(GrapefxWarning, match="sparse") as said:
            torch.testing.assert_close(gradients(model, net, args), true)
        assert sum("sparse" in str(w.message) for w in said) == 1
        assert name in next(str(w.message) for w in said if "sparse" in str(w.message))
        gradients(model, net, args)


@pytest.mark.parametrize("where", ["argument", "buffer"])
def test_dynamo_refuses_sparse_tensors_by_name(where: str) -> None:
    model, args = setting("coo", where)
    net = grapefx.compile(model, method="dfa", calib_every=None, backend="eager")
    with pytest.raises(InputError, match=rf"(?s){where}.*sparse.*capture='export'"):
        net(*args)
