"""The data sets of a config: whole, as tensors on the device, with a score of a model on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.common.data import DataError, load_images, load_text
from tools.common.networks import IMAGE_MODELS, Transformer
from tools.common.train import Batch
from tools.reproduce.config import IMAGES


class Images:
    """A whole image set as normalised tensors on the device."""

    def __init__(self, setting: dict[str, Any], data_dir: str | None, device: str) -> None:
        data = load_images(setting["dataset"], data_dir).head(setting["train"], setting["test"])
        for part, y in (("train", data.train_y), ("test", data.test_y)):
            if len(y) != setting[part]:
                raise DataError(f"{data.name} has {len(y)} {part} images, not {setting[part]}")
        half = (0.5,) * len(data.mean)
        zero, one = (0.0,) * len(data.mean), (1.0,) * len(data.mean)
        constants = {"half": (half, half), "none": (zero, one), "standard": (data.mean, data.std)}
        mean, std = (torch.tensor(c).view(1, -1, 1, 1) for c in constants[setting["normalise"]])
        self.name, self.classes = data.name, data.classes
        self.train_x, self.test_x = (
            ((x.float() / 255 - mean) / std).to(device) for x in (data.train_x, data.test_x)
        )
        self.train_y, self.test_y = data.train_y.to(device), data.test_y.to(device)
        self.samples = len(self.train_y)

    def model(self, spec: dict[str, Any]) -> nn.Module:
        builder, _ = IMAGE_MODELS[spec["kind"]]
        own = {k: v for k, v in spec.items() if k != "kind"}
        return builder(shape=tuple(self.train_x.shape[1:]), classes=self.classes, **own)

    def batch(self, index: Tensor) -> Batch:
        return self.train_x[index], self.train_y[index]

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Test accuracy in percent."""
        batches = zip(self.test_x.split(2000), self.test_y.split(2000), strict=True)
        right = sum((model(x).argmax(1) == y).sum() for x, y in batches)
        return 100 * float(right) / len(self.test_y)


class Text:
    """Characters; a sample is a window of ``context`` of them, the first 90 % are for training."""

    def __init__(self, setting: dict[str, Any], data_dir: str | None, device: str) -> None:
        path = None if data_dir is None else Path(data_dir) / "tinyshakespeare" / "input.txt"
        text = load_text(path)
        number = {c: i for i, c in enumerate(sorted(set(text)))}
        codes = torch.tensor([number[c] for c in text], device=device)
        split = int(0.9 * len(codes))
        self.name, self.classes = "tiny-shakespeare (characters)", len(number)
        self.train, self.valid = codes[:split], codes[split:]
        self.window = torch.arange(setting["model"]["context"] + 1, device=device)
        self.samples = min(setting["train"], split // (len(self.window) - 1) - 1)
        self.test = min(setting["test"], len(self.valid) // (len(self.window) - 1) - 1)

    def model(self, spec: dict[str, Any]) -> nn.Module:
        return Transformer(self.classes, **{k: v for k, v in spec.items() if k != "kind"})

    def _windows(self, codes: Tensor, index: Tensor) -> Batch:
        rows = codes[index[:, None] * (len(self.window) - 1) + self.window]
        return rows[:, :-1], rows[:, 1:]

    def batch(self, index: Tensor) -> Batch:
        return self._windows(self.train, index)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Perplexity a character on the last 10 %."""
        losses, index = [], torch.arange(self.test, device=self.valid.device)
        for part in index.split(256):
            x, y = self._windows(self.valid, part)
            losses.append(F.cross_entropy(model(x).flatten(0, 1), y.flatten()) * len(part))
        return float((torch.stack(losses).sum() / self.test).exp())


Data = Images | Text


def load_data(setting: dict[str, Any], data_dir: str | None, device: str) -> Data:
    """The data set that a config names."""
    kind = Images if setting["dataset"] in IMAGES else Text
    return kind(setting, data_dir, device)
