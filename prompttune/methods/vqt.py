"""Visual Query Tuning, VQT: https://arxiv.org/abs/2212.03220 (CVPR 2023).

P learnable queries for every block read the block's frozen keys and values, and pass its projection and MLP with both
residuals, as a token would. The image's tokens do not see them. The head reads the class token after the last block and
the outputs of all queries, one after the other: D (1 + L P) channels.

The code follows the release (https://github.com/andytu28/VQT, ``src/models/vit_backbones/h2t_vit.py``): the queries
pass the norm before the attention, and the class token and the outputs of each block are brought to length 1, the
outputs of a block as one vector. Deviations: a vector of C channels is brought to length sqrt(C) instead, so that its
channels are near 1 and the learning rates of the other methods fit; dropout of the queries is drawn once for all images
of a step; a backbone that pools patches gives its own pooling instead of the class token.

A query does not depend on the image before the attention, so its norm and projection fold into the state. The K tasks
of an image ask side by side, as K P queries of the same keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone, VitBlock
from prompttune.methods.base import Features, Levels, MethodConfig, MethodOver, State, implements, setting
from prompttune.methods.over_vit import keys_and_values, prompt_bound

SMALLEST = 1e-12
"""What keeps the length of features above 0."""


@dataclass(frozen=True)
class VQTConfig(MethodConfig):
    """Settings of VQT."""

    method = "vqt"
    summary = "Queries that read the frozen keys and values of every block"
    paper = "https://arxiv.org/abs/2212.03220"
    shapes_graph = ("num_queries",)

    num_queries: int = setting(1, "number of queries in each block", above=0)
    dropout: float = setting(0.1, "dropout on the queries while training", low=0, below=1)


@implements(VQTConfig)
class VQT(MethodOver[VitBackbone]):
    """``queries`` [L, P, D]."""

    backbones = (VitBackbone,)
    only_reads = True
    config: VQTConfig

    def __init__(self, config: VQTConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        bound = prompt_bound(self.backbone.patch_size, backbone.width)
        size = (backbone.depth, config.num_queries, backbone.width)
        self.queries = nn.Parameter(torch.empty(size).uniform_(-bound, bound))

    @property
    def width(self) -> int:
        """Channels of the class token and of all queries."""
        return self.backbone.width * (1 + self.backbone.depth * self.config.num_queries)

    def task_state(self) -> State:
        """``input`` [1, L, P, D], the queries; ``query`` [1, L, H, P, d], projected. Dropout is drawn here."""
        queries = F.dropout(self.queries, self.config.dropout, self.training)
        asking = [_projected(block, one) for block, one in zip(self.backbone.blocks, queries, strict=True)]
        return {"input": queries.unsqueeze(0), "query": torch.stack(asking).unsqueeze(0)}

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:  # noqa: ARG002
        """``pooled`` [B, D] of the plain backbone; ``key.{i}`` and ``value.{i}`` [B, H, N, d] of every block i."""
        found = keys_and_values(self.backbone, images)
        return {"pooled": self.backbone.pool(found.pop("tokens")), **found}

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        pooled, rows = image["pooled"], state["input"].shape[0]
        images = pooled.shape[0] if rows > 1 else 1  # rows of queries: one for all images, or K for each in turn
        tasks = rows // images
        queries = state["input"].unflatten(0, (images, tasks)).transpose(1, 2).flatten(2, 3)  # [1 or B, L, K P, D]
        asking = state["query"].unflatten(0, (images, tasks)).movedim(1, 3).flatten(3, 4)  # [1 or B, L, H, K P, d]
        parts = [_scaled(pooled).unsqueeze(1).expand(-1, tasks, -1)]  # [B, K, D]
        for index, block in enumerate(self.backbone.blocks):
            attended = block.attend(asking[:, index], image[f"key.{index}"], image[f"value.{index}"])
            read = block.feed_forward(queries[:, index] + block.project(attended))  # [B, K P, D]
            parts.append(_scaled(read.unflatten(1, (tasks, -1)).flatten(2)))  # [B, K, P D]
        return Features(torch.cat(parts, dim=2).flatten(0, 1))


def _projected(block: VitBlock, queries: Tensor) -> Tensor:
    """Queries [P, D] of a block in its heads, [H, P, d]; each by itself, since only tokens of a map are rotated."""
    heads = block.query(block.norm1(queries.unsqueeze(1)))  # [P, H, 1, d]
    return heads.squeeze(2).transpose(0, 1)


def _scaled(features: Tensor) -> Tensor:
    """Features [..., C] brought to length sqrt(C), in float32: squares overflow in float16."""
    wide = features.float()
    scaled: Tensor = wide / ((wide * wide).mean(dim=-1, keepdim=True) + SMALLEST).sqrt()
    return scaled.to(features.dtype)
