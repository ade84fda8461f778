"""Visual Prompt Tuning, shallow and deep: https://arxiv.org/abs/2203.12119 (ECCV 2022).

P learnable prompts are placed between the prefix tokens and the patches. Shallow: they enter at block 0 and are carried
through. Deep: every block gets new ones instead of those that left the block before it.

On a Swin the prompts precede every window of a block and are ignored by patch merging: section 4.2 of the paper, whose
released code defines the rest (``src/models/vit_prompt/swin_transformer.py`` of KMnP/vpt). Between a prompt and a token
there is neither position bias nor shift mask. The output for shallow prompts is averaged over the windows; to reach the
next stage's width they pass the merging's weights as four equal neighbours. Deviations from that code: it pairs windows
with the prompts of other images in the batch, here they are the image's own; it pools prompts and patches, here only
patches, as the backbone does; dropout of deep prompts is drawn once per step, for block 0 too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.swin import SwinBackbone
from prompttune.backbones.vit import VitBackbone
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Layout, MethodConfig, MethodOver, State, implements, setting
from prompttune.methods.maps import Levels, MapReader


@dataclass(frozen=True)
class VPTShallowConfig(MethodConfig):
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


def prompt_bound(backbone: VitBackbone | SwinBackbone) -> float:
    """VPT's bound v of uniform(-v, v): sqrt(6 / (3 patch² + D)), D the channels of an embedded patch."""
    width = backbone.stages[0].width if isinstance(backbone, SwinBackbone) else backbone.width
    return float((6.0 / (3 * backbone.patch_size**2 + width)) ** 0.5)


def with_prompts(backbone: VitBackbone, tokens: Tensor, prompts: Tensor, replaced: int = 0) -> Tensor:
    """Tokens [B, N, D] with prompts [B, P, D] after the prefix tokens, replacing the ``replaced`` tokens there."""
    prefix = backbone.num_prefix_tokens
    return torch.cat((tokens[:, :prefix], prompts, tokens[:, prefix + replaced :]), dim=1)


def without_prompts(backbone: VitBackbone, tokens: Tensor, count: int) -> Tensor:
    """Tokens [B, N + P, D] of the last block without the P prompts; token 0 alone passes unchanged."""
    if backbone.pools_class_token:
        return tokens
    prefix = backbone.num_prefix_tokens
    return torch.cat((tokens[:, :prefix], tokens[:, prefix + count :]), dim=1)


@implements(VPTShallowConfig)
class VPT(MethodOver[VitBackbone]):
    """Prompts [L, P, D]: L is the depth for deep prompts, 1 for shallow ones."""

    backbones = (VitBackbone,)
    gives_maps_on = (VitBackbone,)

    def __init__(self, config: VPTShallowConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        backbone = self.backbone
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

    def forward(self, images: Tensor, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        backbone = self.backbone
        count = self.config.num_prompts
        reader = MapReader(backbone, levels, count)
        tokens = backbone.embed(images)  # [B, N, D]
        prompts = state["prompts"].expand(tokens.shape[0], -1, -1, -1)  # [B, L, P, D]
        prompts = F.dropout(prompts, self.config.dropout, self.training)
        tokens = with_prompts(backbone, tokens, prompts[:, 0])  # [B, N + P, D]
        for index in range(backbone.depth):
            if index > 0 and self.config.deep:
                tokens = with_prompts(backbone, tokens, prompts[:, index], replaced=count)
            if index < backbone.depth - 1:
                tokens = backbone.run_block(index, tokens)
                reader.read(index, tokens)
                probe(f"block{index}", tokens)
        tokens = backbone.run_last_block(tokens, reader.whole)
        reader.read(backbone.depth - 1, tokens)
        return Features(backbone.pool(without_prompts(backbone, tokens, count)), maps=reader.maps)


@implements(VPTShallowConfig)
class SwinVPT(MethodOver[SwinBackbone]):
    """VPT over a Swin: ``prompts.{i}`` [blocks, P, D] for each stage i, or ``prompts.0`` [1, P, D] alone if shallow."""

    backbones = (SwinBackbone,)

    def __init__(self, config: VPTShallowConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        backbone = self.backbone
        self.config = config
        bound, count = prompt_bound(backbone), config.num_prompts
        sizes = [(len(stage.blocks), count, stage.width) for stage in backbone.stages]
        if not config.deep:
            sizes = [(1, count, backbone.stages[0].width)]
        self.prompts = nn.ParameterList(torch.empty(size).uniform_(-bound, bound) for size in sizes)

    def task_state(self) -> State:
        """Shallow: ``prompts`` [1, P, D]. Deep: only attention reads a block's prompts, so keys and values are folded.

        ``keys.{i}`` and ``values.{i}`` [1, blocks, H, P, d] for stage i. In training, dropout of deep prompts is drawn
        here, once for all images.
        """
        if not self.config.deep:
            return {"prompts": self.prompts[0]}
        backbone = self.backbone
        state: State = {}
        for number, (stage, prompts) in enumerate(zip(backbone.stages, self.prompts, strict=True)):
            seen = F.dropout(prompts, self.config.dropout, self.training)  # [blocks, P, D]
            pairs = [
                backbone.key_value(index, backbone.norm1(index, one))
                for index, one in zip(stage.blocks, seen.unbind(0), strict=True)
            ]
            state[f"keys.{number}"] = torch.stack([key for key, _ in pairs]).unsqueeze(0)
            state[f"values.{number}"] = torch.stack([value for _, value in pairs]).unsqueeze(0)
        return state

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        count = self.config.num_prompts
        if not self.config.deep:
            return {"prompts": (count, self.backbone.stages[0].width)}
        layout: Layout = {}
        for number, stage in enumerate(self.backbone.stages):
            for part in ("keys", "values"):
                layout[f"{part}.{number}"] = (len(stage.blocks), stage.num_heads, count, stage.head_dim)
        return layout

    def forward(self, images: Tensor, state: State, aux: bool = False) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        tokens = self.backbone.embed(images)  # [B, N, D]
        tokens = self._deep(tokens, state) if self.config.deep else self._shallow(tokens, state)
        return Features(self.backbone.pool(tokens))

    def _deep(self, tokens: Tensor, state: State) -> Tensor:
        """All stages, with separate prompts for every block, [B, N, D] to [B, N', D']."""
        backbone, rows = self.backbone, tokens.shape[0]
        for number, stage in enumerate(backbone.stages):
            tokens = backbone.merge(number, tokens)
            keys, values = (state[f"{part}.{number}"].expand(rows, -1, -1, -1, -1) for part in ("keys", "values"))
            for place, index in enumerate(stage.blocks):
                parts = backbone.qkv(index, backbone.norm1(index, tokens))  # [B, H, N, d]
                attended, _ = backbone.attend_prompted(index, parts, (None, keys[:, place], values[:, place]))
                tokens = backbone.feed_forward(index, tokens + backbone.project(index, attended))
                probe(f"block{index}", tokens)
        return tokens

    def _shallow(self, tokens: Tensor, state: State) -> Tensor:
        """All stages with the same prompts carried through, [B, N, D] to [B, N', D']."""
        backbone, count = self.backbone, self.config.num_prompts
        prompts = state["prompts"].expand(tokens.shape[0], -1, -1)  # [B, P, D]
        prompts = F.dropout(prompts, self.config.dropout, self.training)
        for number, stage in enumerate(backbone.stages):
            tokens = backbone.merge(number, tokens)
            if number > 0:
                prompts = backbone.widen(number, prompts)
            both = torch.cat((prompts, tokens), dim=1)  # [B, P + N, D]
            for index in stage.blocks:
                both = self._shallow_block(index, both)
                probe(f"block{index}", both)
            prompts, tokens = both[:, :count], both[:, count:]
        return tokens

    def _shallow_block(self, index: int, both: Tensor) -> Tensor:
        """A block for prompts and tokens, [B, P + N, D]."""
        backbone, count = self.backbone, self.config.num_prompts
        q, k, v = backbone.qkv(index, backbone.norm1(index, both))  # [B, H, P + N, d]
        prompts = (q[:, :, :count], k[:, :, :count], v[:, :, :count])
        tokens = (q[:, :, count:], k[:, :, count:], v[:, :, count:])
        attended, seen = backbone.attend_prompted(index, tokens, prompts)
        assert seen is not None
        attended = torch.cat((seen, attended), dim=1)
        return backbone.feed_forward(index, both + backbone.project(index, attended))
