"""Spatially Aligned-and-Adapted Visual Prompt, SA²VP: https://arxiv.org/abs/2312.10376 (AAAI 2024).

Two pathways run through the same frozen blocks: the base pathway h over the image's tokens and the prompt pathway p
over a learnable map with one token for each token of h. In the prompt layers the base adapts the prompts, in all
other blocks the prompts adapt the base, through spatially aligned cross attention and a bottleneck adapter.

What does not depend on the image is folded into the task's state, exactly: the prompt pathway's block 0 with its
queries, the deep prompt maps' blocks, γ and the adapter norm's affine part. A block's self and cross attention share
q, k and v; both pathways go through the frozen weights as one batch; the last block computes what the head reads.

Deviations from the released code are settings, the released form being the default: ``activation`` (the code uses
GELU, Eq. 3 says ReLU), ``fusion`` (the code passes a new prompt map through the block, Eq. 5 adds it directly). The
one default that differs is ``init``: with ``up`` at zero a task starts from the frozen backbone's own features and
learns in a few epochs; ``released`` draws ``up`` at random.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone, merge_heads
from prompttune.layers.adapter import ACTIVATIONS, Adapter, apply_adapter
from prompttune.layers.aligned_attention import AlignedAttention
from prompttune.layers.attention import attend
from prompttune.layers.probe import probe
from prompttune.methods.base import RANK, Features, Layout, Method, MethodConfig, State, setting

PROMPT_LAYER_STRIDE = 4
"""The paper's prompt layers of a 12-block ViT are 0, 4 and 8."""


@dataclass(frozen=True)
class SA2VPConfig(MethodConfig):
    """Settings of SA²VP. ``prompt_layers=None`` takes every fourth block; ``(0,)`` is the shallow mode."""

    method = "sa2vp"
    shapes_graph = ("window", "prompt_layers", "attention", "adapter", "activation")

    rank: int = setting(16, "rank r of the prompt maps and adapters")
    gamma: float = setting(0.5, "γ, weight of what one pathway gives the other")
    window: int = setting(3, "odd side c of the aligned window, in patches")
    prompt_layers: tuple[int, ...] | None = setting(
        None, "blocks that take a prompt map, 0 first; 0 alone is the shallow mode; by default every fourth"
    )
    attention: str = setting("aligned", "what a patch query sees of the other map", ("aligned", "global"))
    adapter: bool = setting(True, "bottleneck adapter on what the pathways exchange")
    base_weight: float = setting(0.8, "λ, weight of the base pathway's loss; 1 leaves the prompts unsupervised")
    activation: str = setting("gelu", "adapter activation: gelu as released, relu as in the paper", ACTIVATIONS)
    fusion: str = setting(
        "released",
        "a new prompt map goes through the block (released) or is added (paper)",
        ("released", "paper"),
    )
    init: str = setting("zero", "the adapters' last layer: zero, or random as released", ("zero", "released"))
    dropout: float = setting(0.1, "drop-out on the cross attention and in the adapters, while training")

    def check(self) -> None:
        """See :meth:`MethodConfig.check`."""
        self.require(self.rank > 0, f"rank must be above 0, not {self.rank}")
        self.require(self.window > 0 and self.window % 2 == 1, f"window must be odd, not {self.window}")
        self.require(0 <= self.base_weight <= 1, f"base_weight must be from 0 to 1, not {self.base_weight}")
        self.require(0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, not {self.dropout}")
        layers = self.prompt_layers
        if layers is not None:
            rising = all(a < b for a, b in itertools.pairwise(layers))
            self.require(len(layers) > 0 and layers[0] == 0 and rising, f"prompt_layers {layers} must rise from 0")

    def resolved(self, backbone: Backbone) -> SA2VPConfig:
        """Prompt layers filled in for the backbone's depth."""
        layers = self.prompt_layers
        if layers is None:
            layers = tuple(range(0, backbone.depth, PROMPT_LAYER_STRIDE))
        fits = layers[-1] < backbone.depth and len(layers) < backbone.depth
        self.require(fits, f"prompt_layers {layers} do not fit {backbone.depth} blocks of {backbone.name}")
        return dataclasses.replace(self, prompt_layers=layers)

    def build(self, backbone: Backbone) -> Method:
        """See :meth:`MethodConfig.build`."""
        return SA2VP(self.resolved(backbone), backbone)

    @property
    def base_loss_weight(self) -> float:
        """λ."""
        return self.base_weight


def probe_pathways(index: int, h: Tensor, p: Tensor) -> None:
    """Offer what leaves block ``index`` to whoever records."""
    probe(f"block{index}", h)
    probe(f"block{index}.prompts", p)


class PromptMap(nn.Module):
    """A learnable map of rank r: ``tokens`` [1, N, r], ``proj`` r to D, and ``scale`` [D] where it joins late."""

    def __init__(self, num_tokens: int, rank: int, width: int, scaled: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(1, num_tokens, rank))
        self.proj = nn.Linear(rank, width)
        nn.init.trunc_normal_(self.tokens, std=0.02)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.normal_(self.proj.bias, std=1e-6)
        if scaled:
            self.scale = nn.Parameter(torch.empty(width))
            nn.init.normal_(self.scale, std=0.02)

    def forward(self) -> Tensor:
        """The map at full width, [1, N, D]."""
        projected: Tensor = self.proj(self.tokens)
        return projected


class SA2VP(Method):
    """One task of SA²VP over a ViT: ``prompts.{i}`` for the prompt layers, ``adapters.{i}`` for every block."""

    backbones = (VitBackbone,)

    def __init__(self, config: SA2VPConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        assert isinstance(backbone, VitBackbone)
        assert config.prompt_layers is not None
        self.config = config
        self.prompt_layers = config.prompt_layers
        self.depth = backbone.depth
        # The last block in which the base reads the prompts: behind it the prompt pathway matters to itself alone.
        self.last_read = max(index for index in range(self.depth) if index not in self.prompt_layers)
        self.prompts = nn.ModuleDict(
            {
                str(index): PromptMap(backbone.num_tokens, config.rank, backbone.width, scaled=index > 0)
                for index in self.prompt_layers
            }
        )
        self.adapters = nn.ModuleList(
            Adapter(backbone.width, config.rank, zero_up=config.init == "zero")
            for _ in range(self.depth if config.adapter else 0)
        )
        window = config.window if config.attention == "aligned" else None
        self.aligned = AlignedAttention(backbone.grid, backbone.num_prefix_tokens, window)

    @property
    def backbone(self) -> VitBackbone:
        """The frozen backbone, typed."""
        backbone = self._backbone[0]
        assert isinstance(backbone, VitBackbone)
        return backbone

    # ------------------------------------------------------------------ state

    def task_state(self) -> State:
        """Folded tensors of the task.

        ``prompt.input`` [1, N, D], the map that enters block 0; ``prompt.query`` [1, H, N, d], its queries there;
        ``prompt.output`` [1, N, D], what block 0 makes of it; ``deep`` [1, K, N, D], the scaled later maps;
        ``adapters.*`` stacked over blocks and scaled by γ, or ``gamma`` [1, 1] without adapters.
        """
        backbone = self.backbone
        start = backbone.position(self.prompts["0"]())
        state = {
            "prompt.input": start,
            "prompt.query": backbone.query(0, backbone.norm1(0, start)),
            "prompt.output": backbone.run_block(0, start),
        }
        if len(self.prompt_layers) > 1:
            state["deep"] = torch.stack([self._deep_map(index) for index in self.prompt_layers[1:]], dim=1)
        if self.config.adapter:
            folded = [adapter.folded(self.config.gamma) for adapter in self._adapters()]
            for name, parts in zip(("down", "down_bias", "up", "up_bias"), zip(*folded, strict=True), strict=True):
                state[f"adapters.{name}"] = torch.stack(parts).unsqueeze(0)
        else:
            state["gamma"] = start.new_full((1, 1), self.config.gamma)
        return state

    def _adapters(self) -> list[Adapter]:
        return [adapter for adapter in self.adapters if isinstance(adapter, Adapter)]

    def _deep_map(self, index: int) -> Tensor:
        prompt = self.prompts[str(index)]
        assert isinstance(prompt, PromptMap)
        new = prompt()
        if self.config.fusion == "released":
            new = self.backbone.run_block(index, new)
        scaled: Tensor = prompt.scale * new
        return scaled

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        backbone = self.backbone
        tokens, width = backbone.num_tokens, backbone.width
        layout: Layout = {
            "prompt.input": (tokens, width),
            "prompt.query": (backbone.num_heads, tokens, backbone.head_dim),
            "prompt.output": (tokens, width),
        }
        if len(self.prompt_layers) > 1:
            layout["deep"] = (len(self.prompt_layers) - 1, tokens, width)
        if self.config.adapter:
            layout["adapters.down"] = (self.depth, width, RANK)
            layout["adapters.down_bias"] = (self.depth, RANK)
            layout["adapters.up"] = (self.depth, RANK, width)
            layout["adapters.up_bias"] = (self.depth, width)
        else:
            layout["gamma"] = (1,)
        return layout

    # ---------------------------------------------------------------- forward

    def forward(self, images: Tensor, state: State, aux: bool = False) -> Features:
        """See :meth:`Method.forward`. Without ``aux`` nothing is computed for the prompt pathway's own sake."""
        backbone = self.backbone
        h, p = self._first_block(backbone.embed(images), state)
        for index in range(1, self.depth - 1):
            probe_pathways(index - 1, h, p)
            if aux or index <= self.last_read:
                h, p = self._block(index, h, p, state)
            else:
                h = backbone.run_block(index, h)
        probe_pathways(self.depth - 2, h, p)
        h, last_p = self._last_block(h, p, state, aux)
        return Features(backbone.pool(h), None if last_p is None else backbone.pool(last_p))

    def _first_block(self, h: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Block 0, [B, N, D]: the prompt pathway's own part comes folded with the state."""
        backbone = self.backbone
        q, k, v = backbone.qkv(0, backbone.norm1(0, h))  # [B, H, N, d]
        own = backbone.project(0, merge_heads(attend(q, k, v)))
        cross = backbone.project(0, merge_heads(self.aligned(state["prompt.query"], k, v)))
        given = self._give(0, state["prompt.input"] + self._drop(cross), state)
        return backbone.feed_forward(0, h + own), state["prompt.output"] + given

    def _block(self, index: int, h: Tensor, p: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """A block of both pathways, [B, N, D] each."""
        backbone = self.backbone
        x = torch.stack((h, p))  # [2, B, N, D]
        q, k, v = backbone.qkv(index, backbone.norm1(index, x))  # [2, B, H, N, d]
        asking, answering = (1, 0) if index in self.prompt_layers else (0, 1)
        own = backbone.project(index, merge_heads(attend(q, k, v)))  # [2, B, N, D]
        cross = backbone.project(index, merge_heads(self.aligned(q[asking], k[answering], v[answering])))
        given = self._give(index, (h, p)[asking] + self._drop(cross), state)
        h, p = backbone.feed_forward_both(index, x + own)
        return self._join(index, h, p, given, state)

    def _last_block(self, h: Tensor, p: Tensor, state: State, aux: bool) -> tuple[Tensor, Tensor | None]:
        """The last block: keys and values of all tokens, the rest only for the tokens that are pooled.

        Returns:
            Tokens of the base and, with ``aux``, of the prompt pathway: [B, 1 or N, D].
        """
        backbone, index = self.backbone, self.depth - 1
        reads_prompts = index not in self.prompt_layers
        x = torch.stack((h, p)) if reads_prompts or aux else h.unsqueeze(0)  # [1 or 2, B, N, D]
        normed = backbone.norm1(index, x)
        k, v = backbone.key_value(index, normed)  # [1 or 2, B, H, N, d]
        streams = 2 if aux else 1
        asking = x[:streams]
        if backbone.pools_class_token:
            asking, normed = asking[:, :, :1], normed[:, :, :1]
        q = backbone.query(index, normed[:streams])
        own = backbone.project(index, merge_heads(attend(q, k[:streams], v[:streams])))
        out = backbone.feed_forward(index, asking + own)
        if not (reads_prompts or aux):
            return out[0], None
        source, target = (0, 1) if reads_prompts else (1, 0)
        # The class token, a prefix token, sees all of the other map.
        across = attend if backbone.pools_class_token else self.aligned
        cross = backbone.project(index, merge_heads(across(q[source], k[target], v[target])))
        given = self._give(index, asking[source] + self._drop(cross), state)
        if not aux:
            return out[0] + given, None
        return self._join(index, out[0], out[1], given, state)

    def _join(self, index: int, h: Tensor, p: Tensor, given: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Add what one pathway gives to the other one; a prompt layer also brings its new map."""
        if index not in self.prompt_layers:
            return h + given, p
        deep = state["deep"][:, self.prompt_layers.index(index) - 1]  # [1 or B, N, D]
        return h, p + given + deep[:, : p.shape[1]]

    def _give(self, index: int, z: Tensor, state: State) -> Tensor:
        """γ adapter(z), [B, N, D]; γ is in the state."""
        if not self.config.adapter:
            return state["gamma"].unsqueeze(-1) * z
        down, down_bias, up, up_bias = (
            state[f"adapters.{name}"][:, index] for name in ("down", "down_bias", "up", "up_bias")
        )
        config = self.config
        return apply_adapter(z, down, down_bias, up, up_bias, config.activation, config.dropout, self.training)

    def _drop(self, attended: Tensor) -> Tensor:
        return F.dropout(attended, self.config.dropout, self.training)
