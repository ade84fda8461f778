"""Task tokens that read a frozen image: our own method, without a paper.

P tokens of the task travel through the blocks. In each block they ask the image's frozen keys and values through the
block's own norm, queries, attention and projection; the task adds a vector in front of the norm, one to the query, and
a bottleneck behind the attention, by default in place of the block's MLP. The image's tokens never see them: one pass
over the image serves all its tasks, whose tokens stand side by side as queries. The head reads the tokens after the
middle block and after the last.

Relatives: Visual Query Tuning (https://arxiv.org/abs/2212.03220) has new queries in each block, which do not travel;
EXPRES (https://arxiv.org/abs/2303.15591) has travelling tokens that the image's tokens see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.blocks import QUERY
from prompttune.backbones.vit import VitBackbone, VitBlock
from prompttune.layers.bottleneck import plain_norm
from prompttune.layers.probe import probe
from prompttune.methods.base import RANK, Features, Layout, Levels, MethodConfig, MethodOver, State, implements, setting
from prompttune.methods.over_vit import keys_and_values

INIT_STD = 0.02


@dataclass(frozen=True)
class ReaderConfig(MethodConfig):
    """Settings of the reader."""

    method = "reader"
    summary = "Task tokens that read the image's frozen keys and values"
    shapes_graph = ("num_prompts", "mlp")

    num_prompts: int = setting(4, "task tokens", above=0)
    rank: int = setting(16, "rank r of the bottleneck of each block", above=0)
    mlp: bool = setting(False, "pass the task tokens through the blocks' frozen MLPs too")

    def resolved(self, backbone: Backbone) -> ReaderConfig:
        """The same settings; as many tokens as an image's would be turned as patches where an embedding is rotary."""
        most = cast(VitBackbone, backbone).num_tokens - 1
        self.require(self.num_prompts <= most, f"num_prompts must be at most {most}, below the tokens of an image")
        return self


@implements(ReaderConfig)
class Reader(MethodOver[VitBackbone]):
    """``tokens`` [P, D], ``before`` [L, P, D], ``query`` [L, P, H d], ``down`` [L, D, r], ``up`` [L, r, D]."""

    backbones = (VitBackbone,)
    only_reads = True
    config: ReaderConfig

    def __init__(self, config: ReaderConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        count, rank, depth, width = config.num_prompts, config.rank, backbone.depth, backbone.width
        self.read = sorted({max(depth // 2, 1) - 1, depth - 1})
        """Blocks after which the head reads the tokens."""
        self.tokens = nn.Parameter(_class_token(self.backbone) + INIT_STD * torch.randn(count, width))
        self.before = nn.Parameter(torch.zeros(depth, count, width))
        self.query = nn.Parameter(torch.zeros(depth, count, self.backbone.num_heads * self.backbone.head_dim))
        self.down = nn.Parameter(torch.randn(depth, width, rank) / math.sqrt(width))
        self.up = nn.Parameter(torch.zeros(depth, rank, width))

    @property
    def width(self) -> int:
        """See :attr:`Method.width`: all tokens of the blocks that are read."""
        return len(self.read) * self.config.num_prompts * self.backbone.width

    def task_state(self) -> State:
        """``tokens`` [1, P, D]; ``start`` [1, H, P, d], block 0's queries; ``before`` and ``query`` of the others;
        ``down.{i}`` [1, D, r] and ``up.{i}`` [1, r, D] of each block by itself, so that none is cut from a copy."""
        start = self._ask(self.backbone.blocks[0], self.tokens, self.before[0], self.query[0])
        state = {"tokens": self.tokens, "start": start, "before": self.before[1:], "query": self.query[1:]}
        for name, parts in (("down", self.down), ("up", self.up)):
            state |= {f"{name}.{index}": part for index, part in enumerate(parts)}
        return {name: tensor.unsqueeze(0) for name, tensor in state.items()}

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        width, layout = self.backbone.width, super().state_layout()
        for index in range(self.backbone.depth):
            layout |= {f"down.{index}": (width, RANK), f"up.{index}": (RANK, width)}
        return layout

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:  # noqa: ARG002
        """Keys and values of every block, ``key.{i}`` and ``value.{i}`` [B, H, N, d]."""
        found = keys_and_values(self.backbone, images)
        return {name: tensor for name, tensor in found.items() if name != "tokens"}

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        tokens, found = state["tokens"], []  # [1 or B K, P, D]
        for block in self.backbone.blocks:
            at, query = block.index, state["start"]
            if at:
                query = self._ask(block, tokens, state["before"][:, at - 1], state["query"][:, at - 1])
            attended = attend_side_by_side(block, query, image[f"key.{at}"], image[f"value.{at}"])
            tokens = tokens + block.project(attended)  # [B K, P, D]
            added = F.gelu(tokens @ state[f"down.{at}"]) @ state[f"up.{at}"]
            tokens = (block.feed_forward(tokens) if self.config.mlp else tokens) + added
            probe(f"reader{at}", tokens)
            if at in self.read:
                found.append(self.backbone.normed(tokens).flatten(1))
        # the head's weights take the place of a scale and a shift behind this norm
        return Features(plain_norm(torch.cat(found, dim=1)))

    def _ask(self, block: VitBlock, tokens: Tensor, before: Tensor, query: Tensor) -> Tensor:
        """Queries [..., H, P, d] of tokens, with vectors in front of the norm [..., P, D] and of the query
        [..., P, H d]."""
        return block.query_heads(block.linear_qkv(block.norm1(tokens + before), QUERY) + query)


def attend_side_by_side(block: VitBlock, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What queries [1 or B K, H, P, d] see of the keys and values [B, H, N, d] of their image: [B K, P, H d].

    The queries of the K tasks of an image stand side by side, so that nothing of the image is repeated.
    """
    count = query.shape[-2]
    if query.shape[0] != 1:
        query = query.unflatten(0, (key.shape[0], -1)).transpose(1, 2).flatten(2, 3)  # [B, H, K P, d]
    seen: Tensor = block.attend(query, key, value).unflatten(1, (-1, count))  # [B, K, P, H d]
    return seen.flatten(0, 1)


def _class_token(backbone: VitBackbone) -> Tensor:
    """The first prefix token that enters block 0, [D]; zero without one."""
    if not backbone.num_prefix_tokens:
        return torch.zeros(backbone.width)
    weight = backbone.blocks[0].timm.attn.proj.weight
    return backbone.place(weight.new_zeros(1, backbone.grid[0] * backbone.grid[1], backbone.width))[0, 0].detach()
