"""PyTorch Lightning: its Trainer around a compiled net; checkpoints hold the learning state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import grapefx

lightning = pytest.importorskip("lightning", reason="needs lightning")

# Lightning notes what a test run lacks (workers, a logger)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Classifier(lightning.LightningModule):  # type: ignore[name-defined,misc]
    """The inner net is compiled; the module around it is Lightning's."""

    def __init__(self, backend: str = "eager") -> None:
        super().__init__()
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )
        self.net = grapefx.compile(body, method="grape", backend=backend)
        self.seen: list[float] = []

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.seen.append(float(loss))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)

    def on_train_epoch_start(self) -> None:
        self.net.set_epoch(self.current_epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["grapefx"] = self.net.feedback_state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.net.load_feedback_state_dict(checkpoint["grapefx"])


def data(shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), 16, shuffle)


def trainer(folder: Path, epochs: int, **options: Any) -> Any:
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def test_trains_saves_and_resumes(tmp_path: Path) -> None:
    whole = Classifier()
    trainer(tmp_path / "a", 6, enable_checkpointing=False).fit(whole, data(), data())
    assert whole.seen[-1] < 0.8 * whole.seen[0]
    assert whole.net.feedback_state_dict()["schedule"]["calibrations"] == 6

    first = Classifier()
    run = trainer(tmp_path / "b", 3)
    run.fit(first, data(), data())
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = Classifier()
    trainer(tmp_path / "c", 6, enable_checkpointing=False).fit(
        second, data(), data(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=False
    )
    assert second.seen == pytest.approx(whole.seen[12:])
    for k, v in whole.net.feedback.items():
        torch.testing.assert_close(v, second.net.feedback[k])
    for k, v in whole.state_dict().items():
        torch.testing.assert_close(v, second.state_dict()[k])


@pytest.mark.slow
def test_the_default_backend_and_a_callback(tmp_path: Path) -> None:
    class SetEpoch(lightning.Callback):  # type: ignore[name-defined,misc]
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            module.net.set_epoch(trainer.current_epoch)

    module = Classifier(backend="inductor")
    trainer(tmp_path, 4, enable_checkpointing=False, callbacks=[SetEpoch()]).fit(module, data())
    assert module.seen[-1] < module.seen[0]
