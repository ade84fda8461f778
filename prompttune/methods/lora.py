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
from prompttune.backbones.vit import VitBackbone, merge_heads
from prompttune.layers.attention import attend
from prompttune.layers.probe import probe
from prompttune.methods.base import RANK, Features, Layout, MethodConfig, MethodOver, State, implements, setting
from prompttune.methods.maps import Levels, MapReader

QUERY, KEY, VALUE = range(3)
"""Indices of the parts of a block's joint projection."""
TARGETS = {"qv": ("query", "value"), "qkv": ("query", "key", "value")}
"""Projections that each choice of targets adapts."""


@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
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
class LoRA(MethodOver[VitBackbone]):
    """A :class:`LowRank` each for ``query`` and ``value``, with ``targets qkv`` also for ``key``."""

    backbones = (VitBackbone,)
    gives_maps_on = (VitBackbone,)
    own_norms = ("norm1",)

    def __init__(self, config: LoRAConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        backbone = self.backbone
        self.config = config
        self.targets = TARGETS[config.targets]
        out = backbone.num_heads * backbone.head_dim
        for name in self.targets:
            self.add_module(name, LowRank(backbone.depth, config.rank, backbone.width, out))

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
        backbone = self.backbone
        depth, width, out = backbone.depth, backbone.width, backbone.num_heads * backbone.head_dim
        layout: Layout = {}
        for name in self.targets:
            layout[f"{name}.down"] = (depth, width, RANK)
            layout[f"{name}.up"] = (depth, RANK, out)
        return layout

    def forward(self, images: Tensor, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        backbone = self.backbone
        reader, tokens = MapReader(backbone, levels), backbone.embed(images)  # [B, N, D]
        for index in range(backbone.depth):
            attended = self._attention(backbone, index, tokens, state, reader.whole)
            tokens = backbone.read(index, tokens, reader.whole) + attended
            tokens = backbone.feed_forward(index, tokens)
            reader.read(index, tokens)
            probe(f"block{index}", tokens)
        return Features(backbone.pool(tokens), maps=reader.maps)

    def _attention(self, backbone: VitBackbone, index: int, tokens: Tensor, state: State, whole: bool) -> Tensor:
        """The attention with its updates, without the residual, [B, N, D] to [B, 1 or N, D]."""
        normed = backbone.norm1(index, tokens)
        asking = backbone.read(index, normed, whole)
        query = backbone.linear_qkv(index, asking, QUERY) + self._added("query", index, asking, state)
        key = backbone.linear_qkv(index, normed, KEY)
        if "key" in self.targets:
            key = key + self._added("key", index, normed, state)
        value = backbone.linear_qkv(index, normed, VALUE) + self._added("value", index, normed, state)
        attended = attend(
            backbone.query_heads(index, query), backbone.key_heads(index, key), backbone.heads(value)
        )  # [B, H, 1 or N, d]
        return backbone.project(index, merge_heads(attended))

    def _added(self, name: str, index: int, normed: Tensor, state: State) -> Tensor:
        """The low-rank product for normed tokens, [B, N, D] to [B, N, H d]."""
        dropped = F.dropout(normed, self.config.dropout, self.training)
        return dropped @ state[f"{name}.down"][:, index] @ state[f"{name}.up"][:, index]
