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
from prompttune.backbones.vit import VitBlock
from prompttune.layers.bottleneck import Bottleneck, bottleneck, of_block, stacked, stacked_layout
from prompttune.methods.base import RANK, Layout, State, implements, setting
from prompttune.methods.over_vit import BlocksConfig, InsideBlocks

INIT_STD = 1e-3


@dataclass(frozen=True)
class AdapterConfig(BlocksConfig):
    """Settings of the serial adapters."""

    method = "adapter"
    summary = "Bottleneck adapters after attention and MLP"
    paper = "https://arxiv.org/abs/1902.00751"

    rank: int = setting(64, "width of the adapters' bottleneck", above=0)
    dropout: float = setting(0.0, "dropout inside the adapters, while training", low=0, below=1)


@implements(AdapterConfig)
class SerialAdapter(InsideBlocks):
    """``attention.{i}`` and ``mlp.{i}`` with ``down`` D to r and ``up`` r to D, for every changed block."""

    config: AdapterConfig

    def __init__(self, config: AdapterConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.attention = nn.ModuleList(_adapter(backbone.width, config.rank) for _ in self.changed)
        self.mlp = nn.ModuleList(_adapter(backbone.width, config.rank) for _ in self.changed)

    def task_state(self) -> State:
        """``attention.*`` and ``mlp.*``, stacked over blocks."""
        return stacked("attention", self.attention) | stacked("mlp", self.mlp)

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        depth, width = len(self.changed), self.backbone.width
        return stacked_layout("attention", depth, width, RANK) | stacked_layout("mlp", depth, width, RANK)

    def run_block(self, block: VitBlock, tokens: Tensor, state: State, whole: bool) -> Tensor:
        """See :meth:`InsideBlocks.run_block`."""
        attended = block.self_attention(tokens, whole)  # [B, 1 or N, D]
        tokens = block.read(tokens, whole) + self._adapt("attention", self.place(block), attended, state)
        return tokens + self._adapt("mlp", self.place(block), block.mlp(tokens), state)

    def _adapt(self, name: str, place: int, z: Tensor, state: State) -> Tensor:
        """z + up(GELU(down(z))), [B, N, D]."""
        return z + bottleneck(z, of_block(state, name, place), "gelu", self.config.dropout, self.training)


def _adapter(width: int, rank: int) -> Bottleneck:
    made = Bottleneck(width, rank)
    for layer in (made.down, made.up):
        nn.init.trunc_normal_(layer.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
        nn.init.zeros_(layer.bias)
    return made
