"""What a linear map of the error can give (``tools/explained.py``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tools.common.networks import Transformer
from tools.explained import explained, gradients, patched, r_squared


def test_a_linear_relation_is_explained_and_noise_is_not() -> None:
    torch.manual_seed(0)
    e = torch.randn(400, 5)
    assert r_squared([e], e @ torch.randn(5, 7)) > 0.999
    assert r_squared([e], torch.randn(400, 7)) < 0.05


def test_shares_of_a_transformer() -> None:
    torch.manual_seed(0)
    model = Transformer(vocab=5, context=6, dim=8, heads=2, depth=3, hidden=16, dropout=0.0)
    x, y = torch.randint(5, (2, 200, 6))
    found = list(explained(model, x, y))
    assert [name for name, *_ in found] == ["blocks.0", "blocks.1"]
    for _, own, *more in found:
        assert all(own - 0.05 < share <= 1 for share in (own, *more))


def test_what_is_cut_passes_no_gradient() -> None:
    torch.manual_seed(0)
    model = Transformer(vocab=5, context=6, dim=8, heads=2, depth=2, hidden=16, dropout=0.0)
    x, y = torch.randint(5, (2, 3, 6))
    names = ["blocks.0", "blocks.1"]
    whole = gradients(model, names, x, y, {})
    for cut in ("branches", "weights"):
        with patched(model, cut):
            part = gradients(model, names, x, y, {})
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert ("blocks.1.qkv.weight" in moved) == (cut == "weights")
        assert not torch.allclose(part[1], whole[1])  # behind one block
        assert torch.allclose(part[2], whole[2])  # behind the last one: the same values
        model.zero_grad()
