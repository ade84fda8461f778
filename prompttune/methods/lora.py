"""LoRA, low-rank adaptation of the attention's projections: https://arxiv.org/abs/2106.09685 (ICLR 2022).

In every block ``W_q`` and ``W_v``, with ``targets qkv`` also ``W_k``, become ``W + (α / r) up down``. The products are
never merged into the frozen weights: each row of a batch may belong to another task, so each row uses its own ``down``
and ``up``. The factor α / r folds into ``up``.

q and v are adapted by default as in the paper; ``down`` starts Kaiming-uniform (as released; the paper says Gaussian)
and ``up`` at zero. A backbone that norms its queries and keys norms the sums, as with merged weights. timm
keeps q, k and v in one matrix, so a library that adapts it as a whole (PEFT's ``target_modules="qkv"``) shares one
``down`` between the three: ``targets qkv`` with equal ``down``, see ``checkpoints/importing/peft.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.blocks import KEY, QUERY, VALUE
from prompttune.backbones.vit import VitBlock
from prompttune.methods.base import RANK, Layout, State, implements, setting
from prompttune.methods.over_vit import BlocksConfig, InsideBlocks

TARGETS = {"qv": ("query", "value"), "qkv": ("query", "key", "value")}
"""Projections that each choice of targets adapts."""


@dataclass(frozen=True)
class LoRAConfig(BlocksConfig):
    """Settings of LoRA."""

    method = "lora"
    summary = "Low-rank updates of the attention projections"
    paper = "https://arxiv.org/abs/2106.09685"
    shapes_graph = ("targets",)

    rank: int = setting(4, "rank r of the weight updates", above=0)
    alpha: float = setting(4.0, "α; the updates are scaled by α / r", above=0)
    targets: str = setting("qv", "projections to adapt: queries and values, or also keys", tuple(TARGETS))
    dropout: float = setting(0.0, "dropout on the input of the low-rank products, while training", low=0, below=1)


class LowRank(nn.Module):
    """Updates of one weight in each of L blocks: ``down`` [L, r, D], ``up`` [L, H d, r]."""

    def __init__(self, depth: int, rank: int, width: int, out: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(depth, rank, width))
        self.up = nn.Parameter(torch.zeros(depth, out, rank))
        for down in self.down:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))


@implements(LoRAConfig)
class LoRA(InsideBlocks):
    """A :class:`LowRank` each for ``query`` and ``value``, with ``targets qkv`` also for ``key``."""

    own_norms = ("norm1",)
    config: LoRAConfig

    def __init__(self, config: LoRAConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.targets = TARGETS[config.targets]
        out = self.backbone.num_heads * self.backbone.head_dim
        for name in self.targets:
            self.add_module(name, LowRank(len(self.changed), config.rank, backbone.width, out))

    def task_state(self) -> State:
        """``query.down`` [1, L, D, r], ``query.up`` [1, L, r, H d] times α / r, and the same for the other targets."""
        scale = self.config.alpha / self.config.rank
        state = {}
        for name in self.targets:
            added = self.get_submodule(name)
            assert isinstance(added, LowRank)
            state[f"{name}.down"] = added.down.transpose(1, 2).unsqueeze(0)
            state[f"{name}.up"] = scale * added.up.transpose(1, 2).unsqueeze(0)
        return state

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        backbone, depth = self.backbone, len(self.changed)
        width, out = backbone.width, backbone.num_heads * backbone.head_dim
        layout: Layout = {}
        for name in self.targets:
            layout[f"{name}.down"] = (depth, width, RANK)
            layout[f"{name}.up"] = (depth, RANK, out)
        return layout

    def run_block(self, block: VitBlock, tokens: Tensor, state: State, whole: bool) -> Tensor:
        """See :meth:`InsideBlocks.run_block`."""
        place, normed = self.place(block), block.norm1(tokens)
        asking = block.read(normed, whole)
        query = block.linear_qkv(asking, QUERY) + self._added("query", place, asking, state)
        key = block.linear_qkv(normed, KEY)
        if "key" in self.targets:
            key = key + self._added("key", place, normed, state)
        value = block.linear_qkv(normed, VALUE) + self._added("value", place, normed, state)
        attended = block.attend(block.query_heads(query), block.key_heads(key), block.heads(value))
        return block.feed_forward(block.read(tokens, whole) + block.project(attended))

    def _added(self, name: str, place: int, normed: Tensor, state: State) -> Tensor:
        """The low-rank product for normed tokens, [B, N, D] to [B, N, H d]."""
        dropped = F.dropout(normed, self.config.dropout, self.training)
        return dropped @ state[f"{name}.down"][:, place] @ state[f"{name}.up"][:, place]
