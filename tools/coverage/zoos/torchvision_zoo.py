"""torchvision: every classification, video and segmentation builder."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

from tools.coverage.zoos.sample import BATCH, CLASSES, SIDE, Builder, Sample, images

# its auxiliary classifier reads a map of 17 x 17, which takes this many pixels
SIDES = {"inception_v3": 299}


def torchvision() -> dict[str, Builder]:
    """Every classification, video and segmentation builder."""
    zoo = importlib.import_module("torchvision.models")
    parts = (zoo, zoo.video, zoo.segmentation)
    names = [n for part in parts for n in zoo.list_models(module=part)]
    return {n: lambda n=n: _torchvision(zoo, n) for n in names}  # type: ignore[misc]


def _torchvision(zoo: Any, name: str) -> Sample:
    builder = zoo.get_model_builder(name)
    family = builder.__module__.split(".")
    options: dict[str, Any] = {"weights": None, "num_classes": CLASSES}
    own = inspect.signature(builder).parameters
    options |= {"weights_backbone": None} if "weights_backbone" in own else {}
    options |= {"init_weights": False} if "inception" in name or "googlenet" in name else {}
    x = images(SIDES.get(name, SIDE))
    if "video" in family:
        x = torch.randn(BATCH, 3, 16, 32, 32)
        if name.startswith("mvit"):
            return Sample(_small_mvit(builder, options), (torch.randn(BATCH, 3, 8, 64, 64),))
        if name.startswith("swin"):
            x = torch.randn(BATCH, 3, 4, 64, 64)
        elif name == "s3d":  # it ends in a pooling of 2 x 7 x 7: the least that reaches it
            x = torch.randn(BATCH, 3, 13, 209, 209)
    elif "segmentation" in family:
        options["num_classes"] = 2
        x = images(32)
    elif name.startswith("vit"):
        options["image_size"] = 56 if name == "vit_h_14" else SIDE
    elif name == "maxvit_t":
        maxvit = importlib.import_module("torchvision.models.maxvit").MaxVit
        model = maxvit(
            input_size=(SIDE, SIDE), stem_channels=64, block_channels=[64, 128, 256, 512],
            block_layers=[2, 2, 5, 2], head_dim=32, stochastic_depth_prob=0.0, partition_size=2,
            num_classes=CLASSES,
        )  # fmt: skip
        return Sample(model, (x,), note="64 px, windows of 2")
    if name == "vit_h_14":
        x = images(56)
    model = builder(**options)
    return Sample(model, (x,))


def _small_mvit(builder: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    """For 8 frames of 64 x 64; the builders fix 16 of 224 x 224."""
    module = importlib.import_module(builder.__module__)
    make = module._mvit
    small = {"spatial_size": (64, 64), "temporal_size": 8}
    with mock.patch.object(module, "_mvit", lambda **given: make(**(given | small))):
        return builder(**options)
