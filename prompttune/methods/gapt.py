"""GaPT, gated prompt tuning for self-supervised ViTs: https://arxiv.org/abs/2306.05067 (ICML 2023).

Prompts enter block 0 as in VPT-shallow. After every block but the last a gate g in (0, 1), one learnable value per
block, mixes the prompts that leave the block with those that entered it: ``g out + (1 - g) in``; gates near 0 carry
the prompts past a block. Every block's attention has a learnable temperature t, ``softmax(q k^T / (t sqrt(d)))``.

The code follows the release (https://github.com/ryongithub/GatedPromptTuning): g = sigmoid(logit), all logits start at
``-gate_init``; temperatures start at 1 and are clipped to [0.01, 10] before each step. g and 1 / t fold into the state.
The released code pools MoCo's class token, and for MAE the mean of prompts and patches, followed by the norm:
``pool`` ``backbone`` and ``mean``. With ``backbone``, a backbone that pools its patches pools them without the
prompts, as in VPT here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBlock
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Levels, State, implements, setting
from prompttune.methods.over_vit import BlocksConfig, PromptTokens

COLDEST, HOTTEST = 0.01, 10.0
"""Bounds of the temperatures."""


@dataclass(frozen=True)
class GaPTConfig(BlocksConfig):
    """Settings of GaPT."""

    method = "gapt"
    summary = "Gated prompts for self-supervised ViTs"
    paper = "https://arxiv.org/abs/2306.05067"
    shapes_graph = ("num_prompts", "pool")
    fewest_blocks = 2

    num_prompts: int = setting(100, "prompt tokens", above=0)
    gate_init: float = setting(10.0, "initial gates: sigmoid(-gate_init)")
    pool: str = setting(
        "backbone",
        "input of the head: the backbone's own pooling, or the mean of prompts and patches (released for MAE)",
        ("backbone", "mean"),
    )
    dropout: float = setting(0.1, "dropout on the prompts while training", low=0, below=1)


@implements(GaPTConfig)
class GaPT(PromptTokens):
    """``prompts`` [P, D]; for L changed blocks ``gates`` [L - 1] before their sigmoid, ``temperatures`` [L]."""

    config: GaPTConfig

    def __init__(self, config: GaPTConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.prompts = self.drawn(config.num_prompts, backbone.width)
        self.gates = nn.Parameter(torch.full((len(self.changed) - 1,), -config.gate_init))
        self.temperatures = nn.Parameter(torch.ones(len(self.changed)))

    def task_state(self) -> State:
        """``prompts`` [1, P, D]; ``gates`` [1, L - 1], g; ``sharpness`` [1, L], 1 / t."""
        temperatures: Tensor = self.temperatures
        if self.training:  # clip the parameter itself, or it would drift beyond the bound
            with torch.no_grad():
                temperatures.clamp_(COLDEST, HOTTEST)
        else:
            temperatures = temperatures.clamp(COLDEST, HOTTEST)
        return {
            "prompts": self.prompts.unsqueeze(0),
            "gates": self.gates.sigmoid().unsqueeze(0),
            "sharpness": temperatures.reciprocal().unsqueeze(0),
        }

    def values_by_block(self) -> dict[str, dict[int, float]]:
        """``gate``, g; and ``temperature``, t within its bounds."""
        gates, temperatures = self.gates.sigmoid(), self.temperatures.clamp(COLDEST, HOTTEST)
        return {"gate": self.by_block(gates), "temperature": self.by_block(temperatures)}

    def by_block(self, values: Tensor) -> dict[int, float]:
        """Values of the first of the changed blocks by the number of their block."""
        return dict(enumerate(values.tolist(), self.first_block))

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        backbone, prefix = self.backbone, self.backbone.num_prefix_tokens
        tokens = image["tokens"]  # [B, N, D]
        prompts = self.rows(state["prompts"], tokens)  # [B, P, D]
        tokens = self.insert(tokens, prompts)  # [B, N + P, D]
        for block in self.changed[:-1]:
            tokens = self._run(block, tokens, state)
            gate = state["gates"][:, self.place(block), None, None]  # [1 or B, 1, 1]
            prompts = prompts + gate * (tokens[:, prefix : prefix + self.count] - prompts)
            tokens = self.replace(tokens, prompts)
            probe(f"block{block.index}", tokens)
        tokens = self._run(backbone.blocks[-1], tokens, state)
        if self.config.pool == "mean":  # of prompts and patches, before the norm
            mean = tokens[:, prefix:].mean(dim=1)
            return Features(cast(Tensor, backbone.model.fc_norm(backbone.model.norm(mean))))
        return Features(self.pool(tokens))

    def _run(self, block: VitBlock, tokens: Tensor, state: State) -> Tensor:
        """A block with its temperature, [B, N + P, D] to the tokens that are read."""
        whole = self.config.pool == "mean"
        normed = block.norm1(tokens)
        sharpness = state["sharpness"][:, self.place(block), None, None, None]
        query = block.query(block.read(normed, whole)) * sharpness  # [B, H, 1 or N + P, d]
        attended = block.project(block.attend(query, *block.key_value(normed)))
        return block.feed_forward(block.read(tokens, whole) + attended)
