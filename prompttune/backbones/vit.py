"""timm's VisionTransformer, opened up: the parts that prompt methods drive.

The tensors and the arithmetic are timm's (https://github.com/huggingface/pytorch-image-models,
``timm/models/vision_transformer.py``); this file only calls them in pieces. N is the number of tokens, prefix tokens
(class token and registers) first; H heads of d channels each.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from prompttune.backbones.base import Backbone, one_batch
from prompttune.errors import BackboneError
from prompttune.layers.attention import attend
from prompttune.layers.probe import probe

SUPPORTED = "timm VisionTransformer models with pre-norm blocks and absolute (or no) position embeddings"


def merge_heads(attended: Tensor) -> Tensor:
    """[..., H, N, d] to [..., N, H d]."""
    return attended.transpose(-3, -2).flatten(-2)


def check_supported(model: nn.Module, name: str) -> None:
    """Raise :class:`BackboneError`, with the reason, if ``model`` cannot be driven block by block."""
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
        self.image_size = int(model.patch_embed.img_size[0])
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
        """Whether the features depend only on token 0, so that the last block can skip the other tokens."""
        return self.model.attn_pool is None and self.model.global_pool == "token"

    def block(self, index: int) -> Block:
        """The frozen timm block of this index."""
        return cast(Block, self.model.blocks[index])

    def attention(self, index: int) -> Attention:
        """The attention of block ``index``."""
        return cast(Attention, self.block(index).attn)

    def forward(self, images: Tensor) -> Tensor:
        """See :meth:`Backbone.forward`."""
        self.check_images(images)
        tokens = self.embed(images)
        for index in range(self.depth - 1):
            tokens = self.run_block(index, tokens)
        return self.pool(self.run_last_block(tokens))

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to the tokens [B, N, D] that enter block 0."""
        return self.place(self.embed_patches(images))

    def embed_patches(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to patch tokens [B, R C, D], without prefix tokens and position embedding."""
        # The patch convolution may have a higher precision than the blocks.
        patches: Tensor = self.model.patch_embed(images.to(self.model.patch_embed.proj.weight.dtype))
        return patches.to(self.token_dtype or self.attention(0).proj.weight.dtype)

    def place(self, patches: Tensor) -> Tensor:
        """Patch tokens [B, R C, D] to the tokens [B, N, D] that enter block 0."""
        tokens = cast(Tensor, self.model.norm_pre(self.model._pos_embed(patches)))
        probe("embed", tokens)
        return tokens

    def position(self, tokens: Tensor) -> Tensor:
        """Add the image tokens' position embedding (and pre-norm) to prompt tokens [1, N, D]."""
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
        """The norm before block ``index``'s attention."""
        return cast(Tensor, self.block(index).norm1(tokens))

    def norm2(self, index: int, tokens: Tensor) -> Tensor:
        """The norm before block ``index``'s MLP."""
        return cast(Tensor, self.block(index).norm2(tokens))

    def qkv(self, index: int, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., H, N, d] from normed tokens [..., N, D]."""
        return self.query(index, normed), *self.key_value(index, normed)

    def query(self, index: int, normed: Tensor) -> Tensor:
        """Only the queries, [..., H, N, d]."""
        return self.query_heads(index, self.linear_qkv(index, normed, 0))

    def key_value(self, index: int, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Only the keys and values, [..., H, N, d] each."""
        key, value = (self.linear_qkv(index, normed, part) for part in (1, 2))
        return self.key_heads(index, key), self.heads(value)

    def linear_qkv(self, index: int, normed: Tensor, part: int) -> Tensor:
        """Queries (part 0), keys (1) or values (2) from normed tokens: [..., N, D] to [..., N, H d].

        Each part uses its own rows of the weight: splitting one large product would copy it.
        """
        attention = self.attention(index)
        width = self.num_heads * self.head_dim
        rows = slice(part * width, (part + 1) * width)
        bias = attention.qkv.bias
        return F.linear(normed, attention.qkv.weight[rows], None if bias is None else bias[rows])

    def weigh_qkv(self, index: int, difference: Tensor) -> Tensor:
        """Queries, keys and values of a difference [..., D] between normed tokens: [3, ..., H d], without the bias."""
        weights = self.attention(index).qkv.weight.unflatten(0, (3, -1)).unbind(0)  # 3 of [H d, D]
        return torch.stack([F.linear(difference, weight) for weight in weights])

    def heads(self, projected: Tensor) -> Tensor:
        """[..., N, H d] to [..., H, N, d]."""
        split: Tensor = projected.unflatten(-1, (self.num_heads, self.head_dim))  # [..., N, H, d]
        return split.transpose(-3, -2)

    def query_heads(self, index: int, projected: Tensor) -> Tensor:
        """Split the queries of :meth:`linear_qkv`, [..., N, H d], into heads and norm them: [..., H, N, d]."""
        return cast(Tensor, self.attention(index).q_norm(self.heads(projected)))

    def key_heads(self, index: int, projected: Tensor) -> Tensor:
        """Split the keys of :meth:`linear_qkv`, [..., N, H d], into heads and norm them: [..., H, N, d]."""
        return cast(Tensor, self.attention(index).k_norm(self.heads(projected)))

    def project(self, index: int, attended: Tensor) -> Tensor:
        """Apply the block's projection and LayerScale to attention output with merged heads [..., N, H d]."""
        block, attention = self.block(index), self.attention(index)
        return cast(Tensor, block.ls1(attention.proj(attention.norm(attended))))

    def scale_attention(self, index: int, difference: Tensor) -> Tensor:
        """Apply the LayerScale to a difference [..., D] between outputs of the projection."""
        return cast(Tensor, self.block(index).ls1(difference))

    def feed_forward(self, index: int, tokens: Tensor) -> Tensor:
        """The second half of block ``index`` with its residual, [..., N, D]."""
        return tokens + self.mlp(index, tokens)

    def mlp(self, index: int, tokens: Tensor) -> Tensor:
        """The MLP of block ``index`` with its norm and LayerScale, without the residual, [..., N, D]."""
        block = self.block(index)
        return cast(Tensor, block.ls2(block.mlp(block.norm2(tokens))))

    def check_plain_mlp(self, what: str) -> None:
        """Raise :class:`BackboneError` unless every MLP has two linear layers, which ``what`` needs."""
        for index in range(self.depth):
            kind = type(self.block(index).mlp)
            if kind is not Mlp:
                raise BackboneError(f"{what} needs blocks with a plain MLP; {self.name} has {kind.__name__}")

    def expand_mlp(self, index: int, normed: Tensor) -> Tensor:
        """The first linear layer of block ``index``'s MLP, [..., N, D] to [..., N, M]."""
        return cast(Tensor, cast(Mlp, self.block(index).mlp).fc1(normed))

    def contract_mlp(self, index: int, hidden: Tensor) -> Tensor:
        """The rest of the MLP, with its activation and LayerScale: [..., N, M] to [..., N, D]."""
        block = self.block(index)
        mlp = cast(Mlp, block.mlp)
        return cast(Tensor, block.ls2(mlp.fc2(mlp.norm(mlp.act(hidden)))))

    def feed_forward_both(self, index: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The second half of block ``index`` for two pathways, [2, B, N, D] to twice [B, N, D]."""
        if not one_batch(tokens, self.hidden_width):
            return self.feed_forward(index, tokens[0]), self.feed_forward(index, tokens[1])
        first, second = self.feed_forward(index, tokens).unbind(0)
        return first, second

    def run_block(self, index: int, tokens: Tensor) -> Tensor:
        """All of block ``index``, [B, N, D] to [B, N, D]."""
        attended = attend(*self.qkv(index, self.norm1(index, tokens)))
        return self.feed_forward(index, tokens + self.project(index, merge_heads(attended)))

    def read(self, index: int, tokens: Tensor, whole: bool = False) -> Tensor:
        """The tokens of [B, N, D] whose output of block ``index`` is needed: all, or only token 0 in the last block.

        With ``whole``, the last block needs all tokens too.
        """
        alone = index == self.depth - 1 and self.pools_class_token and not whole
        return tokens[:, :1] if alone else tokens

    def self_attention(self, index: int, tokens: Tensor, whole: bool = False) -> Tensor:
        """The attention of block ``index`` for the tokens of :meth:`read`, from norm to LayerScale, without the
        residual.

        Args:
            index: the block.
            tokens: [B, N, D].
            whole: see :meth:`read`.

        Returns:
            [B, 1 or N, D].
        """
        normed = self.norm1(index, tokens)
        attended = attend(self.query(index, self.read(index, normed, whole)), *self.key_value(index, normed))
        return self.project(index, merge_heads(attended))

    def run_last_block(self, tokens: Tensor, whole: bool = False) -> Tensor:
        """The last block, for the pooled tokens only or for all: [B, N, D] to [B, 1 or N, D]."""
        index = self.depth - 1
        return self.feed_forward(index, self.read(index, tokens, whole) + self.self_attention(index, tokens, whole))

    def patch_map(self, tokens: Tensor, inserted: int = 0) -> Tensor:
        """Apply the model's final norm to the patch tokens of any block, wherever that norm is: to [B, R C, D].

        Args:
            tokens: [B, N + inserted, D], prefix tokens first.
            inserted: prompt tokens between the prefix tokens and the patches.
        """
        patches = tokens[:, self.num_prefix_tokens + inserted :]
        # timm has one of the two norms, after the blocks or after the pooling; the other is the identity.
        return cast(Tensor, self.model.fc_norm(self.model.norm(patches)))

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

    def pool_each(self, tokens: Tensor) -> Tensor:
        """The final norm of each token, their mean, then the head norm, whatever the model's pooling: to [B, D]."""
        return cast(Tensor, self.model.fc_norm(self.model.norm(tokens).mean(dim=1)))

    def pool_mean(self, tokens: Tensor) -> Tensor:
        """The mean of tokens, then the final norm and head norm, whatever the model's own pooling: to [B, D]."""
        return cast(Tensor, self.model.fc_norm(self.model.norm(tokens.mean(dim=1))))
