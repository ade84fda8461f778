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
from prompttune.backbones.swin import Stage, SwinBackbone
from prompttune.backbones.vit import merge_heads
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Layout, State, implements
from prompttune.methods.sa2vp.config import SWIN_STAGE, SA2VPConfig
from prompttune.methods.sa2vp.parts import Pathways, PromptMap, probe_pathways


@implements(SA2VPConfig)
class SwinSA2VP(Pathways[SwinBackbone]):
    """One task of SA²VP over a Swin: ``prompts.0``, and ``adapters.{i}`` for every block of the stage."""

    backbones = (SwinBackbone,)

    def __init__(self, config: SA2VPConfig, backbone: Backbone) -> None:
        assert isinstance(backbone, SwinBackbone)
        stage = backbone.stages[SWIN_STAGE]
        super().__init__(
            config, backbone, depth=len(stage.blocks), width=stage.width, grid=stage.grid, num_prefix_tokens=0
        )
        embedded = backbone.stages[0]
        self.prompts["0"] = PromptMap(embedded.grid, 0, embedded.width, config)

    @property
    def stage(self) -> Stage:
        """The stage where the pathways meet."""
        return self.backbone.stages[SWIN_STAGE]

    def task_state(self) -> State:
        """Folded tensors of the task; N and D are those of the stage where the pathways meet.

        ``prompt.input`` [1, N, D], the map that enters its block 0; ``prompt.query`` [1, H, N, d], its queries there;
        ``prompt.output`` [1, N, D], the output of that block for it; and :meth:`given_state`.
        """
        backbone, first = self.backbone, self.stage.blocks.start
        start = self._enter(backbone.position(self.prompts["0"]()))
        state = {
            "prompt.input": start,
            "prompt.query": backbone.query(first, backbone.norm1(first, start)),
            "prompt.output": backbone.run_block(first, start),
        }
        return state | self.given_state()

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        stage = self.stage
        layout: Layout = {
            "prompt.input": (stage.num_tokens, stage.width),
            "prompt.query": (stage.num_heads, stage.num_tokens, stage.head_dim),
            "prompt.output": (stage.num_tokens, stage.width),
        }
        return layout | self.given_layout()

    def forward(self, images: Tensor, state: State, aux: bool = False) -> Features:
        """See :meth:`Method.forward`. Without ``aux``, the prompt pathway is computed only for the base."""
        backbone, first = self.backbone, self.stage.blocks.start
        behind = range(SWIN_STAGE + 1, len(backbone.stages))
        h, p = self._first_block(self._enter(backbone.embed(images)), state)
        probe_pathways(first, h, p)
        for index in range(1, self.depth):
            if aux or index < self.last_read:
                h, p = self._block(index, h, p, state)
                probe_pathways(first + index, h, p)
                continue
            reads = index == self.last_read
            h = self._last_reading_block(index, h, p, state) if reads else backbone.run_block(first + index, h)
            probe(f"block{first + index}", h)
        if not aux:
            return Features(backbone.pool(backbone.run_stages(h, behind)))
        h, p = backbone.run_stages(torch.stack((h, p)), behind).unbind(0)
        return Features(backbone.pool(h), backbone.pool(p))

    def _enter(self, tokens: Tensor) -> Tensor:
        """Run embedded tokens through the earlier stages, merged for the stage where the pathways meet, [B, N, D]."""
        return self.backbone.merge(SWIN_STAGE, self.backbone.run_stages(tokens, range(SWIN_STAGE)))

    def _first_block(self, h: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Block 0 of the stage, [B, N, D]; the prompt pathway's part is folded in the state."""
        backbone, block = self.backbone, self.stage.blocks.start
        q, k, v = backbone.qkv(block, backbone.norm1(block, h))  # [B, H, N, d]
        own = backbone.project(block, backbone.attend_windows(block, q, k, v))
        given = self._given(0, state["prompt.input"], state["prompt.query"], k, v, state)
        return backbone.feed_forward(block, h + own), state["prompt.output"] + given

    def _block(self, index: int, h: Tensor, p: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Block ``index`` of the stage for both pathways, [B, N, D] each."""
        backbone, block = self.backbone, self.stage.blocks[index]
        x = torch.stack((h, p))  # [2, B, N, D]
        q, k, v = backbone.qkv(block, backbone.norm1(block, x))  # [2, B, H, N, d]
        asking, answering = (1, 0) if index in self.prompt_layers else (0, 1)
        own = backbone.project(block, backbone.attend_windows(block, q, k, v))  # [2, B, N, D]
        given = self._given(index, (h, p)[asking], q[asking], k[answering], v[answering], state)
        h, p = backbone.feed_forward_both(block, x + own)
        return (h, p + given) if index in self.prompt_layers else (h + given, p)

    def _last_reading_block(self, index: int, h: Tensor, p: Tensor, state: State) -> Tensor:
        """The last block in which the base reads the prompts, [B, N, D]; only their keys and values are computed."""
        backbone, block = self.backbone, self.stage.blocks[index]
        normed = backbone.norm1(block, torch.stack((h, p)))  # [2, B, N, D]
        k, v = backbone.key_value(block, normed)  # [2, B, H, N, d]
        q = backbone.query(block, normed[0])
        own = backbone.project(block, backbone.attend_windows(block, q, k[0], v[0]))
        return backbone.feed_forward(block, h + own) + self._given(index, h, q, k[1], v[1], state)

    def _given(self, index: int, asking: Tensor, q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
        """One pathway's contribution to the other: tokens [B, N, D] ask with q keys and values [B, H, N, d] of both."""
        block = self.stage.blocks[index]
        cross = self.backbone.project(block, merge_heads(self.aligned(q, k, v)))
        return self.give(index, asking + self.drop(cross), state)
