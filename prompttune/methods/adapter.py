"""Serial bottleneck adapters, Houlsby et al.: https://arxiv.org/abs/1902.00751 (ICML 2019).

Each block has two adapters: one after the projection of the attention, one after the MLP, both before the residual
addition and with their own skip connection: ``x + A(attention(norm1(x)))``, ``A(z) = z + up(GELU(down(z)))``.

The weights start from a normal distribution of standard deviation 1e-3, cut off at two of these, as released: close to
the identity. Deviations: the paper's BERT norms after the addition, a ViT before it, and the places are kept; GELU is
exact, the released code has the tanh approximation; the paper also trains the backbone's norms, here the backbone
stays frozen. LayerScale counts as part of the projection, so the adapter comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone
from prompttune.layers.bottleneck import Bottleneck, bottleneck, of_block, stacked, stacked_layout
from prompttune.layers.probe import probe
from prompttune.methods.base import RANK, Features, Layout, MethodConfig, MethodOver, State, implements, setting
from prompttune.methods.maps import Levels, MapReader

INIT_STD = 1e-3


@dataclass(frozen=True)
class AdapterConfig(MethodConfig):
    """Settings of the serial adapters."""

    method = "adapter"
    summary = "Bottleneck adapters after attention and MLP"
    paper = "https://arxiv.org/abs/1902.00751"

    rank: int = setting(64, "width of the adapters' bottleneck", above=0)
    dropout: float = setting(0.0, "dropout inside the adapters, while training", low=0, below=1)


@implements(AdapterConfig)
class SerialAdapter(MethodOver[VitBackbone]):
    """``attention.{i}`` and ``mlp.{i}`` with ``down`` D to r and ``up`` r to D, for every block."""

    backbones = (VitBackbone,)
    gives_maps_on = (VitBackbone,)

    def __init__(self, config: AdapterConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        backbone = self.backbone
        self.config = config
        self.attention = nn.ModuleList(_adapter(backbone.width, config.rank) for _ in range(backbone.depth))
        self.mlp = nn.ModuleList(_adapter(backbone.width, config.rank) for _ in range(backbone.depth))

    def task_state(self) -> State:
        """``attention.*`` and ``mlp.*``, stacked over blocks."""
        return stacked("attention", self.attention) | stacked("mlp", self.mlp)

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        depth, width = self.backbone.depth, self.backbone.width
        return stacked_layout("attention", depth, width, RANK) | stacked_layout("mlp", depth, width, RANK)

    def forward(self, images: Tensor, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        backbone = self.backbone
        reader, tokens = MapReader(backbone, levels), backbone.embed(images)  # [B, N, D]
        for index in range(backbone.depth):
            attended = backbone.self_attention(index, tokens, reader.whole)  # [B, 1 or N, D]
            tokens = backbone.read(index, tokens, reader.whole) + self._adapt("attention", index, attended, state)
            tokens = tokens + self._adapt("mlp", index, backbone.mlp(index, tokens), state)
            reader.read(index, tokens)
            probe(f"block{index}", tokens)
        return Features(backbone.pool(tokens), maps=reader.maps)

    def _adapt(self, name: str, index: int, z: Tensor, state: State) -> Tensor:
        """z + up(GELU(down(z))), [B, N, D]."""
        tensors, dropout = of_block(state, name, index), self.config.dropout
        return z + bottleneck(z, **tensors, activation="gelu", dropout=dropout, training=self.training)


def _adapter(width: int, rank: int) -> Bottleneck:
    made = Bottleneck(width, rank)
    for layer in (made.down, made.up):
        nn.init.trunc_normal_(layer.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
        nn.init.zeros_(layer.bias)
    return made
