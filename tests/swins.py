"""Tiny Swins: timm registers none, so the tests do. Import this module and ``load_backbone`` knows them by name."""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer, _create_swin_transformer

SWINS = ("test_swin", "test_swin2")
"""Windows that divide every map; windows of which none does, so that padding, shift and mask meet."""
ON_SWIN = ("sa2vp", "vpt-shallow", "vpt-deep", "linear", "full", "dam-vp")
"""Methods that drive a Swin; a test holds all others to a refusal by name."""

_TINY = {"img_size": 64, "embed_dim": 16, "num_heads": (1, 2, 4, 8), "depths": (2, 1, 3, 1)}
_CONFIG = {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "classifier": "head.fc"}


def _tiny(name: str, window_size: int, pretrained: bool, given: dict[str, Any]) -> SwinTransformer:
    settings = {**_TINY, "window_size": window_size, **given}
    settings["pretrained_cfg"] = given.get("pretrained_cfg") or _CONFIG
    return _create_swin_transformer(name, pretrained=pretrained, **settings)


def test_swin(pretrained: bool, **given: Any) -> SwinTransformer:
    return _tiny("test_swin", 2, pretrained, given)


def test_swin2(pretrained: bool, **given: Any) -> SwinTransformer:
    return _tiny("test_swin2", 3, pretrained, given)


for _model in (test_swin, test_swin2):
    _model.__module__ = "timm.models.swin_transformer"  # timm keeps models by module
    register_model(_model)
