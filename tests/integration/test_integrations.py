"""What the integrations share, and what they say where their framework is missing."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
import torch
from torch import nn

import grapefx
from grapefx.errors import OptionError, StateError
from grapefx.integrations import nets
from tests.zoo import compiled, make, train_step


@pytest.mark.parametrize(
    ("name", "package"),
    [("lightning", "lightning"), ("huggingface", "transformers"), ("accelerate", "accelerate")],
)
def test_a_missing_framework_is_named_with_its_extra(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"grapefx.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=rf"'{package}'(.|\n)*pip install 'grapefx\[{name}\]'"):
        importlib.import_module(f"grapefx.integrations.{name}")


def test_importing_grapefx_imports_no_framework() -> None:
    import subprocess

    code = (
        "import sys, grapefx, grapefx.integrations; "
        "print(sorted({m.partition('.')[0] for m in sys.modules} & "
        "{'lightning', 'transformers', 'accelerate', 'tensorboard', 'rich', 'jinja2'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nets_are_found_by_path_once() -> None:
    net, (x,) = compiled(make("mlp")[0], "dfa"), make("mlp")[1]
    shared = nn.ModuleDict({"a": net, "b": net, "c": nn.Linear(2, 2)})
    assert nets.nets_in(shared) == {"a": net}
    assert nets.nets_in(net) == {"": net}
    inner = grapefx.compile(nn.Linear(3, 3), inplace=True, backend="eager")
    found = nets.nets_in(nn.ModuleList([nn.ReLU(), inner]))
    assert found == {"1": inner.grapefx}
    with pytest.raises(OptionError, match="nothing in this Linear"):
        nets.nets_in(nn.Linear(2, 2))
    train_step(net, (x,))
    values = nets.measured({"": net})
    assert values["grapefx/calibrations"] == 1 and values["grapefx/skipped_updates"] == 0
    by_layer = [c["cos_gradient"] for c in net.alignment().values()]
    assert values["grapefx/cos_gradient/mean"] == pytest.approx(sum(by_layer) / len(by_layer))


def test_keys_hold_what_every_tracker_takes() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a+b@", nn.Linear(4, 8))
            self.out = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(getattr(self, "a+b@")(x)))

    net = grapefx.compile(Odd(), backend="eager")
    train_step(net, (torch.randn(4, 4),))
    keys = nets.measured({"enc": net})
    assert "grapefx/enc/cos_gradient/a_b_" in keys
    assert all(re.fullmatch(r"[\w\-. :/]+", key) for key in keys)


def test_states_go_to_the_net_that_they_are_of() -> None:
    first, second = compiled(make("mlp")[0], "dfa"), compiled(make("mlp")[0], "dfa")
    args = make("mlp")[1]
    for net in (first, second):
        train_step(net, args)
    state = nets.learning_state({"a": first, "b": second})
    with pytest.raises(StateError, match=r"\['a', 'b'\], the model has nets at \['a'\]"):
        nets.restore({"a": first}, state)
