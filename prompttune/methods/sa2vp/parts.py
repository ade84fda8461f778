"""Parts of SA²VP for any backbone: prompt maps, adapters, and one pathway's contribution to the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.layers.adapter import Adapter, apply_adapter
from prompttune.layers.aligned_attention import AlignedAttention
from prompttune.layers.bottleneck import PARTS, of_block, stacked_layout
from prompttune.layers.probe import probe
from prompttune.methods.base import RANK, Kind, Layout, MethodOver, State
from prompttune.methods.sa2vp.config import SA2VPConfig


def probe_pathways(index: int, h: Tensor, p: Tensor) -> None:
    """Pass the output of block ``index`` to a running recording."""
    probe(f"block{index}", h)
    probe(f"block{index}.prompts", p)


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
        self.config = config
        self.prompt_layers = config.prompt_layers
        self.depth = depth
        self.width = width
        # The last block in which the base reads the prompts: after it, the prompt pathway affects only itself.
        self.last_read = max(index for index in range(depth) if index not in self.prompt_layers)
        self.prompts = nn.ModuleDict()
        self.adapters = nn.ModuleList(
            Adapter(width, config.rank, zero_up=config.init == "zero") for _ in range(depth if config.adapter else 0)
        )
        window = config.window if config.attention == "aligned" else None
        self.aligned = AlignedAttention(grid, num_prefix_tokens, window)

    def given_state(self) -> State:
        """``adapters.*`` stacked over blocks and scaled by γ, or ``gamma`` [1, 1] without adapters."""
        if not self.config.adapter:
            return {"gamma": next(self.prompts.parameters()).new_full((1, 1), self.config.gamma)}
        folded = [adapter.folded(self.config.gamma) for adapter in self.adapters if isinstance(adapter, Adapter)]
        return {
            f"adapters.{name}": torch.stack(parts).unsqueeze(0)
            for name, parts in zip(PARTS, zip(*folded, strict=True), strict=True)
        }

    def given_layout(self) -> Layout:
        """Layout of :meth:`given_state`."""
        if not self.config.adapter:
            return {"gamma": (1,)}
        return stacked_layout("adapters", self.depth, self.width, RANK)

    def give(self, index: int, z: Tensor, state: State) -> Tensor:
        """γ adapter(z), [B, N, D]; γ is in the state."""
        if not self.config.adapter:
            return state["gamma"].unsqueeze(-1) * z
        config, own = self.config, of_block(state, "adapters", index)
        return apply_adapter(z, **own, activation=config.activation, dropout=config.dropout, training=self.training)

    def drop(self, attended: Tensor) -> Tensor:
        """Apply dropout to the cross attention's output, in training."""
        return F.dropout(attended, self.config.dropout, self.training)
