"""timm's SwinTransformer (Swin v1), opened up: the parts that prompt methods drive.

The tensors and the arithmetic are timm's (https://github.com/huggingface/pytorch-image-models,
``timm/models/swin_transformer.py``); the model is https://arxiv.org/abs/2103.14030. Maps are kept as tokens
[..., N, D], row by row, with any leading axes, so that two pathways can run as one batch. N = R C tokens of a stage's
grid, no prefix tokens; H heads of d channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from torch import Tensor, nn

from prompttune.backbones.base import Backbone, one_batch
from prompttune.backbones.windows import Windows, merging_order
from prompttune.errors import BackboneError
from prompttune.layers.probe import probe

SUPPORTED = "timm SwinTransformer models (Swin v1)"


@dataclass(frozen=True)
class Stage:
    """Blocks that share one grid."""

    blocks: range
    """Indices of the stage's blocks, counted over the whole model."""
    grid: tuple[int, int]
    """Rows and columns of the map in these blocks, after patch merging."""
    width: int
    num_heads: int
    head_dim: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the map."""
        return self.grid[0] * self.grid[1]


def check_supported(model: SwinTransformer, name: str) -> None:
    """Raise :class:`BackboneError`, with the reason, if ``model`` cannot be driven block by block."""
    problem = ""
    if type(model) is not SwinTransformer:
        problem = f"it is a {type(model).__name__}"
    elif type(model.patch_embed) is not PatchEmbed:
        problem = f"its patch embedding is a {type(model.patch_embed).__name__}"
    elif model.global_pool == "":
        problem = "it has no pooling"
    else:
        for stage in _stages(model):
            if type(stage.downsample) not in (PatchMerging, nn.Identity):
                problem = f"it merges patches with {type(stage.downsample).__name__}"
            for block in _blocks(stage):
                if type(block) is not SwinTransformerBlock or type(block.attn) is not WindowAttention:
                    problem = f"its blocks are {type(block).__name__} with {type(block.attn).__name__}"
    if problem:
        raise BackboneError(f"{name} is not supported: {problem}; supported: {SUPPORTED}")


def _stages(model: SwinTransformer) -> list[SwinTransformerStage]:
    return list(model.layers)


def _blocks(stage: SwinTransformerStage) -> list[SwinTransformerBlock]:
    return list(stage.blocks)


class SwinBackbone(Backbone):
    """A frozen timm SwinTransformer of any size, window and image size.

    Blocks are numbered over all stages; ``depth`` counts them all, ``grid`` is the map of the patch embedding and
    ``width`` the channels of the last stage.
    """

    model: SwinTransformer

    def __init__(self, model: SwinTransformer) -> None:
        super().__init__(model)
        self.image_size = int(model.patch_embed.img_size[0])
        rows, columns = model.patch_embed.grid_size
        self.grid = (int(rows), int(columns))
        self.patch_size = int(model.patch_embed.patch_size[0])
        self.width = int(model.num_features)
        stages: list[Stage] = []
        windows: list[Windows] = []
        grid = self.grid
        for number, layer in enumerate(_stages(model)):
            if isinstance(layer.downsample, PatchMerging):
                order, grid = merging_order(grid)
                self.register_buffer(f"merging{number}", order, persistent=False)
            blocks = _blocks(layer)
            attention = cast(WindowAttention, blocks[0].attn)
            numbers = range(len(windows), len(windows) + len(blocks))
            head_dim = attention.qkv.out_features // (3 * attention.num_heads)
            stages.append(Stage(numbers, grid, int(blocks[0].dim), int(attention.num_heads), int(head_dim)))
            windows += [Windows(block, grid) for block in blocks]
        self.stages = tuple(stages)
        self.windows = nn.ModuleList(windows)
        self.depth = len(windows)

    def requires_grad_(self, requires_grad: bool = True) -> SwinBackbone:
        """Let the weights train, or freeze them with the windows' position bias at its current value."""
        super().requires_grad_(requires_grad)
        for windows in self.windows:
            cast(Windows, windows).freeze(not requires_grad)
        return self

    def stage_of(self, index: int) -> int:
        """The number of the stage that holds block ``index``."""
        return next(number for number, stage in enumerate(self.stages) if index in stage.blocks)

    def block(self, index: int) -> SwinTransformerBlock:
        """The frozen timm block of this index."""
        number = self.stage_of(index)
        return _blocks(_stages(self.model)[number])[index - self.stages[number].blocks.start]

    def attention(self, index: int) -> WindowAttention:
        """The attention of block ``index``."""
        return cast(WindowAttention, self.block(index).attn)

    def forward(self, images: Tensor) -> Tensor:
        """See :meth:`Backbone.forward`."""
        self.check_images(images)
        return self.pool(self.run_stages(self.embed(images), range(len(self.stages))))

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to the tokens [B, N, D] that enter stage 0."""
        # The patch convolution may have a higher precision than the blocks.
        patches = self.model.patch_embed(images.to(self.model.patch_embed.proj.weight.dtype))  # [B, R, C, D]
        tokens = cast(Tensor, patches.flatten(1, 2).to(self.token_dtype or self.attention(0).proj.weight.dtype))
        probe("embed", tokens)
        return tokens

    def position(self, tokens: Tensor) -> Tensor:
        """Apply the image tokens' patch norm to prompt tokens [1, N, D]; positions are embedded in the blocks."""
        return cast(Tensor, self.model.patch_embed.norm(tokens))

    def merge(self, number: int, tokens: Tensor) -> Tensor:
        """Patch merging before stage ``number``, [..., N, D] to [..., N', D']; stage 0 has none."""
        merging = _stages(self.model)[number].downsample
        if not isinstance(merging, PatchMerging):
            return tokens
        order = self.get_buffer(f"merging{number}")
        if order.numel() > tokens.shape[-2]:  # an odd map is padded with zeros
            blank = tokens.new_zeros(1, 1).expand(*tokens.shape[:-2], 1, tokens.shape[-1])
            tokens = torch.cat((tokens, blank), dim=-2)
        four = tokens.index_select(-2, order).unflatten(-2, (-1, 4)).flatten(-2)  # [..., N', 4 D]
        return cast(Tensor, merging.reduction(merging.norm(four)))

    def widen(self, number: int, tokens: Tensor) -> Tensor:
        """Widen tokens [..., P, D] without a place as if four equal ones were merged: [..., P, D']."""
        merging = cast(PatchMerging, _stages(self.model)[number].downsample)
        return cast(Tensor, merging.reduction(merging.norm(torch.cat((tokens,) * 4, dim=-1))))

    def norm1(self, index: int, tokens: Tensor) -> Tensor:
        """The norm before block ``index``'s attention."""
        return cast(Tensor, self.block(index).norm1(tokens))

    def qkv(self, index: int, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., H, N, d] from normed tokens [..., N, D]."""
        return self.query(index, normed), *self.key_value(index, normed)

    def query(self, index: int, normed: Tensor) -> Tensor:
        """Only the queries, [..., H, N, d]."""
        return self._heads(index, normed, 0)

    def key_value(self, index: int, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Only the keys and values, [..., H, N, d] each."""
        return self._heads(index, normed, 1), self._heads(index, normed, 2)

    def _heads(self, index: int, normed: Tensor, part: int) -> Tensor:
        """Queries (part 0), keys (1) or values (2), [..., H, N, d], computed with their own rows of the weight."""
        attention = self.attention(index)
        size = attention.qkv.out_features // 3
        rows = slice(part * size, (part + 1) * size)
        bias = attention.qkv.bias
        projected = F.linear(normed, attention.qkv.weight[rows], None if bias is None else bias[rows])
        heads: Tensor = projected.unflatten(-1, (attention.num_heads, -1))  # [..., N, H, d]
        return heads.transpose(-3, -2)

    def padding(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a padded place, [H, 1, d] each: timm pads after the norm, so these are biases."""
        bias, heads = self.attention(index).qkv.bias, self.attention(index).num_heads
        if bias is None:
            bias = self.attention(index).qkv.weight.new_zeros(self.attention(index).qkv.out_features)
        query, key, value = bias.unflatten(0, (3, heads, 1, -1)).unbind(0)
        return query, key, value

    def attend_windows(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Block ``index``'s own attention, shift, bias and mask included: [..., H, N, d] each to [..., N, H d]."""
        return cast(Tensor, self.windows[index](q, k, v, self.padding(index)))

    def attend_prompted(
        self, index: int, parts: tuple[Tensor, Tensor, Tensor], prompts: tuple[Tensor | None, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """The same attention with prompts before every window, see :meth:`Windows.with_prompts`."""
        windows = cast(Windows, self.windows[index])
        return windows.with_prompts(parts, self.padding(index), prompts)

    def project(self, index: int, attended: Tensor) -> Tensor:
        """Apply the block's projection to attention output with merged heads [..., N, H d]."""
        return cast(Tensor, self.attention(index).proj(attended))

    def feed_forward(self, index: int, tokens: Tensor) -> Tensor:
        """The second half of block ``index`` with its residual, [..., N, D]."""
        block = self.block(index)
        return cast(Tensor, tokens + block.mlp(block.norm2(tokens)))

    def feed_forward_both(self, index: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The second half of block ``index`` for two pathways, [2, B, N, D] to twice [B, N, D]."""
        if not one_batch(tokens, self.block(index).mlp.fc1.out_features):
            return self.feed_forward(index, tokens[0]), self.feed_forward(index, tokens[1])
        first, second = self.feed_forward(index, tokens).unbind(0)
        return first, second

    def run_block(self, index: int, tokens: Tensor) -> Tensor:
        """All of block ``index``, [..., N, D] to [..., N, D]."""
        attended = self.attend_windows(index, *self.qkv(index, self.norm1(index, tokens)))
        return self.feed_forward(index, tokens + self.project(index, attended))

    def run_stages(self, tokens: Tensor, numbers: range) -> Tensor:
        """Whole stages with their patch merging, [..., N, D] to [..., N', D']."""
        for number in numbers:
            tokens = self.merge(number, tokens)
            for index in self.stages[number].blocks:
                tokens = self.run_block(index, tokens)
                probe(f"block{index}", tokens)
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        """Final norm and the model's own pooling: [B, N, D] to [B, D]."""
        normed = self.model.norm(tokens).unflatten(1, self.stages[-1].grid)  # [B, R, C, D]
        return cast(Tensor, self.model.forward_head(normed, pre_logits=True))
