"""Visual Prompt Tuning, shallow and deep: https://arxiv.org/abs/2203.12119 (ECCV 2022).

P learnable prompts are placed between the prefix tokens and the patches. Shallow: they enter at block 0 and are carried
through. Deep: every block gets new ones instead of those that left the block before it. With ``first_block``
both begin in that block.

On a Swin the prompts precede every window of a block and are ignored by patch merging: section 4.2 of the paper, whose
released code defines the rest (``src/models/vit_prompt/swin_transformer.py`` of KMnP/vpt). Between a prompt and a token
there is neither position bias nor shift mask. The output for shallow prompts is averaged over the windows; to reach the
next stage's width they pass the merging's weights as four equal neighbours. Deviations from that code: it pairs windows
with the prompts of other images in the batch, here they are the image's own; it pools prompts and patches, here only
patches, as the backbone does; dropout of deep prompts is drawn once per step, for block 0 too.

Elsewhere shallow prompts are pixels: the paper's form for convolutions, a learned border of P pixels a side. Deviation:
the border lies inside the image size, which some models fix, around the image made smaller by 2 P. With an image size
larger by 2 P the image keeps its size, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.conv import ConvBackbone
from prompttune.backbones.plain import PlainBackbone
from prompttune.backbones.swin import SwinBackbone, SwinBlock
from prompttune.backbones.vit import VitBackbone
from prompttune.layers.probe import probe
from prompttune.layers.resize import resized, resizing
from prompttune.methods.base import Features, Levels, Method, MethodOver, State, implements, setting
from prompttune.methods.damvp.method import add_border, border_pixels
from prompttune.methods.over_vit import BlocksConfig, MapReader, PromptTokens, prompt_bound


@dataclass(frozen=True)
class VPTShallowConfig(BlocksConfig):
    """Settings of VPT-shallow."""

    method = "vpt-shallow"
    summary = "Prompt tokens before the first block"
    paper = "https://arxiv.org/abs/2203.12119"
    shapes_graph = ("num_prompts",)
    deep = False

    num_prompts: int = setting(10, "prompt tokens", above=0)
    dropout: float = setting(0.1, "dropout on the prompts while training", low=0, below=1)


@dataclass(frozen=True)
class VPTDeepConfig(VPTShallowConfig):
    """Settings of VPT-deep."""

    method = "vpt-deep"
    summary = "Prompt tokens before every block"
    paper = "https://arxiv.org/abs/2203.12119"
    deep = True


@implements(VPTDeepConfig)
@implements(VPTShallowConfig)
class VPT(PromptTokens):
    """Prompts [L, P, D]: L is the number of changed blocks for deep prompts, 1 for shallow ones."""

    gives_maps_on = (VitBackbone,)
    config: VPTShallowConfig

    def __init__(self, config: VPTShallowConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.prompts = self.drawn(len(self.changed) if config.deep else 1, config.num_prompts, backbone.width)

    def task_state(self) -> State:
        """The prompts themselves."""
        return {"prompts": self.prompts.unsqueeze(0)}

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        reader = MapReader(self.backbone, levels, self.count, image)
        tokens = image["tokens"]  # [B, N, D]
        prompts = self.rows(state["prompts"], tokens)  # [B, L, P, D]
        tokens = self.insert(tokens, prompts[:, 0])  # [B, N + P, D]
        for place, block in enumerate(self.changed):
            if place > 0 and self.config.deep:
                tokens = self.replace(tokens, prompts[:, place])
            tokens = block.run_read(tokens, reader.whole)
            reader.read(block, tokens)
            probe(f"block{block.index}", tokens)
        return Features(self.pool(tokens), maps=reader.maps)


@implements(VPTDeepConfig)
@implements(VPTShallowConfig)
class SwinVPT(MethodOver[SwinBackbone]):
    """VPT over a Swin: ``prompts.{i}`` [blocks, P, D] for each stage i, or ``prompts.0`` [1, P, D] alone if shallow."""

    backbones = (SwinBackbone,)
    config: VPTShallowConfig

    def __init__(self, config: VPTShallowConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        stages, count = self.backbone.stages, config.num_prompts
        bound = prompt_bound(self.backbone.patch_size, stages[0].width)
        sizes = [(len(stage.blocks), count, stage.width) for stage in stages]
        if not config.deep:
            sizes = [(1, count, stages[0].width)]
        self.prompts = nn.ParameterList(torch.empty(size).uniform_(-bound, bound) for size in sizes)

    def task_state(self) -> State:
        """Shallow: ``prompts`` [1, P, D]. Deep: only attention reads a block's prompts, so keys and values are folded.

        ``keys.{i}`` and ``values.{i}`` [1, blocks, H, P, d] for stage i. In training, dropout of deep prompts is drawn
        here, once for all images.
        """
        if not self.config.deep:
            return {"prompts": self.prompts[0]}
        state: State = {}
        for number, (stage, prompts) in enumerate(zip(self.backbone.stages, self.prompts, strict=True)):
            seen = F.dropout(prompts, self.config.dropout, self.training)  # [blocks, P, D]
            pairs = [block.key_value(block.norm1(one)) for block, one in zip(stage.blocks, seen.unbind(0), strict=True)]
            state[f"keys.{number}"] = torch.stack([key for key, _ in pairs]).unsqueeze(0)
            state[f"values.{number}"] = torch.stack([value for _, value in pairs]).unsqueeze(0)
        return state

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:  # noqa: ARG002
        """``tokens`` [B, N, D] that enter the first stage."""
        return {"tokens": self.backbone.embed(images)}

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        tokens = image["tokens"]  # [B, N, D]
        tokens = self._deep(tokens, state) if self.config.deep else self._shallow(tokens, state)
        return Features(self.backbone.pool(tokens))

    def _deep(self, tokens: Tensor, state: State) -> Tensor:
        """All stages, with separate prompts for every block, [B, N, D] to [B, N', D']."""
        rows = tokens.shape[0]
        for number, stage in enumerate(self.backbone.stages):
            tokens = self.backbone.enter(number, tokens)
            keys, values = (state[f"{part}.{number}"].expand(rows, -1, -1, -1, -1) for part in ("keys", "values"))
            for place, block in enumerate(stage.blocks):
                prompts = (None, keys[:, place], values[:, place])
                own = block.qkv(block.norm1(tokens))  # [B, H, N, d]
                attended, _ = block.windows.with_prompts(own, block.padding, prompts)
                tokens = block.feed_forward(tokens + block.project(attended))
                probe(f"block{block.index}", tokens)
        return tokens

    def _shallow(self, tokens: Tensor, state: State) -> Tensor:
        """All stages with the same prompts carried through, [B, N, D] to [B, N', D']."""
        count = self.config.num_prompts
        prompts = state["prompts"].expand(tokens.shape[0], -1, -1)  # [B, P, D]
        prompts = F.dropout(prompts, self.config.dropout, self.training)
        for number, stage in enumerate(self.backbone.stages):
            tokens = self.backbone.enter(number, tokens)
            if number > 0:  # as if four equal prompts were merged
                prompts = self.backbone.reduce(number, torch.cat((prompts,) * 4, dim=-1))
            both = torch.cat((prompts, tokens), dim=1)  # [B, P + N, D]
            for block in stage.blocks:
                both = self._shallow_block(block, both)
                probe(f"block{block.index}", both)
            prompts, tokens = both[:, :count], both[:, count:]
        return tokens

    def _shallow_block(self, block: SwinBlock, both: Tensor) -> Tensor:
        """A block for prompts and tokens, [B, P + N, D]."""
        count = self.config.num_prompts
        q, k, v = block.qkv(block.norm1(both))  # [B, H, P + N, d]
        prompts = (q[:, :, :count], k[:, :, :count], v[:, :, :count])
        tokens = (q[:, :, count:], k[:, :, count:], v[:, :, count:])
        attended, seen = block.windows.with_prompts(tokens, block.padding, prompts)
        assert seen is not None
        return block.feed_forward(both + block.project(torch.cat((seen, attended), dim=1)))


@implements(VPTShallowConfig)
class PixelVPT(Method):
    """VPT for models without a place for prompt tokens: ``prompts`` [3, pixels], the border of every image."""

    backbones = (ConvBackbone, PlainBackbone)
    config: VPTShallowConfig
    resize: Tensor

    def __init__(self, config: VPTShallowConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        side, width = backbone.image_size, config.num_prompts
        config.require(2 * width < side, f"{width} pixels a side leave nothing of an image of {side}")
        bound = prompt_bound(1, 3)
        self.prompts = nn.Parameter(torch.empty(3, border_pixels(side, width)).uniform_(-bound, bound))
        self.register_buffer("resize", resizing(side, side - 2 * width), persistent=False)

    def task_state(self) -> State:
        """The prompts themselves."""
        return {"prompts": self.prompts.unsqueeze(0)}

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:  # noqa: ARG002
        """``image`` [B, 3, S, S], made smaller, with a border of zeros."""
        small = resized(images.to(self.resize.dtype), self.resize, self.resize)
        return {"image": F.pad(small, (self.config.num_prompts,) * 4)}

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        prompts = F.dropout(state["prompts"], self.config.dropout, self.training)
        images = add_border(image["image"], prompts.to(image["image"].dtype), self.config.num_prompts)
        return Features(self.driven(images))
