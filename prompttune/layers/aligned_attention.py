"""Spatially aligned attention: each patch query sees the c x c window of patches around its own place.

SA²VP, AAAI 2024, https://arxiv.org/abs/2312.10376, section 3.2. The softmax excludes positions outside the map (there
is zero padding nowhere); patch queries do not see prefix tokens; a prefix query sees every token.

Shapes: P prefix tokens, a grid of R rows and C columns, N = P + R C tokens, H heads of d channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prompttune.errors import UsageError, choose
from prompttune.layers.attention import attend

IMPLEMENTATIONS = ("auto", "masked", "gathered")
MASKED_TOKENS_A_KEY = 71
"""Largest number of tokens, per key of a c² window, for which one masked N x N product is faster than gathering windows
(``benchmarks/attention.py``)."""
HIDDEN = -1e4
"""Score added to hidden keys: finite, so that a row cannot become NaN, and within float16; its exp is exactly 0."""


def window_neighbours(grid: tuple[int, int], window: int) -> tuple[Tensor, Tensor]:
    """The patches that each patch sees.

    Returns:
        Patch indices int64 [R C, c²] (0 outside the map), and whether they are inside the map, bool [R C, c²].
    """
    rows, columns = grid
    offsets = torch.cartesian_prod(*(torch.arange(window) - window // 2,) * 2)  # [c², 2], row by row
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # [R C, 2]
    seen = places[:, None] + offsets[None]  # [R C, c², 2]
    inside = ((seen >= 0) & (seen < torch.tensor([rows, columns]))).all(dim=-1)
    index = seen[..., 0] * columns + seen[..., 1]
    return index.masked_fill(~inside, 0), inside


def window_mask(grid: tuple[int, int], num_prefix_tokens: int, window: int) -> Tensor:
    """Additive float32 mask [N, N]: 0 if a query (row) sees a key (column), else :data:`HIDDEN`."""
    index, inside = window_neighbours(grid, window)
    patches = index.shape[0]
    visible = torch.zeros(patches, patches, dtype=torch.bool)
    query = torch.arange(patches)[:, None].expand_as(index)
    visible[query[inside], index[inside]] = True
    mask = torch.zeros(num_prefix_tokens + patches, num_prefix_tokens + patches)
    mask[num_prefix_tokens:, :num_prefix_tokens] = HIDDEN
    mask[num_prefix_tokens:, num_prefix_tokens:].masked_fill_(~visible, HIDDEN)
    return mask


class AlignedAttention(nn.Module):
    """Windowed cross attention over two maps of the same grid.

    Args:
        grid: rows and columns of the patch map.
        num_prefix_tokens: number of tokens before the patches.
        window: odd side c of the window; None for global attention (the paper's ablation).
        implementation: ``masked`` computes N x N scores with a mask, ``gathered`` gathers c² keys per query, ``auto``
            picks the faster one for the grid.
    """

    def __init__(
        self, grid: tuple[int, int], num_prefix_tokens: int, window: int | None, implementation: str = "auto"
    ) -> None:
        super().__init__()
        choose("implementation", implementation, IMPLEMENTATIONS)
        if window is not None and (window < 1 or window % 2 == 0):
            raise UsageError(f"window must be an odd number of patches, not {window}")
        self.num_prefix_tokens = num_prefix_tokens
        self.window = window
        tokens = num_prefix_tokens + grid[0] * grid[1]
        small = window is not None and tokens <= MASKED_TOKENS_A_KEY * window**2
        self.masked = implementation == "masked" or (implementation == "auto" and small)
        self.mask: Tensor | None
        self.neighbours: Tensor | None
        self.outside: Tensor | None
        mask = neighbours = outside = None
        if window is not None and self.masked:
            mask = window_mask(grid, num_prefix_tokens, window)
        elif window is not None:
            neighbours, inside = window_neighbours(grid, window)
            outside = torch.zeros(inside.shape).masked_fill_(~inside, HIDDEN)
        # Constants of the grid, which do not belong in a task's state dict.
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("neighbours", neighbours, persistent=False)
        self.register_buffer("outside", outside, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with the queries of one map to keys and values of the other.

        Args:
            q, k, v: [B, H, N, d].

        Returns:
            [B, H, N, d].
        """
        if self.window is None:
            return attend(q, k, v)
        if self.mask is not None:
            return attend(q, k, v, self.mask, hides=True)
        prefix = self.num_prefix_tokens
        patches = self._gathered(q[:, :, prefix:], k[:, :, prefix:], v[:, :, prefix:])
        if prefix == 0:
            return patches
        return torch.cat((attend(q[:, :, :prefix], k, v), patches), dim=2)

    def _gathered(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.neighbours is not None
        assert self.outside is not None
        patches, size = self.neighbours.shape
        index = self.neighbours.flatten()
        keys = k.index_select(2, index).unflatten(2, (patches, size))  # [B, H, R C, c², d]
        values = v.index_select(2, index).unflatten(2, (patches, size))
        return attend(q.unsqueeze(3), keys, values, self.outside.unsqueeze(1)).squeeze(3)  # one query a window
