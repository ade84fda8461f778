"""Methods that only read the image, written straight over timm's own modules, nothing folded. Slow; for comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import prompttune as pt
from prompttune.methods.reader import Reader
from tests.equations_prompts import embedded

CASES = [
    ("reader", {"num_prompts": 3, "rank": 4}),
    ("reader", {"num_prompts": 1, "rank": 2, "mlp": True}),
]
"""Methods and settings that these equations are compared with."""


def reader_features(timm: VisionTransformer, method: Reader, images: Tensor) -> Tensor:
    """q = W_q norm(t + b) + c; t += W_o softmax(q k^T / sqrt(d)) v; t += [MLP(norm2(t)) +] up(GELU(down(t)))."""
    x, t, found = embedded(timm, images), method.tokens.expand(len(images), -1, -1), []
    for index, block in enumerate(timm.blocks):
        own, width = block.attn, block.attn.head_dim
        _, k, v = own.qkv(block.norm1(x)).unflatten(-1, (3, own.num_heads, -1)).permute(2, 0, 3, 1, 4)
        k = own.k_norm(k)
        q = own.qkv(block.norm1(t + method.before[index])).chunk(3, dim=-1)[0] + method.query[index]
        q = own.q_norm(q.unflatten(-1, (own.num_heads, -1)).transpose(1, 2))
        seen = torch.zeros_like(t[..., : own.num_heads * width])
        for head in range(own.num_heads):
            weights = (q[:, head] @ k[:, head].transpose(1, 2) / width**0.5).softmax(dim=-1)
            seen[..., head * width : (head + 1) * width] = weights @ v[:, head]
        t = t + block.ls1(own.proj(own.norm(seen)))
        added = F.gelu(t @ method.down[index]) @ method.up[index]
        t = t + added + (block.ls2(block.mlp(block.norm2(t))) if method.config.mlp else 0)
        x = block(x)
        if index in (len(timm.blocks) // 2 - 1, len(timm.blocks) - 1):
            found.append(timm.fc_norm(timm.norm(t)).flatten(1))
    both = torch.cat(found, dim=1)
    return (both - both.mean(1, keepdim=True)) / (both.var(1, correction=0, keepdim=True) + 1e-6).sqrt()


FEATURES: dict[type[nn.Module], Callable[..., Tensor]] = {Reader: reader_features}


def features(model: pt.PromptModel, images: Tensor) -> Tensor:
    """Features [B, D'] of a task, from a copy of the backbone."""
    timm = copy.deepcopy(model.backbone.model)
    with torch.no_grad():
        return FEATURES[type(model.method)](timm, model.method, images)
