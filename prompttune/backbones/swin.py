"""timm's SwinTransformer (Swin v1), opened up: the parts that prompt methods drive.

The tensors and the arithmetic are timm's (https://github.com/huggingface/pytorch-image-models,
``timm/models/swin_transformer.py``); the model is https://arxiv.org/abs/2103.14030. Maps are kept as tokens
[..., N, D], row by row, with any leading axes, so that two pathways can run as one batch. N = R C tokens of a stage's
grid, no prefix tokens; H heads of d channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    checkpoint_filter_fn,
)
from torch import Tensor, nn

from prompttune.backbones.base import Architecture, PatchBackbone, StagedBackbone, set_patch_input
from prompttune.backbones.blocks import KEY, QUERY, VALUE, AttentionBlock, Stage
from prompttune.backbones.windows import Windows, merging_order
from prompttune.layers.probe import probe


def swin_problem(
    model: Any, kind: type[nn.Module], merging: type[nn.Module], block: type[nn.Module], attention: type[nn.Module]
) -> str:
    """The reason why a model cannot be driven as a ``kind`` with such parts; empty if it can."""
    if type(model) is not kind:
        return f"it is a {type(model).__name__}"
    if type(model.patch_embed) is not PatchEmbed:
        return f"its patch embedding is a {type(model.patch_embed).__name__}"
    if model.global_pool == "":
        return "it has no pooling"
    for stage in cast(nn.Sequential, model.layers):
        if type(stage.downsample) not in (merging, nn.Identity):
            return f"it merges patches with {type(stage.downsample).__name__}"
        for one in cast(nn.Sequential, stage.blocks):
            if type(one) is not block or type(one.attn) is not attention:
                return f"its blocks are {type(one).__name__} with {type(one.attn).__name__}"
    return ""


class SwinBlock(AttentionBlock):
    """A block whose attention stays in windows, for one size of the map.

    Args:
        timm: the frozen timm block.
        index: number of the block.
        grid: rows and columns of the map.
    """

    def __init__(self, timm: Any, index: int, grid: tuple[int, int]) -> None:
        super().__init__(timm, index)
        self.windows = Windows(timm, grid, self.position_bias)

    def position_bias(self) -> Tensor:
        """The relative position bias of a window's A places, float32 [H, A, A]."""
        bias: Tensor = self.timm.attn._get_rel_pos_bias()[0].float().contiguous()
        return bias

    @property
    def padding(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a padded place, [H, 1, d] each: timm pads after the norm, so these are biases."""
        query, key, value = (
            weight.new_zeros(1, len(weight)) if bias is None else bias.unsqueeze(0)  # [1, H d]
            for weight, bias in map(self.projection, (QUERY, KEY, VALUE))
        )
        return self.query_heads(query), self.key_heads(key), self.heads(value)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.attend`; shift, position bias and mask of the windows included."""
        return cast(Tensor, self.windows(q, k, v, self.padding))


class SwinBackbone(PatchBackbone, StagedBackbone):
    """A frozen timm SwinTransformer of any size, window and image size; ``x`` are tokens [..., N, D]."""

    model: Any
    blocks: tuple[SwinBlock, ...]
    stages: tuple[Stage[SwinBlock], ...]
    block_kind: type[SwinBlock] = SwinBlock

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.width = int(model.num_features)
        stages: list[Stage[SwinBlock]] = []
        grid, index = self.grid, 0
        for number, layer in enumerate(model.layers):
            if not isinstance(layer.downsample, nn.Identity):
                order, grid = merging_order(grid)
                self.register_buffer(f"merging{number}", order, persistent=False)
            blocks = tuple(self.block_kind(timm, index + place, grid) for place, timm in enumerate(layer.blocks))
            index += len(blocks)
            stages.append(Stage(blocks, grid, int(blocks[0].timm.dim)))
        self.set_stages(stages)
        self.windows = nn.ModuleList(block.windows for block in self.blocks)

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to the tokens [B, N, D] that enter stage 0."""
        tokens = self.embed_patches(images)
        probe("embed", tokens)
        return tokens

    def position(self, tokens: Tensor) -> Tensor:
        """Apply the image tokens' patch norm to prompt tokens [1, N, D]; positions are embedded in the blocks."""
        return cast(Tensor, self.model.patch_embed.norm(tokens))

    def enter(self, number: int, x: Tensor) -> Tensor:
        """Patch merging before stage ``number``, [..., N, D] to [..., N', D']; stage 0 has none."""
        if isinstance(self.model.layers[number].downsample, nn.Identity):
            return x
        order = self.get_buffer(f"merging{number}")
        if order.numel() > x.shape[-2]:  # an odd map is padded with zeros
            x = torch.cat((x, x.new_zeros(1, 1).expand(*x.shape[:-2], 1, x.shape[-1])), dim=-2)
        return self.reduce(number, x.index_select(-2, order).unflatten(-2, (-1, 4)).flatten(-2))

    def reduce(self, number: int, four: Tensor) -> Tensor:
        """The projection of four neighbours, side by side, before stage ``number``: [..., N', 4 D] to [..., N', D']."""
        merging = self.model.layers[number].downsample
        return cast(Tensor, merging.reduction(merging.norm(four)))

    def pool(self, x: Tensor) -> Tensor:
        """Final norm and the model's own pooling: [B, N, D] to [B, D]."""
        normed = self.model.norm(x).unflatten(1, self.stages[-1].grid)  # [B, R, C, D]
        return cast(Tensor, self.model.forward_head(normed, pre_logits=True))


def wrap_swin(kind: type[SwinBackbone], model: Any, name: str, image_size: int | None) -> SwinBackbone:
    """The backbone over a model that is resized to ``image_size`` pixels, see :func:`set_patch_input`."""
    # The model's own windows, as timm.create_model(img_size=...) has: set_input_size alone would scale them.
    set_patch_input(model, name, image_size, window_size=model._ref_window_sizes)
    return kind(model)


SWIN = Architecture(
    models=(SwinTransformer,),
    modules=("swin_transformer",),
    problem=lambda model: swin_problem(model, SwinTransformer, PatchMerging, SwinTransformerBlock, WindowAttention),
    wrap=lambda *of: wrap_swin(SwinBackbone, *of),
    kind=SwinBackbone,
    rename=checkpoint_filter_fn,
)
