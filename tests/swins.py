"""Tiny Swins: timm registers none, so the tests do. Import this module and ``load_backbone`` knows them by name."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.models import register_model
from timm.models.swin_transformer import SwinTransformer, _create_swin_transformer
from timm.models.swin_transformer_v2 import SwinTransformerV2, _create_swin_transformer_v2
from torch import Tensor, nn

from prompttune.backbones import SwinBackbone, SwinV2Backbone
from tests.plains import OVER_MODULES

SWINS = ("test_swin", "test_swin2", "test_swinv2")
"""Windows that divide every map; windows of which none does, so that padding, shift and mask meet; these on Swin v2."""
ON_SWIN = ("sa2vp", "vpt-shallow", "vpt-deep", "linear", "full", "dam-vp", *OVER_MODULES)
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


def test_swinv2(pretrained: bool, **given: Any) -> SwinTransformerV2:
    config = given.pop("pretrained_cfg", None) or _CONFIG
    return _create_swin_transformer_v2(
        "test_swinv2", pretrained, pretrained_cfg=config, **{**_TINY, "window_size": 3, **given}
    )


for _model, _module in ((test_swin, ""), (test_swin2, ""), (test_swinv2, "_v2")):
    _model.__module__ = f"timm.models.swin_transformer{_module}"  # timm keeps models by module
    register_model(_model)


def _follow(module: nn.Module, after: Callable[[Tensor], Tensor]) -> None:
    module.register_forward_hook(lambda _module, _args, output: after(output))


def _compare_directions(attention: nn.Module, theirs: nn.Module) -> None:
    """Make Swin v1's attention that of Swin v2: section 3.3 of https://arxiv.org/abs/2111.09883."""

    def directions(projected: Tensor) -> Tensor:
        q, k, v = projected.unflatten(-1, (3, theirs.num_heads, -1)).unbind(-3)  # [..., H, d] each
        q, k = q / q.norm(dim=-1, keepdim=True).clamp(min=1e-12), k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        q = q * theirs.logit_scale.clamp(max=math.log(100)).exp().flatten()[:, None] / attention.scale
        return torch.stack((q, k, v), dim=-3).flatten(-3)

    def bias() -> Tensor:
        sides = torch.tensor(theirs.window_size)
        places = torch.cartesian_prod(*(torch.arange(side) for side in sides))
        offsets = (places[:, None] - places[None]) / (sides - 1).clamp(min=1) * 8  # [A, A, 2]
        spaced = offsets.sign() * (offsets.abs() + 1).log2() / 3
        return 16 * theirs.cpb_mlp(spaced).sigmoid().permute(2, 0, 1)[None]  # [1, H, A, A]

    attention.qkv.weight = theirs.qkv.weight
    attention.qkv.bias.data = torch.cat((theirs.q_bias, torch.zeros_like(theirs.q_bias), theirs.v_bias)).detach()
    _follow(attention.qkv, directions)
    attention.proj, attention._get_rel_pos_bias = theirs.proj, bias


@functools.cache
def as_v1(backbone: SwinBackbone) -> SwinBackbone:
    """A Swin v2 as timm's Swin v1 with what differs hooked on, for comparison; a Swin v1 itself."""
    if not isinstance(backbone, SwinV2Backbone):
        return backbone
    model = copy.deepcopy(backbone.model)
    stages = [(layer, len(layer.blocks), layer.blocks[0].num_heads) for layer in model.layers]
    swin = SwinTransformer(
        img_size=backbone.image_size,
        window_size=model._ref_window_sizes,
        embed_dim=model.embed_dim,
        depths=[depth for _, depth, _ in stages],
        num_heads=[heads for _, _, heads in stages],
        num_classes=0,
    ).eval()
    swin.patch_embed, swin.norm = model.patch_embed, model.norm
    for (layer, _, _), own in zip(stages, swin.layers, strict=True):
        if not isinstance(layer.downsample, nn.Identity):
            own.downsample.reduction, own.downsample.norm = layer.downsample.reduction, nn.Identity()
            _follow(own.downsample.reduction, layer.downsample.norm)
        for theirs, block in zip(layer.blocks, own.blocks, strict=True):
            block.norm1, block.norm2, block.mlp = nn.Identity(), nn.Identity(), theirs.mlp
            _follow(block.mlp, theirs.norm2)
            _compare_directions(block.attn, theirs.attn)
            _follow(block.attn.proj, theirs.norm1)
    made = SwinBackbone(swin)
    for name in ("name", "fingerprint", "mean", "std", "interpolation"):
        setattr(made, name, getattr(backbone, name))
    return made
