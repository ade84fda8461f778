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
from prompttune.backbones.vit import VitBackbone
from prompttune.layers.bottleneck import Bottleneck, bottleneck, of_block, stacked, stacked_layout
from prompttune.layers.probe import probe
from prompttune.methods.base import RANK, Features, Layout, MethodConfig, MethodOver, State, implements, setting
from prompttune.methods.maps import Levels, MapReader


@dataclass(frozen=True)
class AdaptFormerConfig(MethodConfig):
    """Settings of AdaptFormer; the defaults are the paper's."""

    method = "adaptformer"
    summary = "Bottleneck adapters parallel to the MLPs"
    paper = "https://arxiv.org/abs/2205.13535"

    rank: int = setting(64, "width of the adapters' bottleneck", above=0)
    adapter_scale: float = setting(0.1, "weight s of the adapters' output")
    dropout: float = setting(0.1, "dropout inside the adapters, while training", low=0, below=1)


@implements(AdaptFormerConfig)
class AdaptFormer(MethodOver[VitBackbone]):
    """``adapters.{i}`` with ``down`` D to r and ``up`` r to D, for every block."""

    backbones = (VitBackbone,)
    gives_maps_on = (VitBackbone,)

    def __init__(self, config: AdaptFormerConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        backbone = self.backbone
        self.config = config
        self.adapters = nn.ModuleList(_adapter(backbone.width, config.rank) for _ in range(backbone.depth))

    def task_state(self) -> State:
        """``adapters.*``, stacked over blocks, ``up`` and its bias scaled by s."""
        return stacked("adapters", self.adapters, self.config.adapter_scale)

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        backbone = self.backbone
        return stacked_layout("adapters", backbone.depth, backbone.width, RANK)

    def forward(self, images: Tensor, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        backbone = self.backbone
        reader, tokens = MapReader(backbone, levels), backbone.embed(images)  # [B, N, D]
        for index in range(backbone.depth):
            attended = backbone.self_attention(index, tokens, reader.whole)  # [B, 1 or N, D]
            tokens = backbone.read(index, tokens, reader.whole) + attended
            adapted = bottleneck(
                tokens, **of_block(state, "adapters", index), activation="relu",
                dropout=self.config.dropout, training=self.training,
            )  # fmt: skip
            tokens = backbone.feed_forward(index, tokens) + adapted
            reader.read(index, tokens)
            probe(f"block{index}", tokens)
        return Features(backbone.pool(tokens), maps=reader.maps)


def _adapter(width: int, rank: int) -> Bottleneck:
    made = Bottleneck(width, rank)
    nn.init.kaiming_uniform_(made.down.weight, a=math.sqrt(5))
    for zero in (made.down.bias, made.up.weight, made.up.bias):
        nn.init.zeros_(zero)
    return made
