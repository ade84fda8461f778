"""Names of a backbone's tensors in the files of other libraries, as tables of patterns onto timm's names.

transformers (https://github.com/huggingface/transformers): ViT, DeiT, DINOv2, DINOv3, the vision towers of CLIP and
SigLIP, Swin, ResNet, ConvNeXt; torchvision's ViT (https://github.com/pytorch/vision); DINOv2's training checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Pairs = tuple[tuple[str, str], ...]


class Layout(NamedTuple):
    """A library's names: every pattern of ``pairs`` is replaced, in order, in files with a name like ``sign``."""

    sign: str
    pairs: Pairs


_ATTENTION: Pairs = (
    (r"\.(?:attention|self_attn)(?:\.attention|\.self)?\.([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.(mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.distillation_token$", "reg_token"),
    (r"^(?:post_)?layernorm\.", "norm."),
)
LAYOUTS: tuple[Layout, ...] = (
    # ViT, DeiT and DINOv2 of transformers
    Layout(
        r"layer\.\d+\.attention\.attention\.query",
        ((r"^layer\.", "blocks."), *_ATTENTION, (r"\.mlp\.weights_in\.", ".mlp.fc1."),
         (r"\.mlp\.weights_out\.", ".mlp.fc2.")),
    ),
    # DINOv3 of transformers, to the names of Meta's own file, which timm knows
    Layout(
        r"layer\.\d+\.attention\.q_proj",
        ((r"^layer\.", "blocks."), *_ATTENTION, (r"^register_tokens$", "storage_tokens"),
         (r"\.mlp\.gate_proj\.", ".mlp.w1."), (r"\.mlp\.up_proj\.", ".mlp.w2."), (r"\.mlp\.down_proj\.", ".mlp.w3.")),
    ),
    # the vision towers of CLIP and SigLIP of transformers
    Layout(
        r"layers\.\d+\.self_attn\.q_proj",
        ((r"^layers\.", "blocks."), *_ATTENTION, (r"^pre_layrnorm\.", "norm_pre."),
         (r"^head\.probe$", "attn_pool.latent"), (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
         (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
         (r"^head\.layernorm\.", "attn_pool.norm."), (r"^head\.mlp\.", "attn_pool.mlp.")),
    ),
    # Swin of transformers
    Layout(
        r"layers\.\d+\.blocks\.\d+\.attention\.self\.",
        (*_ATTENTION, (r"\.attention\.self\.relative", ".attn.relative")),
    ),
    # ResNet of transformers
    Layout(
        r"embedder\.embedder\.",
        ((r"^embedder\.embedder\.convolution\.", "conv1."), (r"^embedder\.embedder\.normalization\.", "bn1."),
         *((rf"^stages\.{stage}\.layers\.", f"layer{stage + 1}.") for stage in range(4)),
         (r"\.shortcut\.convolution\.", ".downsample.0."), (r"\.shortcut\.normalization\.", ".downsample.1."),
         *((rf"\.layer\.{number}\.convolution\.", f".conv{number + 1}.") for number in range(3)),
         *((rf"\.layer\.{number}\.normalization\.", f".bn{number + 1}.") for number in range(3))),
    ),
    # ConvNeXt, its version 2 and that of DINOv3, of transformers
    Layout(
        r"stages\.\d+\.layers\.\d+\.(?:dwconv|depthwise_conv)",
        ((r"^embeddings\.patch_embeddings\.", "stem.0."), (r"^embeddings\.layernorm\.", "stem.1."),
         (r"^stages\.0\.downsample_layers\.", "stem."), (r"\.downsampl(?:e_layers|ing_layer)\.", ".downsample."),
         (r"\.layers\.", ".blocks."), (r"\.(?:dwconv|depthwise_conv)\.", ".conv_dw."),
         (r"\.(?:pwconv|pointwise_conv)([12])\.", r".mlp.fc\1."), (r"\.layer_scale_parameter$", ".gamma"),
         (r"\.grn\.", ".mlp.grn."), (r"^layer_?norm\.", "head.norm."), (r"\.layer_?norm\.", ".norm.")),
    ),
    # torchvision's ViT
    Layout(
        r"layers\.encoder_layer_0\.",
        ((r"^layers\.encoder_layer_", "blocks."), (r"^class_token$", "cls_token"),
         (r"^conv_proj\.", "patch_embed.proj."), (r"^pos_embedding$", "pos_embed"),
         (r"^ln\.", "norm."), (r"\.ln_([12])\.", r".norm\1."),
         (r"\.self_attention\.in_proj_", ".attn.qkv."), (r"\.self_attention\.out_proj\.", ".attn.proj."),
         (r"\.mlp\.(?:linear_1|0)\.", ".mlp.fc1."), (r"\.mlp\.(?:linear_2|3)\.", ".mlp.fc2.")),
    ),
    # DINOv2's training, with blocks in chunks
    Layout(r"blocks\.\d+\.\d+\.norm1\.", ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),)),
)  # fmt: skip


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under timm's names; those of an unknown layout, or of timm's own, stay as they are."""
    lines = "\n".join(tensors)
    layout = next((one for one in LAYOUTS if re.search(f"^{one.sign}", lines, re.MULTILINE)), None)
    if layout is None:
        return dict(tensors)
    pairs = [(re.compile(pattern), target) for pattern, target in layout.pairs]
    if "gate_proj" not in lines:  # DINOv3's smaller models have a plain MLP
        pairs = [
            (pattern, target.replace("mlp.w2", "mlp.fc1").replace("mlp.w3", "mlp.fc2")) for pattern, target in pairs
        ]
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        for pattern, target in pairs:
            name = pattern.sub(target, name)
        if name in ("cls_token", "pos_embed"):
            value = value.reshape(1, -1, value.shape[-1])
        found[name] = value.flatten() if ".grn." in name else value
    for name in [name for name in found if ".attn.q." in name]:
        parts = [found.pop(name.replace(".q.", f".{part}."), None) for part in "qkv"]
        shape = next(part for part in parts if part is not None)  # DINOv3's keys have no bias
        joint = torch.cat([torch.zeros_like(shape) if part is None else part for part in parts])
        found[name.replace(".q.", ".qkv.")] = joint
    for name in [name for name in found if name.startswith("attn_pool.qkv.")]:
        joint = found.pop(name)
        width = len(joint) // 3
        found[name.replace("qkv", "q")], found[name.replace("qkv", "kv")] = joint[:width], joint[width:]
    return found
