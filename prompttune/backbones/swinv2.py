"""timm's SwinTransformerV2, opened up as Swin v1 is: cosine attention, a position bias by an MLP, norms that follow.

The tensors and the arithmetic are timm's (https://github.com/huggingface/pytorch-image-models,
``timm/models/swin_transformer_v2.py``); the model is https://arxiv.org/abs/2111.09883. The position bias and the scale
of the scores do not depend on the image and are computed once while the weights are frozen.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch.nn.functional as F
from timm.models import swin_transformer_v2 as v2
from torch import Tensor

from prompttune.backbones.base import Architecture
from prompttune.backbones.blocks import Constant
from prompttune.backbones.swin import SwinBackbone, SwinBlock, swin_problem, wrap_swin

LARGEST_SCALE = math.log(100)
"""timm's bound on the logarithm of a head's scale."""


class SwinV2Block(SwinBlock):
    """A block whose norms follow its attention and its MLP; scores are cosines times a learned scale.

    Args:
        timm, index, grid: see :class:`SwinBlock`.
    """

    def __init__(self, timm: Any, index: int, grid: tuple[int, int]) -> None:
        super().__init__(timm, index, grid)
        self.factor = Constant(self.scale)
        self.windows.add_module("factor", self.factor)  # the backbone holds the windows

    def position_bias(self) -> Tensor:
        """See :meth:`SwinBlock.position_bias`."""
        attention, area = self.timm.attn, self.timm.window_area
        table = attention.cpb_mlp(attention.relative_coords_table).view(-1, self.num_heads)
        bias: Tensor = table[attention.relative_position_index.view(-1)].view(area, area, -1).permute(2, 0, 1)
        return bias.sigmoid().mul(16).float().contiguous()

    def scale(self) -> Tensor:
        """The factor of each head's queries, float32 [H, 1, 1]: the scores are divided by the root of d later."""
        learned: Tensor = self.timm.attn.logit_scale.float().clamp(max=LARGEST_SCALE).exp()
        return learned.mul(self.head_dim**0.5)

    def norm1(self, tokens: Tensor) -> Tensor:
        """The tokens themselves."""
        return tokens

    def query_heads(self, projected: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.query_heads`; scaled to the length of the head's factor."""
        scaled: Tensor = F.normalize(self.heads(projected).float(), dim=-1) * self.factor()
        return scaled.to(projected.dtype)

    def key_heads(self, projected: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.key_heads`; scaled to the length 1."""
        return F.normalize(self.heads(projected).float(), dim=-1).to(projected.dtype)

    def project(self, attended: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.project`; with the norm that follows."""
        return cast(Tensor, self.timm.norm1(super().project(attended)))

    def mlp(self, tokens: Tensor) -> Tensor:
        """See :meth:`AttentionBlock.mlp`; with the norm that follows."""
        return cast(Tensor, self.timm.norm2(self.timm.mlp(tokens)))


class SwinV2Backbone(SwinBackbone):
    """A frozen timm SwinTransformerV2 of any size, window and image size."""

    block_kind = SwinV2Block

    def reduce(self, number: int, four: Tensor) -> Tensor:
        """See :meth:`SwinBackbone.reduce`; the norm follows."""
        merging = self.model.layers[number].downsample
        return cast(Tensor, merging.norm(merging.reduction(four)))


SWINV2 = Architecture(
    models=(v2.SwinTransformerV2,),
    modules=("swin_transformer_v2",),
    problem=lambda model: swin_problem(
        model, v2.SwinTransformerV2, v2.PatchMerging, v2.SwinTransformerV2Block, v2.WindowAttention
    ),
    wrap=lambda *of: wrap_swin(SwinV2Backbone, *of),
    kind=SwinV2Backbone,
    rename=v2.checkpoint_filter_fn,
)
