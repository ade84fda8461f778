"""AdaptFormer: https://arxiv.org/abs/2205.13535 (NeurIPS 2022).

A bottleneck with ReLU runs parallel to the MLP of every block. It reads the tokens that enter the second half of the
block, before their norm; its output is scaled and added to the MLP's:
``x + MLP(norm2(x)) + s up(ReLU(down(x)))``. This is the released code's default form; the paper's Eq. 3 has a norm
before ``down``, which that default leaves out.

The scale folds into ``up``. The released code does not support LayerScale; on a backbone with LayerScale, the block's
scale acts only on the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBlock
from prompttune.layers.bottleneck import Bottleneck, bottleneck, of_block, stacked, stacked_layout
from prompttune.methods.base import RANK, Layout, State, implements, setting
from prompttune.methods.over_vit import BlocksConfig, InsideBlocks


@dataclass(frozen=True)
class AdaptFormerConfig(BlocksConfig):
    """Settings of AdaptFormer; the defaults are the paper's."""

    method = "adaptformer"
    summary = "Bottleneck adapters parallel to the MLPs"
    paper = "https://arxiv.org/abs/2205.13535"

    rank: int = setting(64, "width of the adapters' bottleneck", above=0)
    adapter_scale: float = setting(0.1, "weight s of the adapters' output")
    dropout: float = setting(0.1, "dropout inside the adapters, while training", low=0, below=1)


@implements(AdaptFormerConfig)
class AdaptFormer(InsideBlocks):
    """``adapters.{i}`` with ``down`` D to r and ``up`` r to D, for every changed block."""

    config: AdaptFormerConfig

    def __init__(self, config: AdaptFormerConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.adapters = nn.ModuleList(_adapter(backbone.width, config.rank) for _ in self.changed)

    def task_state(self) -> State:
        """``adapters.*``, stacked over blocks, ``up`` and its bias scaled by s."""
        return stacked("adapters", self.adapters, self.config.adapter_scale)

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        return stacked_layout("adapters", len(self.changed), self.backbone.width, RANK)

    def run_block(self, block: VitBlock, tokens: Tensor, state: State, whole: bool) -> Tensor:
        """See :meth:`InsideBlocks.run_block`."""
        tokens = block.read(tokens, whole) + block.self_attention(tokens, whole)  # [B, 1 or N, D]
        own, dropout = of_block(state, "adapters", self.place(block)), self.config.dropout
        adapted = bottleneck(tokens, own, "relu", dropout, self.training)
        return block.feed_forward(tokens) + adapted


def _adapter(width: int, rank: int) -> Bottleneck:
    made = Bottleneck(width, rank)
    nn.init.kaiming_uniform_(made.down.weight, a=math.sqrt(5))
    for zero in (made.down.bias, made.up.weight, made.up.bias):
        nn.init.zeros_(zero)
    return made
