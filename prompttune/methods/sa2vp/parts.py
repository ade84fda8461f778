"""Parts of SA²VP for any backbone: prompt maps, adapters, and one pathway's contribution to the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.blocks import AttentionBlock, merge_heads
from prompttune.layers.aligned_attention import AlignedAttention
from prompttune.layers.bottleneck import Bottleneck, bottleneck, of_block, plain_norm, stacked, stacked_layout
from prompttune.layers.probe import probe
from prompttune.methods.base import RANK, Kind, Layout, MethodOver, State
from prompttune.methods.sa2vp.config import SA2VPConfig


def probe_pathways(index: int, h: Tensor, p: Tensor) -> None:
    """Pass the output of block ``index`` to a running recording."""
    probe(f"block{index}", h)
    probe(f"block{index}.prompts", p)


ALLOCATOR_KEEPS = 32 * 2**20
"""Bytes above which glibc maps every allocation anew (the ceiling of its dynamic ``M_MMAP_THRESHOLD``)."""


def one_batch(tokens: Tensor, hidden_width: int) -> bool:
    """Whether an MLP of ``hidden_width`` is faster on both pathways in ``tokens`` [2 B, N, D] as one batch.

    It is, except in eager mode on a CPU once the hidden activations exceed the memory that the C allocator keeps for
    reuse: from there on each call would fault in fresh pages, and one pathway after the other is faster.
    """
    # A traced graph does not have a fixed size: comparing it would bind the graph to one range of batches.
    if torch.compiler.is_compiling() or tokens.device.type != "cpu":
        return True
    return tokens[..., 0].numel() * hidden_width * tokens.element_size() <= ALLOCATOR_KEEPS


class PromptMap(nn.Module):
    """A learnable map of rank r: ``tokens`` [1, N', r], ``proj`` r to D, and ``scale`` [D] if it joins late.

    The map may have fewer rows and columns than the patches; it is then resized to theirs, without prefix tokens,
    before it is used. Resizing and projecting commute, so the resizing works at rank r.

    Args:
        grid: rows and columns of the patch map.
        num_prefix_tokens: number of tokens before the patches.
        width: channels D.
        config: settings; ``rank`` is r, and ``map_scale`` the ratio of the learnable map's side to the patch map's.
        scaled: whether the map joins in a later block.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        num_prefix_tokens: int,
        width: int,
        config: SA2VPConfig,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens
        self.own_grid = scaled_grid(grid, config.map_scale)
        num_tokens = num_prefix_tokens + self.own_grid[0] * self.own_grid[1]
        self.tokens = nn.Parameter(torch.empty(1, num_tokens, config.rank))
        self.proj = nn.Linear(config.rank, width)
        nn.init.trunc_normal_(self.tokens, std=0.02)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.normal_(self.proj.bias, std=1e-6)
        if scaled:
            self.scale = nn.Parameter(torch.empty(width))
            nn.init.normal_(self.scale, std=0.02)

    def forward(self) -> Tensor:
        """The map at full size and width, [1, N, D]."""
        projected: Tensor = self.proj(self._resized())
        return projected

    def _resized(self) -> Tensor:
        """The tokens on the patches' grid, [1, N, r]."""
        if self.own_grid == self.grid:
            return self.tokens
        prefix = self.num_prefix_tokens
        patches = self.tokens[:, prefix:].transpose(1, 2).unflatten(2, self.own_grid)  # [1, r, R', C']
        patches = F.interpolate(patches, self.grid, mode="bilinear", align_corners=False)
        return torch.cat((self.tokens[:, :prefix], patches.flatten(2).transpose(1, 2)), dim=1)


def scaled_grid(grid: tuple[int, int], scale: float) -> tuple[int, int]:
    """Rows and columns of a map whose sides are scaled by ``scale``, rounded, at least 1."""
    return max(1, round(scale * grid[0])), max(1, round(scale * grid[1]))


class Pathways(MethodOver[Kind]):
    """Base of SA²VP over a backbone: adapters for the blocks where the pathways meet, and the aligned attention.

    Args:
        config: settings with their prompt layers filled in.
        backbone: a backbone that the subclass drives.
        depth: number of blocks in which the pathways meet; prompt layers and adapters are counted in them, from 0.
        width: channels D in these blocks.
        grid: rows and columns of the patch map there.
        num_prefix_tokens: number of tokens before the patches.
    """

    config: SA2VPConfig

    def __init__(
        self,
        config: SA2VPConfig,
        backbone: Backbone,
        *,
        depth: int,
        width: int,
        grid: tuple[int, int],
        num_prefix_tokens: int,
    ) -> None:
        super().__init__(config, backbone)
        assert config.prompt_layers is not None
        self.prompt_layers = config.prompt_layers
        self.depth = depth
        self.map_width = width
        self.num_tokens = num_prefix_tokens + grid[0] * grid[1]
        # The last block in which the base reads the prompts: after it, the prompt pathway affects only itself.
        self.last_read = max(index for index in range(depth) if index not in self.prompt_layers)
        self.prompts = nn.ModuleDict()
        self.adapters = nn.ModuleList(
            _adapter(width, config.rank, config.init == "zero") for _ in range(depth if config.adapter else 0)
        )
        window = config.window if config.attention == "aligned" else None
        self.aligned = AlignedAttention(grid, num_prefix_tokens, window)

    def given_state(self) -> State:
        """``adapters.*`` stacked over blocks and scaled by γ, or ``gamma`` [1, 1] without adapters."""
        if not self.config.adapter:
            return {"gamma": next(self.prompts.parameters()).new_full((1, 1), self.config.gamma)}
        return stacked("adapters", self.adapters, self.config.gamma)

    def given_layout(self) -> Layout:
        """Layout of :meth:`given_state`."""
        if not self.config.adapter:
            return {"gamma": (1,)}
        return stacked_layout("adapters", self.depth, self.map_width, RANK)

    def give(self, index: int, z: Tensor, state: State) -> Tensor:
        """γ adapter(z), [B, N, D]; γ is in the state."""
        if not self.config.adapter:
            return state["gamma"].unsqueeze(-1) * z
        own, config = of_block(state, "adapters", index), self.config
        return self.drop(bottleneck(plain_norm(z), own, config.activation, config.dropout, self.training))

    def drop(self, attended: Tensor) -> Tensor:
        """Apply dropout to the output of a cross attention or an adapter, in training."""
        return F.dropout(attended, self.config.dropout, self.training)


def _adapter(width: int, rank: int, zero_up: bool) -> Bottleneck:
    """Parameters of ``up(act(down(LayerNorm(z))))``, the paper's Eq. 3."""
    made = Bottleneck(width, rank, norm=True)
    nn.init.xavier_uniform_(made.down.weight)
    nn.init.normal_(made.down.bias, std=1e-6)
    if zero_up:
        nn.init.zeros_(made.up.weight)
        nn.init.zeros_(made.up.bias)
    else:
        nn.init.xavier_uniform_(made.up.weight)
        nn.init.normal_(made.up.bias, std=1e-6)
    return made


class AttentionPathways(Pathways[Kind]):
    """SA²VP over blocks with attention, whose own norm, projections and heads the cross attention uses.

    Tokens are [B, N, D], queries, keys and values [B, H, N, d]; ``index`` counts the blocks in which the pathways meet.
    """

    @property
    def meeting(self) -> tuple[AttentionBlock, ...]:
        """The blocks in which the pathways meet."""
        raise NotImplementedError

    def start_state(self, start: Tensor) -> State:
        """The folded first block for the prompt tokens [1, N, D] that enter it.

        ``prompt.input`` [1, N, D]; ``prompt.query`` [1, H, N, d], its queries; ``prompt.output`` [1, N, D].
        """
        block = self.meeting[0]
        q, k, v = block.qkv(block.norm1(start))
        output = block.feed_forward(start + block.project(block.attend(q, k, v)))
        return {"prompt.input": start, "prompt.query": q, "prompt.output": output}

    def start_layout(self) -> Layout:
        """Layout of :meth:`start_state`."""
        block, tokens = self.meeting[0], (self.num_tokens, self.map_width)
        query = (block.num_heads, self.num_tokens, block.head_dim)
        return {"prompt.input": tokens, "prompt.query": query, "prompt.output": tokens}

    def met_state(self, h: Tensor) -> State:
        """The base in the first block, where it only gives: ``tokens`` [B, N, D] after it, ``key`` and ``value``."""
        block = self.meeting[0]
        q, k, v = block.qkv(block.norm1(h))
        own = block.project(block.attend(q, k, v))
        return {"tokens": block.feed_forward(h + own), "key": k, "value": v}

    def first_prompts(self, image: State, state: State) -> Tensor:
        """The prompt pathway after the first block, [B, N, D]; its own part is folded in the state."""
        asking, query = state["prompt.input"], state["prompt.query"]
        return state["prompt.output"] + self.cross(0, asking, query, image["key"], image["value"], state)

    def block(self, index: int, h: Tensor, p: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """A later block for both pathways."""
        block, x = self.meeting[index], torch.cat((h, p))  # [2 B, N, D]
        q, k, v = block.qkv(block.norm1(x))  # [2 B, H, N, d]
        own = block.project(block.attend(q, k, v))  # [2 B, N, D]
        asking, answering = (1, 0) if index in self.prompt_layers else (0, 1)
        across = pathway(q, asking), pathway(k, answering), pathway(v, answering)
        given = self.cross(index, (h, p)[asking], *across, state)
        h, p = feed_forward_both(block, x + own)
        return self.join(index, h, p, given, state)

    def cross(self, index: int, asking: Tensor, q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
        """One pathway's contribution to the other: tokens ask with q keys and values of both."""
        return self.give_attended(index, asking, self.aligned(q, k, v), state)

    def give_attended(self, index: int, asking: Tensor, attended: Tensor, state: State) -> Tensor:
        """One pathway's contribution to the tokens that asked, from the cross attention [B, H, N, d]."""
        return self.give(index, asking + self.drop(self.meeting[index].project(merge_heads(attended))), state)

    def join(self, index: int, h: Tensor, p: Tensor, given: Tensor, state: State) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Add one pathway's contribution to the other."""
        return (h, p + given) if index in self.prompt_layers else (h + given, p)


def pathway(x: Tensor, number: int) -> Tensor:
    """One of two pathways that run as one batch, [2 B, ...] to [B, ...]."""
    one: Tensor = x.unflatten(0, (2, -1))[number]
    return one


def feed_forward_both(block: AttentionBlock, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The second half of a block for both pathways, [2 B, N, D] to twice [B, N, D]."""
    if not one_batch(tokens, block.hidden_width):
        return block.feed_forward(pathway(tokens, 0)), block.feed_forward(pathway(tokens, 1))
    tokens = block.feed_forward(tokens)
    return pathway(tokens, 0), pathway(tokens, 1)
