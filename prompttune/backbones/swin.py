"""timm's SwinTransformer (Swin v1), opened up: the parts that prompt methods drive.

The tensors and the arithmetic are timm's (https://github.com/huggingface/pytorch-image-models,
``timm/models/swin_transformer.py``); the model is https://arxiv.org/abs/2103.14030. Maps are kept as tokens
[..., N, D], row by row, with any leading axes, so that two pathways can run as one batch. N = R C tokens of a stage's
grid, no prefix tokens; H heads of d channels.
"""

from __future__ import annotations

from typing import cast

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
    checkpoint_filter_fn,
)
from torch import Tensor, nn

from prompttune.backbones.base import Architecture, Backbone, set_patch_input
from prompttune.backbones.blocks import AttentionBlock, Stage
from prompttune.backbones.windows import Windows, merging_order
from prompttune.layers.probe import probe


def _problem(model: SwinTransformer) -> str:
    if type(model) is not SwinTransformer:
        return f"it is a {type(model).__name__}"
    if type(model.patch_embed) is not PatchEmbed:
        return f"its patch embedding is a {type(model.patch_embed).__name__}"
    if model.global_pool == "":
        return "it has no pooling"
    for stage in _stages(model):
        if type(stage.downsample) not in (PatchMerging, nn.Identity):
            return f"it merges patches with {type(stage.downsample).__name__}"
        for block in _blocks(stage):
            if type(block) is not SwinTransformerBlock or type(block.attn) is not WindowAttention:
                return f"its blocks are {type(block).__name__} with {type(block.attn).__name__}"
    return ""


def _stages(model: SwinTransformer) -> list[SwinTransformerStage]:
    return list(model.layers)


def _blocks(stage: SwinTransformerStage) -> list[SwinTransformerBlock]:
    return list(stage.blocks)


class SwinBlock(AttentionBlock):
    """A block whose attention stays in windows, for one size of the map.

    Args:
        timm: the frozen timm block.
        index: number of the block.
        windows: the windows of its attention.
    """

    timm: SwinTransformerBlock

    def __init__(self, timm: SwinTransformerBlock, index: int, windows: Windows) -> None:
        super().__init__(timm, index)
        self.windows = windows

    @property
    def padding(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a padded place, [H, 1, d] each: timm pads after the norm, so these are biases."""
        joint = self.timm.attn.qkv
        bias = joint.weight.new_zeros(joint.out_features) if joint.bias is None else joint.bias
        query, key, value = bias.unflatten(0, (3, self.num_heads, 1, -1)).unbind(0)
        return query, key, value

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.attend`; shift, position bias and mask of the windows included."""
        return cast(Tensor, self.windows(q, k, v, self.padding))


class SwinBackbone(Backbone):
    """A frozen timm SwinTransformer of any size, window and image size.

    Blocks are numbered over all stages; ``depth`` counts them all, ``grid`` is the map of the patch embedding and
    ``width`` the channels of the last stage.
    """

    model: SwinTransformer
    blocks: tuple[SwinBlock, ...]

    def __init__(self, model: SwinTransformer) -> None:
        super().__init__(model)
        self.image_size = int(model.patch_embed.img_size[0])
        rows, columns = model.patch_embed.grid_size
        self.grid = (int(rows), int(columns))
        self.patch_size = int(model.patch_embed.patch_size[0])
        self.width = int(model.num_features)
        stages: list[Stage[SwinBlock]] = []
        self.windows = nn.ModuleList()
        grid = self.grid
        for number, layer in enumerate(_stages(model)):
            if isinstance(layer.downsample, PatchMerging):
                order, grid = merging_order(grid)
                self.register_buffer(f"merging{number}", order, persistent=False)
            blocks = []
            for timm in _blocks(layer):
                windows = Windows(timm, grid)
                blocks.append(SwinBlock(timm, len(self.windows), windows))
                self.windows.append(windows)
            stages.append(Stage(tuple(blocks), grid, int(blocks[0].timm.dim)))
        self.stages = tuple(stages)
        self.blocks = tuple(block for stage in stages for block in stage.blocks)
        self.depth = len(self.blocks)

    def requires_grad_(self, requires_grad: bool = True) -> SwinBackbone:
        """Let the weights train, or freeze them with the windows' position bias at its current value."""
        super().requires_grad_(requires_grad)
        for windows in self.windows:
            cast(Windows, windows).freeze(not requires_grad)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """See :meth:`Backbone.forward`."""
        self.check_images(images)
        return self.pool(self.run_stages(self.embed(images), range(len(self.stages))))

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] to the tokens [B, N, D] that enter stage 0."""
        # The patch convolution may have a higher precision than the blocks.
        patches = self.model.patch_embed(images.to(self.model.patch_embed.proj.weight.dtype))  # [B, R, C, D]
        tokens = cast(Tensor, patches.flatten(1, 2).to(self.token_dtype or self.blocks[0].timm.attn.proj.weight.dtype))
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

    def run_stages(self, tokens: Tensor, numbers: range) -> Tensor:
        """Whole stages with their patch merging, [..., N, D] to [..., N', D']."""
        for number in numbers:
            tokens = self.merge(number, tokens)
            for block in self.stages[number].blocks:
                tokens = block.run(tokens)
                probe(f"block{block.index}", tokens)
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        """Final norm and the model's own pooling: [B, N, D] to [B, D]."""
        normed = self.model.norm(tokens).unflatten(1, self.stages[-1].grid)  # [B, R, C, D]
        return cast(Tensor, self.model.forward_head(normed, pre_logits=True))


def _wrap(model: SwinTransformer, name: str, image_size: int | None) -> SwinBackbone:
    # The model's own windows, as timm.create_model(img_size=...) has: set_input_size alone would scale them.
    set_patch_input(model, name, image_size, window_size=model._ref_window_sizes)
    return SwinBackbone(model)


SWIN = Architecture(
    models=(SwinTransformer,),
    modules=("swin_transformer",),
    supported="timm SwinTransformer models (Swin v1)",
    problem=_problem,
    wrap=_wrap,
    kind=SwinBackbone,
    rename=checkpoint_filter_fn,
)
