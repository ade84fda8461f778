"""SA²VP over convolutions, ResNet and ConvNeXt: the paper says that it applies to them and gives no recipe.

The design follows Swin's (``swin.py``): a prompt map of rank r, at the resolution and width of the stem's output,
passes the same frozen stages as the image, and the pathways meet in the stage with most of the blocks. A convolution
does not have queries, keys and values, so they meet *after* a block, on its outputs for both: the spatially aligned
attention reads the maps themselves, each place normalised over its channels without parameters, in heads of at most
64 channels, scaled by 1/sqrt(d), and adds to the asking map. A bottleneck adapter as elsewhere (its linear layers are
1 x 1 convolutions of a map) and γ turn this into one pathway's contribution to the other. In a prompt layer the base
adapts the prompts, after all other blocks the prompts adapt the base. New prompt maps do not join later. The head reads
the model's own pooling.

The prompt pathway up to and including the first block of that stage folds into the state: one map. After the last block
in which the base reads the prompts, the prompt pathway is computed only for its own loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.backbones.blocks import FrozenBlock, Stage, merge_heads
from prompttune.backbones.conv import ConvBackbone
from prompttune.layers.bottleneck import plain_norm
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Layout, Levels, State, implements
from prompttune.methods.sa2vp.config import MEETING_STAGE, SA2VPConfig
from prompttune.methods.sa2vp.parts import Pathways, PromptMap, probe_pathways

LARGEST_HEAD = 64
"""Largest number of channels of a head, which is the largest divisor of the width up to this."""


@implements(SA2VPConfig)
class ConvSA2VP(Pathways[ConvBackbone]):
    """One task of SA²VP over convolutions: ``prompts.0``, and ``adapters.{i}`` for every block of the stage."""

    backbones = (ConvBackbone,)

    def __init__(self, config: SA2VPConfig, backbone: Backbone) -> None:
        assert isinstance(backbone, ConvBackbone)
        stage = backbone.stages[MEETING_STAGE]
        super().__init__(
            config, backbone, depth=len(stage.blocks), width=stage.width, grid=stage.grid, num_prefix_tokens=0
        )
        self.head_dim = max(size for size in range(1, LARGEST_HEAD + 1) if stage.width % size == 0)
        self.prompts["0"] = PromptMap(backbone.grid, 0, backbone.stem_width, config)

    @property
    def stage(self) -> Stage[FrozenBlock]:
        """The stage where the pathways meet."""
        return self.backbone.stages[MEETING_STAGE]

    def task_state(self) -> State:
        """Folded tensors of the task; N and D are those of the stage where the pathways meet.

        ``prompt.output`` [1, N, D], the output of that stage's first block for the prompt map; and :meth:`given_state`.
        """
        backbone = self.backbone
        stem = self.prompts["0"]().transpose(1, 2).unflatten(2, backbone.grid)  # [1, C, R, C']
        return {"prompt.output": tokens_of(self._enter(backbone.position(stem)))} | self.given_state()

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        return {"prompt.output": (self.stage.num_tokens, self.stage.width)} | self.given_layout()

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:  # noqa: ARG002
        """``map`` [B, D, R, C'] after the first block of the stage where the pathways meet."""
        return {"map": self._enter(self.backbone.embed(images))}

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`. Without ``aux``, the prompt pathway is computed only for the base."""
        backbone, blocks = self.backbone, self.stage.blocks
        h = image["map"]
        p = self._map(state["prompt.output"])
        p = p + self._given(0, p, h, state)
        probe_pathways(blocks[0].index, h, p)
        for index, block in enumerate(blocks[1:], 1):
            if not aux and index > self.last_read:
                h = block.run(h)
                probe(f"block{block.index}", h)
                continue
            h, p = block.run(torch.stack((h, p)).flatten(0, 1)).unflatten(0, (2, -1)).unbind(0)  # one batch
            if index in self.prompt_layers:
                p = p + self._given(index, p, h, state)
            else:
                h = h + self._given(index, h, p, state)
            probe_pathways(block.index, h, p)
        behind = range(MEETING_STAGE + 1, len(backbone.stages))
        features = backbone.pool(backbone.run_stages(h, behind))
        return Features(features, backbone.pool(backbone.run_stages(p, behind)) if aux else None)

    def _enter(self, x: Tensor) -> Tensor:
        """Run a stem's output through the stages before the meeting stage, and through that stage's first block."""
        backbone = self.backbone
        x = backbone.enter(MEETING_STAGE, backbone.run_stages(x, range(MEETING_STAGE)))
        return self.stage.blocks[0].run(x)

    def _given(self, index: int, asking: Tensor, seen: Tensor, state: State) -> Tensor:
        """One pathway's contribution to the other after block ``index``, from maps [B, D, R, C'] of both."""
        tokens = tokens_of(asking)
        keys = self._heads(tokens_of(seen))
        attended = merge_heads(self.aligned(self._heads(tokens), keys, keys))
        return self._map(self.give(index, tokens + self.drop(attended), state))

    def _heads(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, D], normalised over the channels, as [B, H, N, d]."""
        heads: Tensor = plain_norm(tokens).unflatten(-1, (-1, self.head_dim))  # [B, N, H, d]
        return heads.transpose(-3, -2)

    def _map(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to [B, D, R, C']."""
        placed: Tensor = tokens.transpose(1, 2).unflatten(2, self.stage.grid)
        return placed


def tokens_of(x: Tensor) -> Tensor:
    """[B, D, R, C'] to [B, R C', D]."""
    return x.flatten(2).transpose(1, 2)
