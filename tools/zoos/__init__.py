"""The architectures that ``coverage.py`` measures: small inputs, random weights, no download."""

from __future__ import annotations

from collections.abc import Callable

from zoos.own import other
from zoos.sample import BATCH, Builder, Sample, cut
from zoos.timm_zoo import timm
from zoos.torchvision_zoo import torchvision
from zoos.transformers_zoo import transformers

__all__ = ["BATCH", "ZOOS", "Sample", "cut"]

ZOOS: dict[str, Callable[[], dict[str, Builder]]] = {
    "torchvision": torchvision,
    "timm": timm,
    "transformers": transformers,
    "other": other,
}
