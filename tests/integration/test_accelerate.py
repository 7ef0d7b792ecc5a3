"""accelerate: the helper of the integrations in a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import grapefx
from grapefx.errors import OptionError

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

from grapefx.integrations.accelerate import Feedback  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """An Accelerator is one a process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


class Loop:
    """A loop as accelerate's documentation writes it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, project_dir=str(folder), **options)
        self.net = grapefx.compile(body(), method="grape", backend="eager", calib_every=1)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 8, generator=generator)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        optimizer = torch.optim.Adam(self.net.parameters(), 1e-2)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            self.net, optimizer, DataLoader(TensorDataset(x, y), 16)
        )
        self.feedback = Feedback(self.accelerator, self.model)
        self.losses: list[float] = []
        self.step = 0

    def epoch(self, number: int) -> None:
        self.feedback.set_epoch(number)
        for x, y in self.loader:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.losses.append(float(loss))
            self.step += 1
        self.feedback.log(self.step)


def test_resumes_where_it_was(tmp_path: Path) -> None:
    whole = Loop(tmp_path)
    for e in range(4):
        if e == 2:
            whole.accelerator.save_state(str(tmp_path / "half"))
        whole.epoch(e)
    assert whole.losses[-1] < whole.losses[0] and whole.net.calibrations == 4
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    second = Loop(tmp_path)
    second.accelerator.load_state(str(tmp_path / "half"))
    for e in range(2, 4):
        second.epoch(e)
    assert second.losses == pytest.approx(whole.losses[8:])
    assert second.net.calibrations == 4
    for k, v in whole.net.feedback.items():
        torch.testing.assert_close(v, second.net.feedback[k])


def test_trackers_get_the_alignment(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loop = Loop(tmp_path, log_with="tensorboard")
    loop.accelerator.init_trackers("run")
    for e in range(2):
        loop.epoch(e)
    loop.accelerator.end_training()
    found: dict[str, list[tuple[int, float]]] = {}
    for file in tmp_path.rglob("events*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [(s.step, s.value) for s in events.Scalars(tag)]
    for layer, cosines in loop.net.alignment().items():
        for kind, value in cosines.items():
            step, seen = found[f"grapefx/{kind}/{layer}"][-1]
            assert step == 8 and seen == pytest.approx(value, abs=1e-6)


def test_a_model_without_a_net_is_refused() -> None:
    with pytest.raises(OptionError, match="nothing in this Linear was compiled"):
        Feedback(accelerate.Accelerator(cpu=True), nn.Linear(2, 2))
