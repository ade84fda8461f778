"""timm's VisionTransformer, opened up: the parts that prompt methods drive.

The tensors and the arithmetic are timm's (https://github.com/huggingface/pytorch-image-models,
``timm/models/vision_transformer.py``); this file only calls them in pieces. N is the number of tokens, prefix tokens
(class token and registers) first; H heads of d channels each.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.errors import BackboneError
from prompttune.layers.attention import attend
from prompttune.layers.probe import probe

ALLOCATOR_KEEPS = 32 * 2**20
"""Bytes above which glibc maps every allocation anew (the ceiling of its dynamic ``M_MMAP_THRESHOLD``)."""

SUPPORTED = "timm VisionTransformer models with pre-norm blocks and absolute (or no) position embeddings"


def merge_heads(attended: Tensor) -> Tensor:
    """[..., H, N, d] to [..., N, H d]."""
    return attended.transpose(-3, -2).flatten(-2)


def check_supported(model: nn.Module, name: str) -> None:
    """Raise :class:`BackboneError` that says why ``model`` cannot be driven block by block."""
    problem = ""
    if type(model) is not VisionTransformer:
        problem = f"it is a {type(model).__name__}"
    elif type(model.patch_embed) is not PatchEmbed:
        problem = f"its patch embedding is a {type(model.patch_embed).__name__}"
    elif model.global_pool == "":
        problem = "it has no pooling"
    else:
        for block in cast(nn.Sequential, model.blocks):
            if type(block) is not Block or type(block.attn) is not Attention:
                problem = f"its blocks are {type(block).__name__} with {type(block.attn).__name__}"
            elif getattr(block.attn, "gate", None) is not None:
                problem = "its attention is gated"
    if problem:
        raise BackboneError(f"{name} is not supported: {problem}; supported: {SUPPORTED}")


class VitBackbone(Backbone):
    """A frozen timm VisionTransformer of any depth, width, patch size, prefix tokens and pooling."""

    model: VisionTransformer

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__(model)
        rows, columns = model.patch_embed.grid_size
        self.grid = (int(rows), int(columns))
        self.width = int(model.embed_dim)
        self.depth = len(model.blocks)
        self.patch_size = int(model.patch_embed.patch_size[0])
        self.num_prefix_tokens = int(model.num_prefix_tokens)
        self.num_tokens = self.num_prefix_tokens + rows * columns
        self.num_heads = int(self.attention(0).num_heads)
        self.head_dim = int(self.attention(0).head_dim)
        self.hidden_width = max(
            layer.out_features for layer in self.block(0).mlp.modules() if isinstance(layer, nn.Linear)
        )

    @property
    def pools_class_token(self) -> bool:
        """Whether the features are read from token 0 alone, so that the last block need not compute the others."""
        return self.model.attn_pool is None and self.model.global_pool == "token"

    def block(self, index: int) -> Block:
        """The frozen timm block ``index``."""
        return cast(Block, self.model.blocks[index])

    def attention(self, index: int) -> Attention:
        """The attention of block ``index``."""
        return cast(Attention, self.block(index).attn)

    def forward(self, images: Tensor) -> Tensor:
        """See :meth:`Backbone.forward`."""
        tokens = self.embed(images)
        for index in range(self.depth - 1):
            tokens = self.run_block(index, tokens)
        return self.pool(self.run_last_block(tokens))

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to the tokens [B, N, D] that enter block 0."""
        # The patches' convolution may be of a higher precision than the blocks.
        patches = self.model.patch_embed(images.to(self.model.patch_embed.proj.weight.dtype))
        patches = patches.to(self.attention(0).proj.weight.dtype)
        tokens = cast(Tensor, self.model.norm_pre(self.model._pos_embed(patches)))
        probe("embed", tokens)
        return tokens

    def position(self, tokens: Tensor) -> Tensor:
        """Give prompt tokens [1, N, D] the position embedding (and pre-norm) of the image tokens."""
        embedding = self.model.pos_embed
        if embedding is None:
            placed = tokens
        elif self.model.no_embed_class:
            prefix = self.num_prefix_tokens
            placed = torch.cat((tokens[:, :prefix], tokens[:, prefix:] + embedding), dim=1)
        else:
            placed = tokens + embedding
        return cast(Tensor, self.model.norm_pre(placed))

    def norm1(self, index: int, tokens: Tensor) -> Tensor:
        """The norm in front of block ``index``'s attention."""
        return cast(Tensor, self.block(index).norm1(tokens))

    def qkv(self, index: int, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., H, N, d] of normed tokens [..., N, D]."""
        return self.query(index, normed), *self.key_value(index, normed)

    def query(self, index: int, normed: Tensor) -> Tensor:
        """Queries alone, [..., H, N, d]."""
        return cast(Tensor, self.attention(index).q_norm(self._heads(index, normed, 0)))

    def key_value(self, index: int, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values alone, [..., H, N, d] each."""
        return self.attention(index).k_norm(self._heads(index, normed, 1)), self._heads(index, normed, 2)

    def _heads(self, index: int, normed: Tensor, part: int) -> Tensor:
        """Queries (part 0), keys (1) or values (2) before their norm, [..., H, N, d].

        Each from its own rows of the weight: splitting one large product would copy it.
        """
        attention = self.attention(index)
        rows = slice(part * attention.attn_dim, (part + 1) * attention.attn_dim)
        bias = attention.qkv.bias
        projected = F.linear(normed, attention.qkv.weight[rows], None if bias is None else bias[rows])
        heads: Tensor = projected.unflatten(-1, (attention.num_heads, attention.head_dim))  # [..., N, H, d]
        return heads.transpose(-3, -2)

    def project(self, index: int, attended: Tensor) -> Tensor:
        """Attention output with merged heads [..., N, H d] through the block's projection and LayerScale."""
        block, attention = self.block(index), self.attention(index)
        return cast(Tensor, block.ls1(attention.proj(attention.norm(attended))))

    def feed_forward(self, index: int, tokens: Tensor) -> Tensor:
        """The second half of block ``index`` with its residual, [..., N, D]."""
        block = self.block(index)
        return cast(Tensor, tokens + block.ls2(block.mlp(block.norm2(tokens))))

    def feed_forward_both(self, index: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The second half of block ``index`` for two pathways, [2, B, N, D] to twice [B, N, D].

        One batch, except in eager mode on a CPU once the hidden activations outgrow what the C allocator keeps for
        reuse: from there on each call would fault fresh pages in, and one pathway after the other is quicker.
        """
        # A traced graph has no size to decide on: comparing it would bind the graph to batches on one side.
        if not torch.compiler.is_compiling() and tokens.device.type == "cpu":
            hidden = tokens[..., 0].numel() * self.hidden_width * tokens.element_size()
            if hidden > ALLOCATOR_KEEPS:
                return self.feed_forward(index, tokens[0]), self.feed_forward(index, tokens[1])
        first, second = self.feed_forward(index, tokens).unbind(0)
        return first, second

    def run_block(self, index: int, tokens: Tensor) -> Tensor:
        """All of block ``index``, [B, N, D] to [B, N, D]."""
        attended = attend(*self.qkv(index, self.norm1(index, tokens)))
        return self.feed_forward(index, tokens + self.project(index, merge_heads(attended)))

    def run_last_block(self, tokens: Tensor) -> Tensor:
        """The last block, for the tokens that are pooled alone: [B, N, D] to [B, 1 or N, D]."""
        index = self.depth - 1
        if not self.pools_class_token:
            return self.run_block(index, tokens)
        normed = self.norm1(index, tokens)
        attended = attend(self.query(index, normed[:, :1]), *self.key_value(index, normed))
        return self.feed_forward(index, tokens[:, :1] + self.project(index, merge_heads(attended)))

    def pool(self, tokens: Tensor) -> Tensor:
        """Final norm, the model's own pooling and head norm: [B, N, D] to [B, D].

        With :attr:`pools_class_token`, token 0 alone ([B, 1, D]) is enough.
        """
        if self.pools_class_token:
            pooled = self.model.norm(tokens[:, 0])
        else:
            pooled = self.model.pool(self.model.norm(tokens))
        return cast(Tensor, self.model.fc_norm(pooled))
