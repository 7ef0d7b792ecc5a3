"""Each tangent rule against torch's own derivatives, on torch's own samples, operator by operator.

``GRAPEFX_ALL_SAMPLES=1`` takes every sample; otherwise a few of each operator's first ones.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.fx import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from grapefx.errors import TangentError
from grapefx.passes.differentiate.rules import kind, rules, rules_table
from grapefx.torch_compat import pytree
from tests.passes.tangent_oracle import differentiate, is_float, tensors_of, trace

try:
    from torch.testing._internal.common_methods_invocations import op_db
except Exception as error:  # the samples are not a public part of torch
    pytest.skip(f"torch's operator samples cannot be imported: {error}", allow_module_level=True)

aten = torch.ops.aten
ALL = os.environ.get("GRAPEFX_ALL_SAMPLES") == "1"
SEED = 42  # torch's samples of random operators seed with this one

# torch cannot trace them: sparse values, or shapes and branches that depend on values
UNTRACED = {
    "sparse.sampled_addmm", "sparse.mm.reduce", "corrcoef", "cov", "nn.functional.ctc_loss",
    "nn.functional.gaussian_nll_loss", "linalg.lstsq", "linalg.lstsq.grad_oriented",
    "as_strided.partial_views",  # views that lie outside of the tensor: its copies have less memory
}  # fmt: skip
# no forward derivative: refused by name
REFUSED = {
    "index_reduce.prod", "scatter_reduce.prod", "_segment_reduce.lengths",
    "_segment_reduce.offsets", "nn.functional.linear_cross_entropy.chunked_none", "to_sparse",
}  # fmt: skip
# results 1, 2, ... are statistics for the backward: nothing in a forward graph reads them
FIRST_ONLY = ("native_", "norm_legit", "_batch_norm", "scaled_dot_product")


def name_of(op: Any) -> str:
    """The operator's name with its variant."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


OPS = {
    name_of(op): op
    for op in op_db
    if op.supports_autograd and torch.float64 in op.supported_dtypes("cpu")
}


class Sample:
    """One call of an operator: a function of its tensors, some of which get tangents."""

    def __init__(self, op: Any, sample: Any, index: int) -> None:
        leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        self.tensors = [x.detach().clone() for x in tensors]
        self.which = [i for i, x in enumerate(tensors) if x.requires_grad]
        generator = torch.Generator().manual_seed(index)
        self.tangents = [
            torch.randn(tensors[i].shape, generator=generator, dtype=tensors[i].dtype)
            for i in self.which
        ]

        def fn(tensors: Sequence[Tensor]) -> Any:
            it = iter(tensors)
            args, kwargs = pytree.tree_unflatten(
                [next(it) if isinstance(x, Tensor) else x for x in leaves], spec
            )
            return sample.output_process_fn_grad(op.op(*args, **kwargs))

        self.fn: Callable[[Sequence[Tensor]], Any] = fn

    def replaced(self, new: Sequence[Tensor]) -> list[Tensor]:
        """The inputs with those that get tangents replaced."""
        out = [x.clone() for x in self.tensors]
        for i, x in zip(self.which, new, strict=True):
            out[i] = x
        return out


def samples(op: Any, every: bool = ALL) -> list[Sample]:
    """The operator's samples that have something to differentiate: all, or a few."""
    found = op.sample_inputs("cpu", torch.float64, requires_grad=True)
    found = list(found if every else itertools.islice(found, 12))
    made = [Sample(op, s, i) for i, s in enumerate(found)]
    made = [s for s in made if s.which and all(t.numel() for t in s.tensors)]
    if every:
        return made
    # what torch derives for us (linear algebra) is slow to trace: one sample
    first = () if op.name.startswith(("linalg.", "lu", "svd", "ormqr", "pca")) else made[:1]
    return list({id(s): s for s in (*first, *made[-1:])}.values())


def forward_ad(sample: Sample) -> list[Any]:
    """torch's forward AD."""
    with fwAD.dual_level(), torch.no_grad():
        pairs = zip(sample.which, sample.tangents, strict=True)
        duals = [fwAD.make_dual(sample.tensors[i].clone(), t) for i, t in pairs]
        outs = tensors_of(sample.fn(sample.replaced(duals)))
        return [fwAD.unpack_dual(o).tangent if is_float(o) else None for o in outs]


def backward_twice(sample: Sample) -> list[Any]:
    """``J t = d/du <J^T u, t>``."""
    leaves = [sample.tensors[i].clone().requires_grad_() for i in sample.which]
    made: list[Any] = []
    for o in tensors_of(sample.fn(sample.replaced(leaves))):
        if not is_float(o) or not o.requires_grad:
            made.append(None)
            continue
        u = torch.zeros_like(o).requires_grad_()
        grads = torch.autograd.grad(
            o, leaves, u, create_graph=True, allow_unused=True, retain_graph=True
        )
        pairs = [
            (g, t)
            for g, t in zip(grads, sample.tangents, strict=True)
            if g is not None and g.requires_grad
        ]
        if not pairs:
            made.append(None)
            continue
        gs, ts = zip(*pairs, strict=True)
        made += torch.autograd.grad(gs, u, ts, retain_graph=True)
    return made


def differences(sample: Sample) -> list[Any]:
    """Central differences, for what torch cannot differentiate twice."""
    step = 1e-6

    def at(h: float) -> list[Tensor]:
        torch.manual_seed(SEED)
        pairs = zip(sample.which, sample.tangents, strict=True)
        with torch.no_grad():
            moved = [sample.tensors[i] + h * t for i, t in pairs]
            return tensors_of(sample.fn(sample.replaced(moved)))

    pairs = zip(at(step), at(-step), strict=True)
    return [(a - b) / (2 * step) if is_float(a) else None for a, b in pairs]


def reference(op: Any, sample: Sample) -> list[Any]:
    """The first of torch's derivatives that works."""
    ways = [forward_ad, backward_twice, differences]
    if not op.supports_forward_ad:
        ways = [backward_twice, forward_ad, differences]
    for way in ways:
        torch.manual_seed(SEED)
        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has neither
                return way(sample)
        except Exception as e:
            failure = e
    raise failure


def check(op: Any, sample: Sample) -> dict[str, str]:
    """Every float result's tangent equals torch's derivative; returns the kind of each operator."""
    step, constants = trace(sample.fn, sample.tensors, sample.which)
    used = {n.target for n in step.gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    derived = differentiate(step, sample.which)
    kinds = {str(u): kind(u) for u in used if kind(u) != "derived" or str(u) in derived}
    wanted = reference(op, sample)
    torch.manual_seed(SEED)
    with torch.no_grad():
        found = step.gm(*[t.clone() for t in sample.tensors], *constants, *sample.tangents)
    count = len(found) // 2
    for i, (value, tangent, want) in enumerate(
        zip(found[:count], found[count:], wanted, strict=True)
    ):
        if not is_float(value) or (i and any(s in op.name for s in FIRST_ONLY)):
            continue
        tangent = torch.zeros_like(value) if tangent is None else tangent
        want = torch.zeros_like(value) if want is None else want.to(value.dtype)
        assert tangent.shape == value.shape, (i, tangent.shape, value.shape)
        assert tangent.dtype == value.dtype, (i, tangent.dtype, value.dtype)
        # behind a value of -inf (all masked) torch's forward AD is nan, its gradient and ours zero
        known = value.isfinite() | ~want.isnan()
        torch.testing.assert_close(
            tangent[known], want.expand(value.shape)[known], rtol=1e-6, atol=1e-8, equal_nan=True
        )
    return kinds


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(OPS) - UNTRACED - REFUSED))
def test_tangent_equals_torch(name: str) -> None:
    op = OPS[name]
    for sample in samples(op):
        check(op, sample)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(REFUSED & set(OPS)))
def test_what_has_no_derivative_is_refused_by_name(name: str) -> None:
    sample = samples(OPS[name])[0]
    step, _ = trace(sample.fn, sample.tensors, sample.which)
    with pytest.raises(TangentError, match=r"has no forward derivative[\s\S]*remedy"):
        differentiate(step, sample.which)


def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle can fail: softmax without its backward's mean term is not softmax's tangent."""

    def wrong(em: Any, node: Node) -> Any:
        return em.call(aten.mul.Tensor, em.t(node.args[0]), em.p(node))

    monkeypatch.setitem(rules(), aten._softmax.default, wrong)
    op = OPS["softmax"]
    with pytest.raises(AssertionError, match="not close"):
        for sample in samples(op):
            check(op, sample)


def test_what_torch_derives_is_reported() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = samples(OPS["linalg.eigh"])[0]
        step, _ = trace(sample.fn, sample.tensors, sample.which)
        assert differentiate(step, sample.which) == ["aten._linalg_eigh.default"]


def test_the_table_of_rules() -> None:
    table = rules_table()
    assert set(table.values()) == {"rule", "pointwise"}
    assert table["aten.native_layer_norm.default"] == "rule"
    assert table["aten.erf.default"] == "pointwise"
    assert kind(aten._linalg_eigh.default) == "derived"
