"""A pipeline of one process: what a stage says, and what is chosen for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import grapefx
from grapefx.errors import GrapefxWarning, OptionError
from tests.zoo import MLP

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def step(net: Any) -> None:
    net.step(torch.randn(4, 8), target=torch.tensor([0, 1, 2, 0]), loss=F.cross_entropy)


def test_epochs_that_nobody_announces_are_told_once(
    group: Any, recwarn: pytest.WarningsRecorder
) -> None:
    net = grapefx.compile(MLP(), method="dfa", backend="eager", calib_every=1, pipeline=group)
    with pytest.warns(GrapefxWarning, match="set_epoch"):
        step(net)
    recwarn.clear()
    step(net)
    announced = grapefx.compile(MLP(), method="dfa", backend="eager", calib_every=1, pipeline=group)
    announced.set_epoch(0)
    step(announced)
    assert not [w for w in recwarn if "set_epoch" in str(w.message)]


def test_a_pipeline_gets_what_is_recommended(group: Any) -> None:
    net = grapefx.compile(MLP(), method="dfa", backend="eager", pipeline=group)
    assert net._trainer._options.calib_every == "geometric"
    step(net)


@pytest.mark.parametrize("option", [{"calib_update": "sgd"}, {"calib_refit": "feedback"}])
def test_what_stages_refuse_has_a_remedy(group: Any, option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="remedy"):
        grapefx.compile(MLP(), method="dfa", pipeline=group, **option)
