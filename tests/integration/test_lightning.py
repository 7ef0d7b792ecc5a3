"""PyTorch Lightning: its Trainer around a compiled net, with the callback of the integrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import grapefx
from grapefx.errors import GrapefxWarning, OptionError, StateError

lightning = pytest.importorskip("lightning", reason="needs lightning")

from grapefx.integrations.lightning import FeedbackCallback  # noqa: E402

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
        self.net = grapefx.compile(body, method="grape", backend=backend, calib_every=1)
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


def data(shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), 16, shuffle)


def trainer(folder: Path, epochs: int, **options: Any) -> Any:
    settings = {"logger": False, "callbacks": [FeedbackCallback()], **options}
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, log_every_n_steps=2, **settings,
    )  # fmt: skip


def test_trains_saves_and_resumes(tmp_path: Path) -> None:
    whole = Classifier()
    trainer(tmp_path / "a", 6, enable_checkpointing=False).fit(whole, data(), data())
    assert whole.seen[-1] < 0.8 * whole.seen[0]
    assert whole.net.calibrations == 6

    first = Classifier()
    run = trainer(tmp_path / "b", 3)
    run.fit(first, data(), data())
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = Classifier()
    trainer(tmp_path / "c", 6, enable_checkpointing=False).fit(
        second, data(), data(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True
    )
    assert second.seen == pytest.approx(whole.seen[12:])
    for k, v in whole.net.feedback.items():
        torch.testing.assert_close(v, second.net.feedback[k])
    for k, v in whole.state_dict().items():
        torch.testing.assert_close(v, second.state_dict()[k])


def test_loggers_and_monitors_get_the_alignment(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run")
    module = Classifier()
    run = trainer(tmp_path, 3, logger=logger, enable_checkpointing=False)
    run.fit(module, data())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    alignment = module.net.alignment()
    assert set(alignment) == {"0", "2"}
    for layer, cosines in alignment.items():
        for kind, value in cosines.items():
            seen = scalars[f"grapefx/net/{kind}/{layer}"]
            assert [s.step for s in seen] == [2, 4, 6, 8, 10, 12]
            assert seen[-1].value == pytest.approx(value, abs=1e-6)
    assert [s.value for s in scalars["grapefx/net/calibrations"]] == [1, 1, 2, 2, 3, 3]
    monitored = run.callback_metrics["grapefx/net/cos_gradient/mean"]
    cosines = [c["cos_gradient"] for c in alignment.values()]
    assert float(monitored) == pytest.approx(sum(cosines) / 2, abs=1e-6)


def test_mlflow_gets_the_alignment(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    uri = f"sqlite:///{tmp_path}/runs.db"
    logger = MLFlowLogger("run", tracking_uri=uri, artifact_location=str(tmp_path))
    module = Classifier()
    trainer(tmp_path, 3, logger=logger, enable_checkpointing=False).fit(module, data())
    client = mlflow.tracking.MlflowClient(uri)
    seen = client.get_metric_history(logger.run_id, "grapefx/net/calibrations")
    assert [m.value for m in seen] == [1, 1, 2, 2, 3, 3]
    for layer, cosines in module.net.alignment().items():
        for kind, value in cosines.items():
            last = client.get_metric_history(logger.run_id, f"grapefx/net/{kind}/{layer}")[-1]
            assert last.value == pytest.approx(value, abs=1e-6)


def test_weights_and_biases_gets_the_alignment(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger("run", save_dir=tmp_path, offline=True)
    module = Classifier()
    trainer(tmp_path, 3, logger=logger, enable_checkpointing=False).fit(module, data())
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["grapefx/net/calibrations"] == 3
    for layer, cosines in module.net.alignment().items():
        for kind, value in cosines.items():
            assert summary[f"grapefx/net/{kind}/{layer}"] == pytest.approx(value, abs=1e-6)


def test_a_module_without_a_net_is_refused(tmp_path: Path) -> None:
    module = Classifier()
    module.net = nn.Linear(8, 3)  # type: ignore[assignment]
    with pytest.raises(OptionError, match="nothing in this Classifier was compiled"):
        trainer(tmp_path, 1).fit(module, data())


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    """One without a learning state is taken with a warning, one of other nets is refused."""
    run = trainer(tmp_path / "a", 1, callbacks=[])
    run.fit(Classifier(), data())
    run.save_checkpoint(tmp_path / "without.ckpt")
    with pytest.warns(GrapefxWarning, match="no learning state"):
        trainer(tmp_path / "b", 2).fit(
            Classifier(), data(), ckpt_path=str(tmp_path / "without.ckpt"), weights_only=True
        )
    run = trainer(tmp_path / "c", 1)
    run.fit(Classifier(), data())
    run.save_checkpoint(tmp_path / "other.ckpt")
    saved = torch.load(tmp_path / "other.ckpt", weights_only=True)
    saved["grapefx"]["elsewhere"] = saved["grapefx"].pop("net")
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(StateError, match="elsewhere"):
        trainer(tmp_path / "d", 2).fit(
            Classifier(), data(), ckpt_path=str(tmp_path / "other.ckpt"), weights_only=True
        )


@pytest.mark.slow
def test_the_default_backend(tmp_path: Path) -> None:
    module = Classifier(backend="inductor")
    trainer(tmp_path, 4, enable_checkpointing=False).fit(module, data())
    assert module.seen[-1] < module.seen[0]
