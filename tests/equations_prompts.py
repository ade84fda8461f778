"""E²VPT, EXPRES and VQT, written from their papers over timm's own modules, nothing folded. Slow; for comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import prompttune as pt
from prompttune.methods.e2vpt import E2VPT
from prompttune.methods.expres import EXPRES
from prompttune.methods.vqt import VQT

SMALL = {"num_prompts": 3, "num_kv": 2, "segments": 4}
CASES = [
    ("e2vpt", SMALL),
    ("e2vpt", SMALL | {"deep": False}),
    ("e2vpt", SMALL | {"share_kv": False}),
    ("e2vpt", SMALL | {"prune_tokens": 0, "prune_segments": 0}),
    ("expres", {"num_prompts": 3}),
    ("expres", {"num_prompts": 3, "norm_residual": False}),
    ("expres", {"num_prompts": 3, "qkv_residual": False}),
    ("expres", {"num_prompts": 3, "proj_residual": False}),
    ("expres", {"num_prompts": 20}),  # more than the image has tokens
    ("vqt", {}),
    ("vqt", {"num_queries": 20}),
]
"""Methods and settings that these equations are compared with."""


def attention(
    block: nn.Module, normed: Tensor, change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
) -> Tensor:
    """A block's attention in front of its projection, [B, N, D]; ``change`` sees q, k, v before heads are split."""
    own = block.attn
    q, k, v = change(*own.qkv(normed).chunk(3, dim=-1))

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (own.num_heads, -1)).transpose(1, 2)

    weights = own.q_norm(heads(q)) @ own.k_norm(heads(k)).transpose(-2, -1) / own.head_dim**0.5
    return own.norm((weights.softmax(dim=-1) @ heads(v)).transpose(1, 2).flatten(2))


def embedded(timm: VisionTransformer, images: Tensor) -> Tensor:
    """The tokens [B, N, D] that enter block 0."""
    tokens: Tensor = timm.norm_pre(timm._pos_embed(timm.patch_embed(images)))
    return tokens


def pruned_prompts(method: E2VPT) -> Tensor:
    """The prompts [L, P, D], each channel that is pruned set to zero by itself."""
    prompts = method.prompts.detach().clone()
    if method.config.prunes:
        tokens, segments = method.masks["token"].tolist(), method.masks["segment"].tolist()
        for place in range(prompts.shape[1]):
            for channel in range(prompts.shape[2]):
                segment = channel % method.config.segments
                if tokens[place] == 0 or segments[place][segment] == 0:
                    prompts[:, place, channel] = 0
    return prompts


def e2vpt_features(timm: VisionTransformer, method: E2VPT, images: Tensor) -> Tensor:
    """Prompts in the sequence, and in each head softmax(q [K_p; k]^T / sqrt(d)) [V_p; v]."""
    prefix, count = timm.num_prefix_tokens, method.config.num_prompts
    prompts, x = pruned_prompts(method), embedded(timm, images)
    x = torch.cat((x[:, :prefix], prompts[0].expand(len(x), -1, -1), x[:, prefix:]), dim=1)
    for index, block in enumerate(timm.blocks):
        if method.config.deep:
            x[:, prefix : prefix + count] = prompts[index]
        own, normed = block.attn, block.norm1(x)
        q, k, v = own.qkv(normed).unflatten(-1, (3, own.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = own.q_norm(q), own.k_norm(k)
        values = method.key if method.value is None else method.value
        seen = []
        for head in range(own.num_heads):
            keys = torch.cat((k[:, head], method.key[index, head].expand(len(x), -1, -1)), dim=1)
            held = torch.cat((v[:, head], values[index, head].expand(len(x), -1, -1)), dim=1)
            seen.append((q[:, head] @ keys.transpose(1, 2) / own.head_dim**0.5).softmax(dim=-1) @ held)
        x = x + block.ls1(own.proj(own.norm(torch.cat(seen, dim=-1))))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = torch.cat((x[:, :prefix], x[:, prefix + count :]), dim=1)
    features: Tensor = timm.forward_head(timm.norm(x), pre_logits=True)
    return features


def expres_features(timm: VisionTransformer, method: EXPRES, images: Tensor) -> Tensor:
    """A vector for each prompt behind the norm, behind q, k and v, and behind the projection, in every block."""
    prefix, count = timm.num_prefix_tokens, method.config.num_prompts
    x = embedded(timm, images)
    x = torch.cat((x[:, :prefix], method.prompts.expand(len(x), -1, -1), x[:, prefix:]), dim=1)

    def add(tokens: Tensor, vectors: Tensor | None, *at: int) -> Tensor:
        tokens = tokens.clone()
        if vectors is not None:
            tokens[:, prefix : prefix + count] += vectors[at]
        return tokens

    for index, block in enumerate(timm.blocks):

        def shifted(q: Tensor, k: Tensor, v: Tensor, index: int = index) -> tuple[Tensor, ...]:
            return tuple(add(tokens, method.qkv, index, part) for part, tokens in enumerate((q, k, v)))

        normed = add(block.norm1(x), method.norm, index)
        projected = add(block.attn.proj(attention(block, normed, shifted)), method.proj, index)
        x = x + block.ls1(projected)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    features: Tensor = timm.fc_norm(timm.norm(x)[:, prefix : prefix + count].mean(dim=1))
    return features


def vqt_features(timm: VisionTransformer, method: VQT, images: Tensor) -> Tensor:
    """Queries in front of the tokens, which alone have keys and values; each part of the features by its length."""
    count, x, read = method.config.num_queries, embedded(timm, images), []
    for index, block in enumerate(timm.blocks):
        x = torch.cat((method.queries[index].expand(len(x), -1, -1), x), dim=1)
        seen = attention(block, block.norm1(x), lambda q, k, v: (q, k[:, count:], v[:, count:]))
        x = x + block.ls1(block.attn.proj(seen))
        x = x + block.ls2(block.mlp(block.norm2(x)))
        read.append(x[:, :count].flatten(1))
        x = x[:, count:]
    parts = (timm.forward_head(timm.norm(x), pre_logits=True), *read)
    return torch.cat([part.shape[1] ** 0.5 * part / part.square().sum(dim=1, keepdim=True).sqrt() for part in parts], 1)


FEATURES: dict[type[nn.Module], Callable[..., Tensor]] = {
    E2VPT: e2vpt_features,
    EXPRES: expres_features,
    VQT: vqt_features,
}


def features(model: pt.PromptModel, images: Tensor) -> Tensor:
    """Pooled features [B, D] of a task, from a copy of the backbone."""
    timm = copy.deepcopy(model.backbone.model)
    with torch.no_grad():
        return FEATURES[type(model.method)](timm, model.method, images)
