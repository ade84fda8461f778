"""Tiny convolutional models: timm's own meet in a single block. Import this module and ``load_backbone`` knows them."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.convnext import ConvNeXt, _create_convnext
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, _create_resnet

from tests.plains import OVER_MODULES

CONVS = ("test_resnet3", "test_convnext4")
"""Batch norms and both kinds of block; layer norms, LayerScale and a norm behind the pooling."""
ON_CONV = ("sa2vp", "dam-vp", "linear", "full", "vpt-shallow", *OVER_MODULES)
"""Methods that drive convolutions; a test holds all others to a refusal by name."""

_CONFIG = {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def test_resnet3(pretrained: bool, **given: Any) -> ResNet:
    settings = {
        "block": [BasicBlock, BasicBlock, Bottleneck, BasicBlock],
        "layers": (1, 2, 3, 1),
        "channels": (16, 16, 24, 32),
        "stem_width": 8,
        "stem_type": "deep",
        "avg_down": True,
    }
    given["pretrained_cfg"] = given.get("pretrained_cfg") or _CONFIG | {"first_conv": "conv1.0", "classifier": "fc"}
    return _create_resnet("test_resnet3", pretrained, **{**settings, **given})


def test_convnext4(pretrained: bool, **given: Any) -> ConvNeXt:
    settings = {"depths": (1, 2, 3, 1), "dims": (16, 24, 96, 32), "kernel_sizes": (7, 5, 5, 3)}
    given["pretrained_cfg"] = given.get("pretrained_cfg") or _CONFIG | {"first_conv": "stem.0", "classifier": "head.fc"}
    return _create_convnext("test_convnext4", pretrained, **{**settings, **given})


for _model, _module in ((test_resnet3, "resnet"), (test_convnext4, "convnext")):
    _model.__module__ = f"timm.models.{_module}"  # timm keeps models by module
    register_model(_model)
