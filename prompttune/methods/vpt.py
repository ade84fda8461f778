"""Visual Prompt Tuning, shallow and deep: https://arxiv.org/abs/2203.12119 (ECCV 2022).

P learnable prompts stand between the prefix tokens and the patches. Shallow: they enter at block 0 and are carried
through. Deep: every block gets fresh ones in place of those that left the block before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Layout, Method, MethodConfig, State, setting


@dataclass(frozen=True)
class VPTShallowConfig(MethodConfig):
    """Settings of VPT-shallow."""

    method = "vpt-shallow"
    shapes_graph = ("num_prompts",)
    deep = False

    num_prompts: int = setting(10, "prompt tokens")
    dropout: float = setting(0.1, "drop-out on the prompts while training")

    def check(self) -> None:
        """See :meth:`MethodConfig.check`."""
        self.require(self.num_prompts > 0, f"num_prompts must be above 0, not {self.num_prompts}")
        self.require(0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, not {self.dropout}")

    def build(self, backbone: Backbone) -> Method:
        """See :meth:`MethodConfig.build`."""
        return VPT(self, backbone)


@dataclass(frozen=True)
class VPTDeepConfig(VPTShallowConfig):
    """Settings of VPT-deep."""

    method = "vpt-deep"
    deep = True


def prompt_bound(backbone: VitBackbone) -> float:
    """VPT's bound v of uniform(-v, v): sqrt(6 / (3 patch² + D))."""
    return float((6.0 / (3 * backbone.patch_size**2 + backbone.width)) ** 0.5)


def without_prompts(backbone: VitBackbone, tokens: Tensor, count: int) -> Tensor:
    """Tokens [B, N + P, D] that left the last block, less the P prompts; token 0 alone passes as it is."""
    if backbone.pools_class_token:
        return tokens
    prefix = backbone.num_prefix_tokens
    return torch.cat((tokens[:, :prefix], tokens[:, prefix + count :]), dim=1)


class VPT(Method):
    """Prompts [L, P, D]: L is the depth for deep prompts, 1 for shallow ones."""

    backbones = (VitBackbone,)

    def __init__(self, config: VPTShallowConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        assert isinstance(backbone, VitBackbone)
        self.config = config
        layers = backbone.depth if config.deep else 1
        bound = prompt_bound(backbone)
        self.prompts = nn.Parameter(torch.empty(layers, config.num_prompts, backbone.width).uniform_(-bound, bound))

    def task_state(self) -> State:
        """The prompts themselves."""
        return {"prompts": self.prompts.unsqueeze(0)}

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        return {"prompts": tuple(self.prompts.shape)}

    def forward(self, images: Tensor, state: State, aux: bool = False) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; there is no prompt pathway."""
        backbone = self._backbone[0]
        assert isinstance(backbone, VitBackbone)
        prefix, count = backbone.num_prefix_tokens, self.config.num_prompts
        tokens = backbone.embed(images)  # [B, N, D]
        prompts = state["prompts"].expand(tokens.shape[0], -1, -1, -1)  # [B, L, P, D]
        prompts = F.dropout(prompts, self.config.dropout, self.training)
        tokens = torch.cat((tokens[:, :prefix], prompts[:, 0], tokens[:, prefix:]), dim=1)  # [B, N + P, D]
        for index in range(backbone.depth):
            if index > 0 and self.config.deep:
                tokens = torch.cat((tokens[:, :prefix], prompts[:, index], tokens[:, prefix + count :]), dim=1)
            if index < backbone.depth - 1:
                tokens = backbone.run_block(index, tokens)
                probe(f"block{index}", tokens)
        return Features(backbone.pool(without_prompts(backbone, backbone.run_last_block(tokens), count)))
