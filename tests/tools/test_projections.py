"""The forms of a projection give the same gradients."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from grapefx.torch_compat import pytree
from tools.bench import projections


def test_the_forms_agree(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(torch, "compile", lambda f, **_: f):
        first, *others = (call() for call in projections.forms(3, 6).values())
        assert projections.main(["--networks", "2x4", "--rounds", "2"]) == 0
    for other in others:
        for a, b in zip(pytree.tree_leaves(first), pytree.tree_leaves(other), strict=True):
            torch.testing.assert_close(a, b)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[2].endswith("| 1.00 |")


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["--networks", "2by4"], "such as 8x1024"), (["--networks", "0x4"], "such as 8x1024"),
     (["--rounds", "0"], "1 or more")],
)  # fmt: skip
def test_bad_arguments(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        projections.main(argv)
    assert said in capsys.readouterr().err
