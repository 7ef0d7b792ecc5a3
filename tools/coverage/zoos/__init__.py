"""The architectures that ``tools.coverage`` measures: small inputs, random weights, no download."""

from __future__ import annotations

from collections.abc import Callable

from tools.coverage.zoos.own import other
from tools.coverage.zoos.sample import BATCH, Builder, Sample, cut
from tools.coverage.zoos.timm_zoo import timm
from tools.coverage.zoos.torchvision_zoo import torchvision
from tools.coverage.zoos.transformers_zoo import transformers

__all__ = ["BATCH", "ZOOS", "Sample", "cut"]

ZOOS: dict[str, Callable[[], dict[str, Builder]]] = {
    "torchvision": torchvision,
    "timm": timm,
    "transformers": transformers,
    "other": other,
}
