"""Settings of SA²VP, the same over every backbone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from prompttune.backbones.base import Backbone
from prompttune.backbones.conv import ConvBackbone
from prompttune.backbones.swin import SwinBackbone
from prompttune.layers.bottleneck import ACTIVATIONS
from prompttune.methods.base import setting
from prompttune.methods.over_vit import BlocksConfig, rising

PROMPT_LAYER_STRIDE = 4
"""The paper's prompt layers of a 12-block ViT are 0, 4 and 8."""
MEETING_STAGE, STAGE_PROMPT_LAYER_STRIDE = 2, 6
"""Stage of a Swin or of convolutions in which the pathways meet, the one with most of the blocks; of a Swin's 18 blocks
there 0, 6 and 12 are prompt layers."""


@dataclass(frozen=True)
class SA2VPConfig(BlocksConfig):
    """Settings of SA²VP. ``prompt_layers=None`` takes every fourth block but the last; ``(0,)`` is the shallow
    mode. Prompt layers are counted from the first block in which the pathways meet."""

    method = "sa2vp"
    summary = "Prompt map aligned with the image tokens, in its own pathway"
    paper = "https://arxiv.org/abs/2312.10376"
    shapes_graph = ("window", "prompt_layers", "attention", "adapter", "activation")
    fewest_blocks = 2

    rank: int = setting(16, "rank r of the prompt maps and adapters", above=0)
    gamma: float = setting(0.5, "γ, weight of one pathway's contribution to the other")
    window: int = setting(3, "odd side c of the aligned window, in patches")
    prompt_layers: tuple[int, ...] | None = setting(
        None,
        "blocks with a prompt map, counted from first_block; only 0 is the shallow mode; by default every fourth block",
    )
    map_scale: float = setting(
        1.0, "ratio of the prompt maps' side to the token map's side, above 0 to 1", above=0, high=1
    )
    attention: str = setting("aligned", "part of the other map that a patch query sees", ("aligned", "global"))
    adapter: bool = setting(True, "use a bottleneck adapter between the pathways")
    base_weight: float = setting(0.8, "λ, weight of the base pathway's loss; 1 leaves the prompts unsupervised")
    activation: str = setting("gelu", "adapter activation: gelu as released, relu as in the paper", ACTIVATIONS)
    fusion: str = setting(
        "released",
        "pass a new prompt map through the block (released) or add it (paper)",
        ("released", "paper"),
    )
    init: str = setting("zero", "initial last layer of the adapters: zero, or random as released", ("zero", "released"))
    dropout: float = setting(0.1, "dropout on the cross attention and in the adapters, while training", low=0, below=1)

    def check(self) -> None:
        """See :meth:`MethodConfig.check`."""
        self.require(self.window > 0 and self.window % 2 == 1, f"window must be odd, not {self.window}")
        self.require(0 <= self.base_weight <= 1, f"base_weight must be from 0 to 1, not {self.base_weight}")
        layers = self.prompt_layers
        if layers is not None:
            self.require(layers[:1] == (0,) and rising(layers), f"prompt_layers {layers} must rise from 0")

    def graph_settings(self) -> dict[str, Any]:
        """See :meth:`MethodConfig.graph_settings`; settings without an effect next to the others are left out."""
        idle = {"window"} if self.attention == "global" else set()
        if not self.adapter:
            idle.add("activation")
        return {name: value for name, value in super().graph_settings().items() if name not in idle}

    def resolved(self, backbone: Backbone) -> SA2VPConfig:
        """Fill in the prompt layers for the blocks where the pathways meet: a ViT's changed ones or one stage's."""
        super().resolved(backbone)
        depth, stride = self._meeting_blocks(backbone)
        layers = self.prompt_layers
        if layers is None:
            layers = tuple(range(0, max(1, depth - 1), stride))
        fits = layers[-1] < depth and len(layers) < depth
        self.require(fits, f"prompt_layers {layers} do not fit {depth} blocks of {backbone.name}")
        return dataclasses.replace(self, prompt_layers=layers)

    def _meeting_blocks(self, backbone: Backbone) -> tuple[int, int]:
        """Number of blocks in which the pathways meet, and the distance between prompt layers."""
        if not isinstance(backbone, SwinBackbone | ConvBackbone):
            return backbone.depth - self.first_block, PROMPT_LAYER_STRIDE
        stages, name = backbone.stages, backbone.name
        self.require(len(stages) > MEETING_STAGE, f"{name} has no stage {MEETING_STAGE}")
        self.require(self.fusion == "released", f"fusion has no effect on {name}: new prompt maps do not join there")
        depth = len(stages[MEETING_STAGE].blocks)
        self.require(depth > 1, f"{name} has one block in stage {MEETING_STAGE}; the pathways need two to meet")
        return depth, STAGE_PROMPT_LAYER_STRIDE

    @property
    def base_loss_weight(self) -> float:
        """λ."""
        return self.base_weight
