"""Frozen vision backbones: timm models, wrapped and never forked."""

from prompttune.backbones.base import Backbone
from prompttune.backbones.conv import ConvBackbone
from prompttune.backbones.eva import EvaBackbone
from prompttune.backbones.loading import load_backbone, register_backbone
from prompttune.backbones.plain import PlainBackbone
from prompttune.backbones.swin import SwinBackbone
from prompttune.backbones.swinv2 import SwinV2Backbone
from prompttune.backbones.vit import VitBackbone

__all__ = [
    "Backbone",
    "ConvBackbone",
    "EvaBackbone",
    "PlainBackbone",
    "SwinBackbone",
    "SwinV2Backbone",
    "VitBackbone",
    "load_backbone",
    "register_backbone",
]
