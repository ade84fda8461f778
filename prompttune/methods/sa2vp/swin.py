"""SA²VP over a Swin: the pathways meet in stage index 2, as in the paper's released code.

The prompt map has one token per patch of the embedding and passes the same patch norm, blocks and patch merging as the
image. In the stage where the pathways meet, the cross attention reuses a block's own norm, projections and heads over
the whole map, without shifted windows and relative position bias. New prompt maps do not join later, so the prompt
layers are only the blocks in which the base adapts the prompts. The head reads the model's own pooling.

All stages of the prompt pathway before that stage fold into the state, and its first block there. The state holds
three maps of that stage's grid (1.2 MB on Swin-B at 224) instead of tokens of rank r at sixteen times the places; the
first stages then cost nothing per image. After the last block in which the base reads the prompts, the prompt pathway
is computed only for its own loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.backbones.swin import SwinBackbone, SwinBlock
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Layout, Levels, State, implements
from prompttune.methods.sa2vp.config import MEETING_STAGE, SA2VPConfig
from prompttune.methods.sa2vp.parts import AttentionPathways, PromptMap, probe_pathways


@implements(SA2VPConfig)
class SwinSA2VP(AttentionPathways[SwinBackbone]):
    """One task of SA²VP over a Swin: ``prompts.0``, and ``adapters.{i}`` for every block of the stage."""

    backbones = (SwinBackbone,)

    def __init__(self, config: SA2VPConfig, backbone: Backbone) -> None:
        assert isinstance(backbone, SwinBackbone)
        stage = backbone.stages[MEETING_STAGE]
        super().__init__(
            config, backbone, depth=len(stage.blocks), width=stage.width, grid=stage.grid, num_prefix_tokens=0
        )
        embedded = backbone.stages[0]
        self.prompts["0"] = PromptMap(embedded.grid, 0, embedded.width, config)

    @property
    def meeting(self) -> tuple[SwinBlock, ...]:
        """The blocks of the stage where the pathways meet."""
        return self.backbone.stages[MEETING_STAGE].blocks

    def task_state(self) -> State:
        """:meth:`start_state` of the map that enters the stage where the pathways meet, and :meth:`given_state`."""
        return self.start_state(self._enter(self.backbone.position(self.prompts["0"]()))) | self.given_state()

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        return self.start_layout() | self.given_layout()

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:  # noqa: ARG002
        """:meth:`met_state` of the stage where the pathways meet."""
        return self.met_state(self._enter(self.backbone.embed(images)))

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`. Without ``aux``, the prompt pathway is computed only for the base."""
        backbone, behind = self.backbone, range(MEETING_STAGE + 1, len(self.backbone.stages))
        h, p = image["tokens"], self.first_prompts(image, state)
        probe_pathways(self.meeting[0].index, h, p)
        for index, block in enumerate(self.meeting[1:], 1):
            if aux or index < self.last_read:
                h, p = self.block(index, h, p, state)
                probe_pathways(block.index, h, p)
                continue
            h = self._last_reading_block(index, h, p, state) if index == self.last_read else block.run(h)
            probe(f"block{block.index}", h)
        if not aux:
            return Features(backbone.pool(backbone.run_stages(h, behind)))
        h, p = backbone.run_stages(torch.stack((h, p)), behind).unbind(0)
        return Features(backbone.pool(h), backbone.pool(p))

    def _enter(self, tokens: Tensor) -> Tensor:
        """Run embedded tokens through the earlier stages, merged for the stage where the pathways meet, [B, N, D]."""
        return self.backbone.enter(MEETING_STAGE, self.backbone.run_stages(tokens, range(MEETING_STAGE)))

    def _last_reading_block(self, index: int, h: Tensor, p: Tensor, state: State) -> Tensor:
        """The last block in which the base reads the prompts, [B, N, D]; only their keys and values are computed."""
        block = self.meeting[index]
        normed = block.norm1(h)
        q = block.query(normed)
        own = block.project(block.attend(q, *block.key_value(normed)))
        return block.feed_forward(h + own) + self.cross(index, h, q, *block.key_value(block.norm1(p)), state)
