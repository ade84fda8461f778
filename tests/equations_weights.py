"""Methods on the weights' side and GaPT, written from their papers over timm's own forward. Slow; for comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import prompttune as pt
from prompttune.methods.adapter import SerialAdapter
from prompttune.methods.adaptformer import AdaptFormer
from prompttune.methods.gapt import GaPT
from prompttune.methods.lora import LoRA
from prompttune.methods.ssf import SSF

CASES = [
    ("adaptformer", {"rank": 4}),
    ("adaptformer", {"rank": 3, "adapter_scale": 0.7}),
    ("adapter", {"rank": 4}),
    ("lora", {"rank": 4}),
    ("lora", {"rank": 2, "alpha": 8}),
    ("lora", {"rank": 3, "targets": "qkv"}),
    ("ssf", {}),
    ("gapt", {"num_prompts": 3}),
    ("gapt", {"num_prompts": 3, "pool": "mean"}),
]
"""Methods and settings that these equations are compared with."""


def pooled(timm: VisionTransformer, images: Tensor) -> Tensor:
    """What timm would give its classifier, [B, D]."""
    features: Tensor = timm.forward_head(timm.forward_features(images), pre_logits=True)
    return features


def hook(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put ``change`` behind a module."""
    module.register_forward_hook(lambda _module, _args, output: change(output))


def run_bottleneck(adapter: nn.Module, z: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """up(activation(down(z)))."""
    out: Tensor = adapter.up(activation(adapter.down(z)))
    return out


def adaptformer_features(timm: VisionTransformer, method: AdaptFormer, images: Tensor) -> Tensor:
    """x' = x + attention; x' + MLP(norm2(x')) + s up(ReLU(down(x')))."""
    for block, adapter in zip(timm.blocks, method.adapters, strict=True):

        def forward(x: Tensor, block: nn.Module = block, adapter: nn.Module = adapter) -> Tensor:
            x = x + block.ls1(block.attn(block.norm1(x)))
            return (
                x
                + block.ls2(block.mlp(block.norm2(x)))
                + method.config.adapter_scale * run_bottleneck(adapter, x, F.relu)
            )

        block.forward = forward
    return pooled(timm, images)


def adapter_features(timm: VisionTransformer, method: SerialAdapter, images: Tensor) -> Tensor:
    """z + up(GELU(down(z))) behind both halves of a block, LayerScale included."""
    for index, block in enumerate(timm.blocks):
        for module, adapter in ((block.ls1, method.attention[index]), (block.ls2, method.mlp[index])):
            hook(module, lambda z, adapter=adapter: z + run_bottleneck(adapter, z, F.gelu))
    return pooled(timm, images)


def lora_features(timm: VisionTransformer, method: LoRA, images: Tensor) -> Tensor:
    """W + (α / r) up down merged into the weights."""
    for index, block in enumerate(timm.blocks):
        query, key, value = block.attn.qkv.weight.data.chunk(3)  # views, changed in place
        pairs = [(query, method.query), (value, method.value)]
        if method.config.targets == "qkv":
            pairs.append((key, method.key))
        for weight, added in pairs:
            weight += method.config.alpha / method.config.rank * added.up[index] @ added.down[index]
    return pooled(timm, images)


def ssf_features(timm: VisionTransformer, method: SSF, images: Tensor) -> Tensor:
    """scale x + shift behind each of timm's own modules."""

    def put(module: nn.Module, place: str, *at: int) -> None:
        scale, shift = method.scale[place], method.shift[place]
        for index in at:
            scale, shift = scale[index], shift[index]
        hook(module, lambda x: x * scale.flatten() + shift.flatten())

    put(timm.patch_embed, "patches")
    put(timm.norm, "norm")
    for index, block in enumerate(timm.blocks):
        modules = {"norm1": block.norm1, "qkv": block.attn.qkv, "proj": block.attn.proj}
        modules |= {"norm2": block.norm2, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
        for place, module in modules.items():
            put(module, place, index)
    return pooled(timm, images)


def gapt_features(timm: VisionTransformer, method: GaPT, images: Tensor) -> Tensor:
    """softmax(q k^T / (t sqrt(d))) v in each block; g out + (1 - g) in for the prompts behind all but the last."""
    prefix, count, depth = timm.num_prefix_tokens, method.config.num_prompts, len(timm.blocks)
    x = timm.norm_pre(timm._pos_embed(timm.patch_embed(images)))
    prompts = method.prompts.expand(len(x), -1, -1)
    x = torch.cat((x[:, :prefix], prompts, x[:, prefix:]), dim=1)
    for index, block in enumerate(timm.blocks):
        attention = block.attn
        temperature = method.temperatures[index].clamp(0.01, 10)
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = attention.q_norm(qkv[0]), attention.k_norm(qkv[1]), qkv[2]
        seen = (q @ k.transpose(-2, -1) / attention.head_dim**0.5 / temperature).softmax(dim=-1) @ v
        before = x[:, prefix : prefix + count]
        x = x + block.ls1(attention.proj(attention.norm(seen.transpose(1, 2).flatten(2))))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        if index + 1 < depth:
            gate = torch.sigmoid(method.gates[index])
            mixed = gate * x[:, prefix : prefix + count] + (1 - gate) * before
            x = torch.cat((x[:, :prefix], mixed, x[:, prefix + count :]), dim=1)
    if method.config.pool == "mean":
        features: Tensor = timm.fc_norm(timm.norm(x[:, prefix:].mean(dim=1)))
    else:
        x = torch.cat((x[:, :prefix], x[:, prefix + count :]), dim=1)
        features = timm.forward_head(timm.norm(x), pre_logits=True)
    return features


FEATURES: dict[type[nn.Module], Callable[..., Tensor]] = {
    AdaptFormer: adaptformer_features,
    SerialAdapter: adapter_features,
    LoRA: lora_features,
    SSF: ssf_features,
    GaPT: gapt_features,
}


def features(model: pt.PromptModel, images: Tensor) -> Tensor:
    """Pooled features [B, D] of a task, from a copy of the backbone that may be changed."""
    timm = copy.deepcopy(model.backbone.model)
    with torch.no_grad():
        return FEATURES[type(model.method)](timm, model.method, images)
