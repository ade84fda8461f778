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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone, merge_heads
from prompttune.layers.attention import attend
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Layout, MethodConfig, MethodOver, State, implements, setting
from prompttune.methods.vpt import prompt_bound

QUERY, KEY, VALUE = range(3)
"""Indices of the parts of a block's joint projection."""


@dataclass(frozen=True)
class EXPRESConfig(MethodConfig):
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
class EXPRES(MethodOver[VitBackbone]):
    """``prompts`` [P, D]; ``norm`` [L, P, D], ``qkv`` [L, 3, P, H d] and ``proj`` [L, P, D], those switched on."""

    backbones = (VitBackbone,)
    own_norms = ("norm1",)

    def __init__(self, config: EXPRESConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        backbone = self.backbone
        self.config = config
        count, depth, width = config.num_prompts, backbone.depth, backbone.width
        bound, heads = prompt_bound(backbone), backbone.num_heads * backbone.head_dim
        self.prompts = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))
        self.norm = _zeros(depth, count, width) if config.norm_residual else None
        self.qkv = _zeros(depth, 3, count, heads) if config.qkv_residual else None
        self.proj = _zeros(depth, count, width) if config.proj_residual else None

    def task_state(self) -> State:
        """``prompts`` [1, P, D]; ``qkv`` [1, L, 3, P, H d] and ``proj`` [1, L, P, D], shifts after the projections."""
        backbone, count = self.backbone, self.config.num_prompts
        blocks = range(backbone.depth)
        qkv = self.prompts.new_zeros(backbone.depth, 3, count, backbone.num_heads * backbone.head_dim)
        proj = self.prompts.new_zeros(backbone.depth, count, backbone.width)
        if self.norm is not None:
            qkv = torch.stack([backbone.weigh_qkv(index, self.norm[index]) for index in blocks])
        if self.qkv is not None:
            qkv = qkv + self.qkv
        if self.proj is not None:
            proj = torch.stack([backbone.scale_attention(index, self.proj[index]) for index in blocks])
        return {"prompts": self.prompts.unsqueeze(0), "qkv": qkv.unsqueeze(0), "proj": proj.unsqueeze(0)}

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        backbone, count = self.backbone, self.config.num_prompts
        return {
            "prompts": (count, backbone.width),
            "qkv": (backbone.depth, 3, count, backbone.num_heads * backbone.head_dim),
            "proj": (backbone.depth, count, backbone.width),
        }

    def forward(self, images: Tensor, state: State, aux: bool = False) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        backbone, count = self.backbone, self.config.num_prompts
        tokens = backbone.embed(images)  # [B, N, D]
        prompts = state["prompts"].expand(tokens.shape[0], -1, -1)  # [B, P, D]
        tokens = torch.cat((F.dropout(prompts, self.config.dropout, self.training), tokens), dim=1)  # [B, P + N, D]
        for index in range(backbone.depth):
            # after the last block only the output tokens are read
            read = tokens[:, :count] if index == backbone.depth - 1 else tokens
            attended = self._attention(index, backbone.norm1(index, tokens), read.shape[1], state["qkv"][:, index])
            attended = self._shifted(attended, state["proj"][:, index])
            tokens = backbone.feed_forward(index, read + attended)
            probe(f"block{index}", tokens)
        return Features(backbone.pool_each(tokens))

    def _attention(self, index: int, normed: Tensor, asking: int, shift: Tensor) -> Tensor:
        """The attention's output for the first ``asking`` of normed tokens [B, P + N, D], without the residual.

        Args:
            shift: [1 or B, 3, P, H d].
        """
        backbone = self.backbone
        query = self._shifted(backbone.linear_qkv(index, normed[:, :asking], QUERY), shift[:, QUERY])
        key = self._shifted(backbone.linear_qkv(index, normed, KEY), shift[:, KEY])
        value = self._shifted(backbone.linear_qkv(index, normed, VALUE), shift[:, VALUE])
        attended = attend(backbone.query_heads(index, query), backbone.key_heads(index, key), backbone.heads(value))
        return backbone.project(index, merge_heads(attended))

    def _shifted(self, tokens: Tensor, shift: Tensor) -> Tensor:
        """Tokens [B, P or P + N, D] with ``shift`` [1 or B, P, D] added to the first P."""
        count = self.config.num_prompts
        shifted = tokens[:, :count] + shift
        return shifted if tokens.shape[1] == count else torch.cat((shifted, tokens[:, count:]), dim=1)


def _zeros(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size))
