"""EXPRES, expressive prompts with residuals: https://arxiv.org/abs/2303.15591 (CVPR 2023).

P learnable output tokens enter block 0 together with the image's tokens, and the head reads them after the last block.
In every block a learnable vector for each of them is added to the output of the norm before the attention, of the
query, key and value projections, and of the projection after the attention (Figure 2 of the paper). Each of the three
can be switched off for the ablation.

The authors have not released code. Our choices where the paper is open: the head reads the mean of the tokens, each
after the final norm; the norm's vector applies only to the attention's norm; with LayerScale the projection's vector
passes it too; vectors start at zero, tokens as in VPT; output tokens do not have a position embedding.

The norm's vector reaches only the three projections, so its effect on them can be folded: the state holds one shift
per token for queries, keys and values, and one for the projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.blocks import KEY, QUERY, VALUE
from prompttune.backbones.vit import VitBlock
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Levels, State, implements, setting
from prompttune.methods.over_vit import BlocksConfig, PromptTokens


@dataclass(frozen=True)
class EXPRESConfig(BlocksConfig):
    """Settings of EXPRES."""

    method = "expres"
    summary = "Shallow prompts with residual prompts inside the blocks"
    paper = "https://arxiv.org/abs/2303.15591"
    shapes_graph = ("num_prompts",)

    num_prompts: int = setting(10, "prompt tokens", above=0)
    norm_residual: bool = setting(True, "add vectors after the norm before each attention")
    qkv_residual: bool = setting(True, "add vectors after each query, key and value projection")
    proj_residual: bool = setting(True, "add vectors after each projection of the attention's output")
    dropout: float = setting(0.1, "dropout on the prompts while training", low=0, below=1)


@implements(EXPRESConfig)
class EXPRES(PromptTokens):
    """``prompts`` [P, D]; for L changed blocks ``norm`` [L, P, D], ``qkv`` [L, 3, P, H d] and ``proj`` [L, P, D], those
    switched on."""

    own_norms = ("norm1",)
    config: EXPRESConfig

    def __init__(self, config: EXPRESConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        count, depth, width = config.num_prompts, len(self.changed), backbone.width
        heads = self.backbone.num_heads * self.backbone.head_dim
        self.prompts = self.drawn(count, width)
        self.norm = _zeros(depth, count, width) if config.norm_residual else None
        self.qkv = _zeros(depth, 3, count, heads) if config.qkv_residual else None
        self.proj = _zeros(depth, count, width) if config.proj_residual else None

    def task_state(self) -> State:
        """``prompts`` [1, P, D]; ``qkv`` [1, L, 3, P, H d] and ``proj`` [1, L, P, D], shifts after the projections."""
        backbone, blocks, count = self.backbone, self.changed, self.count
        qkv = self.prompts.new_zeros(len(blocks), 3, count, backbone.num_heads * backbone.head_dim)
        proj = self.prompts.new_zeros(len(blocks), count, backbone.width)
        if self.norm is not None:
            qkv = torch.stack([_weigh_qkv(*one) for one in zip(blocks, self.norm, strict=True)])
        if self.qkv is not None:
            qkv = qkv + self.qkv
        if self.proj is not None:
            proj = torch.stack([block.scale_attention(own) for block, own in zip(blocks, self.proj, strict=True)])
        return {"prompts": self.prompts.unsqueeze(0), "qkv": qkv.unsqueeze(0), "proj": proj.unsqueeze(0)}

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        backbone, count = self.backbone, self.count
        tokens = image["tokens"]  # [B, N, D]
        tokens = torch.cat((self.rows(state["prompts"], tokens), tokens), dim=1)  # [B, P + N, D]
        for place, block in enumerate(self.changed):
            # After the last block only the output tokens are read; as many as an image's would be taken for its tokens.
            alone = block.index == backbone.depth - 1 and count < backbone.num_tokens
            read = tokens[:, :count] if alone else tokens
            attended = self._attention(block, block.norm1(tokens), read.shape[1], state["qkv"][:, place])
            tokens = block.feed_forward(read + self._shifted(attended, state["proj"][:, place]))
            probe(f"block{block.index}", tokens)
        return Features(cast(Tensor, backbone.model.fc_norm(backbone.model.norm(tokens[:, :count]).mean(dim=1))))

    def _attention(self, block: VitBlock, normed: Tensor, asking: int, shift: Tensor) -> Tensor:
        """The attention's output for the first ``asking`` of normed tokens [B, P + N, D], without the residual.

        Args:
            shift: [1 or B, 3, P, H d].
        """
        query = self._shifted(block.linear_qkv(normed[:, :asking], QUERY), shift[:, QUERY])
        key = self._shifted(block.linear_qkv(normed, KEY), shift[:, KEY])
        value = self._shifted(block.linear_qkv(normed, VALUE), shift[:, VALUE])
        return block.project(block.attend(block.query_heads(query), block.key_heads(key), block.heads(value)))

    def _shifted(self, tokens: Tensor, shift: Tensor) -> Tensor:
        """Tokens [B, P or P + N, D] with ``shift`` [1 or B, P, D] added to the first P."""
        shifted = tokens[:, : self.count] + shift
        return shifted if tokens.shape[1] == self.count else torch.cat((shifted, tokens[:, self.count :]), dim=1)


def _weigh_qkv(block: VitBlock, difference: Tensor) -> Tensor:
    """Queries, keys and values of a difference [..., D] between normed tokens: [3, ..., H d], without the bias."""
    return torch.stack([F.linear(difference, block.projection(part)[0]) for part in (QUERY, KEY, VALUE)])


def _zeros(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size))
