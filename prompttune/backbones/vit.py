"""timm's VisionTransformer, opened up: the parts that prompt methods drive.

The tensors and the arithmetic are timm's (https://github.com/huggingface/pytorch-image-models,
``timm/models/vision_transformer.py``); this file only calls them in pieces. N is the number of tokens, prefix tokens
(class token and registers) first; H heads of d channels each.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from timm.layers import Attention, HybridEmbed, resample_abs_pos_embed
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import (
    _RADIO_ALIGN_CORNERS,
    Block,
    VisionTransformer,
    checkpoint_filter_fn,
)
from torch import Tensor, nn

from prompttune.backbones.base import Architecture, PatchBackbone, set_patch_input
from prompttune.backbones.blocks import AttentionBlock, merge_heads
from prompttune.layers.attention import attend
from prompttune.layers.probe import probe

BILINEAR = ("flexi", "radio")
"""Parts of timm names whose position embeddings timm resamples bilinearly and without antialiasing."""


def vit_problem(model: Any, kind: type[nn.Module], block: type[nn.Module], *attentions: type[nn.Module]) -> str:
    """The reason why a model cannot be driven as a ``kind`` with such blocks; empty if it can."""
    if type(model) is not kind:
        return f"it is a {type(model).__name__}"
    if type(model.patch_embed) not in (PatchEmbed, HybridEmbed):
        return f"its patch embedding is a {type(model.patch_embed).__name__}"
    if model.global_pool == "":
        return "it has no pooling"
    for one in cast(nn.Sequential, model.blocks):
        attention = getattr(one, "attn", None)
        if type(one) is not block:
            return f"its blocks are {type(one).__name__}"
        if type(attention) not in attentions:
            return f"its attention is a {type(attention).__name__}"
        if getattr(attention, "gate", None) is not None:
            return "its attention is gated"
        if getattr(attention, "num_kv_groups", 1) != 1:
            return "its heads share keys and values"
    return ""


class VitBlock(AttentionBlock):
    """A block with LayerScale, and norms of queries and keys, where the model has them.

    Args:
        timm: the frozen timm block.
        index: number of the block.
        pooled_alone: whether only token 0 of its output is needed: the last block of a model that pools this token.
    """

    def __init__(self, timm: Any, index: int, pooled_alone: bool) -> None:
        super().__init__(timm, index)
        self.pooled_alone = pooled_alone

    def query_heads(self, projected: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.query_heads`; with their norm."""
        return cast(Tensor, self.timm.attn.q_norm(self.heads(projected)))

    def key_heads(self, projected: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.key_heads`; with their norm."""
        return cast(Tensor, self.timm.attn.k_norm(self.heads(projected)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.attend`; of all keys."""
        return merge_heads(attend(q, k, v))

    def project(self, attended: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.project`; with LayerScale."""
        attention = self.timm.attn
        return self.scale_attention(attention.proj(attention.norm(attended)))

    def mlp(self, tokens: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.mlp`; with LayerScale."""
        return self.scale_mlp(self.timm.mlp(self.timm.norm2(tokens)))

    def scale_attention(self, projected: Tensor) -> Tensor:
        """The LayerScale of the attention, [..., D]."""
        return cast(Tensor, self.timm.ls1(projected))

    def scale_mlp(self, projected: Tensor) -> Tensor:
        """The LayerScale of the MLP, [..., D]."""
        return cast(Tensor, self.timm.ls2(projected))

    def run_timm(self, tokens: Tensor) -> Tensor:
        """The block as timm computes it, [B, N, D]."""
        return cast(Tensor, self.timm(tokens))

    def read(self, tokens: Tensor, whole: bool = False) -> Tensor:
        """The tokens of [B, N, D] whose output is needed: all, or token 0 with ``pooled_alone``, unless ``whole``."""
        return tokens[:, :1] if self.pooled_alone and not whole else tokens

    def self_attention(self, tokens: Tensor, whole: bool = False) -> Tensor:
        """The attention for the tokens of :meth:`read`, from norm to LayerScale, without the residual: [B, 1 or N, D].

        Args:
            tokens: [B, N, D].
            whole: see :meth:`read`.
        """
        normed = self.norm1(tokens)
        return self.project(self.attend(self.query(self.read(normed, whole)), *self.key_value(normed)))

    def run_read(self, tokens: Tensor, whole: bool = False) -> Tensor:
        """The block for the tokens of :meth:`read`, [B, N, D] to [B, 1 or N, D]."""
        return self.feed_forward(self.read(tokens, whole) + self.self_attention(tokens, whole))


class VitBackbone(PatchBackbone):
    """A frozen timm VisionTransformer of any depth, width, patch size, prefix tokens and pooling."""

    model: Any
    blocks: tuple[VitBlock, ...]

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.width = int(model.embed_dim)
        self.depth = len(model.blocks)
        self.num_prefix_tokens = int(model.num_prefix_tokens)
        self.num_tokens = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        self.pools_class_token = model.attn_pool is None and model.global_pool == "token"
        """Whether the features depend only on token 0, so that the last block can skip the other tokens."""
        self.blocks = tuple(
            self.open_block(block, index, self.pools_class_token and index == self.depth - 1)
            for index, block in enumerate(model.blocks)
        )
        self.num_heads, self.head_dim = self.blocks[0].num_heads, self.blocks[0].head_dim

    def open_block(self, timm: nn.Module, index: int, pooled_alone: bool) -> VitBlock:
        """One block in pieces, see :class:`VitBlock`."""
        return VitBlock(timm, index, pooled_alone)

    def forward(self, images: Tensor) -> Tensor:
        """See :meth:`Backbone.forward`."""
        self.check_images(images)
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block.run_read(tokens)
        return self.pool(tokens)

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to the tokens [B, N, D] that enter block 0."""
        return self.place(self.embed_patches(images))

    def place(self, patches: Tensor) -> Tensor:
        """Patch tokens [B, R C, D] to the tokens [B, N, D] that enter block 0."""
        own = (self.model.cls_token, self.model.reg_token)
        prefix = [tokens.expand(patches.shape[0], -1, -1) for tokens in own if tokens is not None]
        tokens = self.position(torch.cat((*prefix, patches), dim=1))
        probe("embed", tokens)
        return tokens

    def position(self, tokens: Tensor) -> Tensor:
        """Add the position embedding (and pre-norm) to tokens [B, N, D] of an image or of prompts."""
        embedding = self.model.pos_embed
        if embedding is None:
            placed = tokens
        elif self.model.no_embed_class:
            prefix = self.num_prefix_tokens
            placed = torch.cat((tokens[:, :prefix], tokens[:, prefix:] + embedding), dim=1)
        else:
            placed = tokens + embedding
        return cast(Tensor, self.model.norm_pre(placed))

    def patch_map(self, tokens: Tensor, inserted: int = 0) -> Tensor:
        """Apply the model's final norm to the patch tokens of any block, wherever that norm is: to [B, R C, D].

        Args:
            tokens: [B, N + inserted, D], prefix tokens first.
            inserted: prompt tokens between the prefix tokens and the patches.
        """
        return self.normed(tokens[:, self.num_prefix_tokens + inserted :])

    def normed(self, tokens: Tensor) -> Tensor:
        """Apply the model's final norm, wherever it is, to [..., D]."""
        # timm has one of the two norms, after the blocks or after the pooling; the other is the identity.
        return cast(Tensor, self.model.fc_norm(self.model.norm(tokens)))

    def pool(self, tokens: Tensor) -> Tensor:
        """Final norm, the model's own pooling and head norm: [B, N, D] to [B, D].

        With :attr:`pools_class_token`, token 0 ([B, 1, D]) is enough.
        """
        return self.pool_normed(self.final_norm(tokens))

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The norm after the last block, for the pooled tokens: [B, N, D] to [B, 1 or N, D]."""
        return cast(Tensor, self.model.norm(tokens[:, :1] if self.pools_class_token else tokens))

    def pool_normed(self, tokens: Tensor) -> Tensor:
        """The model's own pooling and head norm of normed tokens: [B, 1 or N, D] to [B, D]."""
        pooled = tokens[:, 0] if self.pools_class_token else self.model.pool(tokens)
        return cast(Tensor, self.model.fc_norm(pooled))


def _wrap(model: VisionTransformer, name: str, image_size: int | None) -> VitBackbone:
    stored, grid, variant = model.pos_embed, model.patch_embed.grid_size, model.pretrained_cfg.get("architecture", "")
    set_patch_input(model, name, image_size)
    if stored is not None and grid != model.patch_embed.grid_size and any(one in variant for one in BILINEAR):
        # timm's own filter of these names, which set_input_size does not know
        model.pos_embed.data = resample_abs_pos_embed(
            stored.data,
            list(model.patch_embed.grid_size),
            list(grid),
            num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
            interpolation="bilinear",
            antialias=False,
            align_corners=any(one in variant for one in _RADIO_ALIGN_CORNERS),
        )
    return VitBackbone(model)


VIT = Architecture(
    models=(VisionTransformer,),
    modules=("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin"),
    problem=lambda model: vit_problem(model, VisionTransformer, Block, Attention),
    wrap=_wrap,
    kind=VitBackbone,
    rename=partial(checkpoint_filter_fn, adapt_layer_scale=True),
    settings={"dynamic_img_size": False},
)
