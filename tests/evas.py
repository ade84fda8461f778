"""Tiny Evas: timm registers none, so the tests do. Import this module and ``load_backbone`` knows them by name."""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.models import register_model
from timm.models.eva import Eva, _create_eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prompttune.backbones import EvaBackbone, VitBackbone

EVAS = ("test_eva", "test_eva2")
"""Joint q, k, v and half rotation, as in DINOv3; separate ones, inner norms and a rotation for every block and head."""

_TINY = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 6, "num_heads": 2, "mlp_ratio": 2}
_TINY |= {"use_rot_pos_emb": True, "dynamic_img_size": True}
_CONFIG = {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "classifier": "head"}
_CONFIG |= {"first_conv": "patch_embed.proj"}
_OWN: dict[str, dict[str, Any]] = {
    "test_eva": {"rope_type": "dinov3", "rope_rotate_half": True, "use_abs_pos_emb": False, "global_pool": "token"}
    | {"num_reg_tokens": 1, "init_values": 1e-5, "rope_temperature": 100.0},
    "test_eva2": {"depth": 3, "rope_type": "mixed", "no_embed_class": True, "qkv_fused": False, "scale_mlp": True}
    | {"scale_attn_inner": True},
}


def _tiny(name: str, pretrained: bool, given: dict[str, Any]) -> Eva:
    config = given.pop("pretrained_cfg", None) or _CONFIG
    return _create_eva(name, pretrained, pretrained_cfg=config, **{**_TINY, **_OWN[name], **given})


def test_eva(pretrained: bool, **given: Any) -> Eva:
    return _tiny("test_eva", pretrained, given)


def test_eva2(pretrained: bool, **given: Any) -> Eva:
    return _tiny("test_eva2", pretrained, given)


for _model in (test_eva, test_eva2):
    _model.__module__ = "timm.models.eva"  # timm keeps models by module
    register_model(_model)


class Turned(nn.Module):
    """A norm of queries or keys, after which the patches are turned one after the other.

    Args:
        norm: the norm.
        table: timm's sines and cosines, [R C, 2 d] or [H, R C, 2 d].
        half: whether channel c is turned with c + d / 2, not with its neighbour.
        num_tokens: N, prefix tokens and patches; fewer tokens have no patches.
    """

    def __init__(self, norm: nn.Module, table: Tensor, half: bool, num_tokens: int) -> None:
        super().__init__()
        self.norm, self.table, self.half, self.num_tokens = norm, table, half, num_tokens

    def forward(self, heads: Tensor) -> Tensor:
        """[..., H, n, d] to the same."""
        heads = self.norm(heads)
        if heads.shape[-2] < self.num_tokens:
            return heads
        out, patches, channels = heads.clone(), self.table.shape[-2], heads.shape[-1]
        pairs = [(c, c + channels // 2) for c in range(channels // 2)] if self.half else []
        pairs = pairs or [(c, c + 1) for c in range(0, channels, 2)]
        first, second = (torch.tensor(places) for places in zip(*pairs, strict=True))
        for place in range(patches):
            row = heads.shape[-2] - patches + place
            sin, cos = self.table[..., place, :channels][..., first], self.table[..., place, channels:][..., first]
            a, b = heads[..., row, first], heads[..., row, second]
            out[..., row, first], out[..., row, second] = a * cos - b * sin, a * sin + b * cos
        return out


@functools.cache
def as_vit(backbone: VitBackbone) -> VitBackbone:
    """An Eva as timm's VisionTransformer, turned in its norms of queries and keys, for comparison; a ViT itself."""
    if not isinstance(backbone, EvaBackbone):
        return backbone
    eva = backbone.model
    inner = isinstance(eva.blocks[0].attn.norm, nn.LayerNorm)
    vit = VisionTransformer(
        img_size=backbone.image_size,
        patch_size=backbone.patch_size,
        embed_dim=backbone.width,
        depth=backbone.depth,
        num_heads=backbone.num_heads,
        mlp_ratio=eva.blocks[0].mlp.fc1.out_features / backbone.width,
        init_values=1,
        scale_attn_norm=inner,
        scale_mlp_norm=inner,
        pos_embed="none" if eva.pos_embed is None else "learn",
        reg_tokens=backbone.num_prefix_tokens - 1,
        no_embed_class=eva.no_embed_class,
        global_pool=eva.global_pool,
        num_classes=0,
    )
    ours = eva.state_dict()
    state = {name: ours.get(name, tensor) for name, tensor in vit.state_dict().items()}
    for index, block in enumerate(eva.blocks):
        own, pairs = f"blocks.{index}.", [backbone.blocks[index].projection(part) for part in range(3)]
        state[own + "attn.qkv.weight"] = torch.cat([weight for weight, _ in pairs])
        biases = [torch.zeros(len(weight)) if bias is None else bias for weight, bias in pairs]
        state[own + "attn.qkv.bias"] = torch.cat(biases)
        for place in (1, 2):
            gamma = getattr(block, f"gamma_{place}")
            state[f"{own}ls{place}.gamma"] = torch.ones(backbone.width) if gamma is None else gamma
    vit.load_state_dict(state)
    for index, block in enumerate(vit.blocks):
        table = eva.rope.get_embed().detach()
        table = table[index] if table.ndim == 4 else table
        for name in ("q_norm", "k_norm"):
            norm = getattr(block.attn, name)
            half = eva.blocks[index].attn.rotate_half
            setattr(block.attn, name, Turned(norm, table, half, backbone.num_tokens))
    made = VitBackbone(vit)
    made.name, made.fingerprint = backbone.name, backbone.fingerprint
    made.mean, made.std, made.interpolation = backbone.mean, backbone.std, backbone.interpolation
    return made
