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
from prompttune.methods.side import Side
from tests.equations_prompts import embedded

CASES = [
    ("reader", {"num_prompts": 3, "rank": 4}),
    ("reader", {"num_prompts": 1, "rank": 2, "mlp": True}),
    ("side", {"width": 8}),
    ("side", {"width": 6, "layers": (1, 2), "stem": False}),
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


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """A 3 x 3 convolution of maps [B, c, R, C] by rows of weights, each of nine places of c channels."""
    kernel = weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
    return F.conv2d(x, kernel, None if bias is None else bias.flatten(), stride=stride, padding=1)


def side_features(timm: VisionTransformer, method: Side, images: Tensor) -> Tensor:
    """h += W LN(x), h += |conv(IN(h)) + b|, h += V GELU(U IN(h) + c) at each read; IN by torch's own."""
    x, grid = embedded(timm, images), timm.patch_embed.grid_size
    h = method.map.unflatten(1, grid).expand(len(images), -1, -1, -1)

    def norm(maps: Tensor) -> Tensor:
        return F.instance_norm(maps, eps=1e-4)

    if method.config.stem:
        small = F.interpolate(images, size=(8 * grid[0], 8 * grid[1]), mode="bilinear", antialias=True)
        seen = norm(conv(norm(small), method.stem[0], stride=2)).abs()
        seen = F.gelu(norm(conv(seen, method.stem[1], stride=2)))
        h = h + norm(conv(seen, method.stem[2], stride=2))
    for index, block in enumerate(timm.blocks):
        x = block(x)
        if index not in method.config.layers:
            continue
        at, patches = method.config.layers.index(index), x[:, timm.num_prefix_tokens :]
        read = F.layer_norm(patches, patches.shape[-1:], eps=1e-6) @ method.read[at].T
        h = h + read.transpose(1, 2).unflatten(2, grid)
        h = h + conv(norm(h), method.mix[at], method.mix_bias[at]).abs()
        hidden = F.gelu(F.conv2d(norm(h), method.up[at, :, :, None, None], method.up_bias[at].flatten()))
        h = h + F.conv2d(hidden, method.down[at, :, :, None, None])
    return F.layer_norm(h.permute(0, 2, 3, 1), (h.shape[1],), eps=1e-6).mean(dim=(1, 2))


FEATURES: dict[type[nn.Module], Callable[..., Tensor]] = {Reader: reader_features, Side: side_features}


def features(model: pt.PromptModel, images: Tensor) -> Tensor:
    """Features [B, D'] of a task, from a copy of the backbone."""
    timm = copy.deepcopy(model.backbone.model)
    with torch.no_grad():
        return FEATURES[type(model.method)](timm, model.method, images)
