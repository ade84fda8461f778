"""Attention inside a Swin block's windows, and the order of patch merging, as gathers with constant indices.

Swin, https://arxiv.org/abs/2103.14030. Cyclic shift, padding and partition are timm's, applied once to the map of token
numbers; what they make of it is the gather. The batch stays a plain leading axis: timm's own partition folds it into
the windows. N = R C tokens of the map; W windows of A tokens; H heads of d channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.swin_transformer import window_partition
from torch import Tensor, nn

from prompttune.backbones.blocks import Constant
from prompttune.layers.attention import attend


def padded_numbers(grid: tuple[int, int], multiple: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Tensor:
    """Token numbers of a map, shifted and padded to a multiple of rows and columns.

    Returns:
        int64 [rows, columns]; N marks places outside the map.
    """
    rows, columns = grid
    numbers = torch.arange(rows * columns).reshape(rows, columns)
    numbers = numbers.roll((-shift[0], -shift[1]), dims=(0, 1))
    padding = (0, -columns % multiple[1], 0, -rows % multiple[0])
    return nn.functional.pad(numbers, padding, value=rows * columns)


def window_order(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The order of tokens once a map is divided into windows.

    Returns:
        The token of each place, int64 [W A], N for padding; and the place of each token, int64 [N].
    """
    numbers = padded_numbers(grid, window, shift)
    order = window_partition(numbers[None, :, :, None], window).flatten()
    return order, order.argsort(stable=True)[: grid[0] * grid[1]]


def merging_order(grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The four tokens that patch merging joins into each new one.

    Returns:
        int64 [4 R' C'], N for padding, and the new grid (R', C').
    """
    numbers = padded_numbers(grid, (2, 2))
    rows, columns = numbers.shape[0] // 2, numbers.shape[1] // 2
    order = numbers.reshape(rows, 2, columns, 2).permute(0, 2, 3, 1).flatten()  # timm's order: down, then right
    return order, (rows, columns)


class Windows(nn.Module):
    """The attention of a frozen block between its projections, for one size of the map.

    Args:
        block: the frozen block.
        grid: rows and columns of the map.
        position_bias: a bound method that gives the block's relative position bias, float32 [H, A, A].
    """

    order: Tensor
    places: Tensor
    shift_mask: Tensor | None

    def __init__(self, block: Any, grid: tuple[int, int], position_bias: Callable[[], Tensor]) -> None:
        super().__init__()
        order, places = window_order(grid, block.window_size, block.shift_size)
        self.count = order.numel() // block.window_area
        self.padded = order.numel() > places.numel()
        self.moves = self.padded or not torch.equal(order, torch.arange(order.numel()))
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.bias = Constant(position_bias)
        shift_mask = None if block.attn_mask is None else block.attn_mask.float().clone()  # [W, A, A]
        self.register_buffer("shift_mask", shift_mask, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Self attention in the windows.

        Args:
            q, k, v: [..., H, N, d].
            padding: the query, key and value of a padded place, [H, 1, d] each.

        Returns:
            [..., N, H d].
        """
        q, k, v = (self.partition(part, pad) for part, pad in zip((q, k, v), padding, strict=True))
        return self.reverse(attend(q, k, v, self.mask(), self.shift_mask is not None))

    def with_prompts(
        self,
        parts: tuple[Tensor, Tensor, Tensor],
        padding: tuple[Tensor, Tensor, Tensor],
        prompts: tuple[Tensor | None, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Self attention in the windows, with the same prompts in front of each.

        Args:
            parts: queries, keys and values of the map, [B, H, N, d] each.
            padding: the same parts of a padded place, [H, 1, d] each.
            prompts: the same parts of the prompts, [B, H, P, d] each; without queries the prompts are only read.

        Returns:
            The map, [B, N, H d], and the output for the prompts, averaged over the windows, [B, P, H d].
        """
        asking, count = prompts[0], prompts[1].shape[-2]
        q, k, v = (
            tokens if prompt is None else torch.cat((self._in_each(prompt), tokens), dim=-2)  # [B, H W, P + A, d]
            for tokens, prompt in zip(map(self.partition, parts, padding), prompts, strict=True)
        )
        # Between prompts and tokens there is neither position bias nor shift mask: prompts belong to every window.
        front = 0 if asking is None else count
        mask = nn.functional.pad(self.mask(), (count, 0, front, 0))
        attended = attend(q, k, v, mask, self.shift_mask is not None)
        if asking is None:
            return self.reverse(attended), None
        seen = attended[..., :count, :].unflatten(-3, (-1, self.count)).mean(dim=-3)  # [B, H, P, d]
        return self.reverse(attended[..., count:, :]), seen.transpose(-3, -2).flatten(-2)

    def mask(self) -> Tensor:
        """Relative position bias and shift mask, float32 [H W, A, A], added to the scores."""
        bias: Tensor = self.bias().unsqueeze(1)  # [H, 1, A, A]
        if self.shift_mask is None:
            return bias.expand(-1, self.count, -1, -1).flatten(0, 1)
        return (bias + self.shift_mask).flatten(0, 1)

    def partition(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """[..., H, N, d] to [..., H W, A, d]; padded places take ``padding`` [H, 1, d]."""
        if self.padded:
            tokens = torch.cat((tokens, padding.expand(*tokens.shape[:-3], -1, -1, -1)), dim=-2)
        if self.moves:
            tokens = tokens.index_select(-2, self.order)
        windows: Tensor = tokens.unflatten(-2, (self.count, -1))  # [..., H, W, A, d]
        return windows.flatten(-4, -3)

    def reverse(self, windows: Tensor) -> Tensor:
        """[..., H W, A, d] to [..., N, H d]."""
        tokens: Tensor = windows.unflatten(-3, (-1, self.count)).flatten(-3, -2).transpose(-3, -2)  # [..., W A, H, d]
        if self.moves:
            tokens = tokens.index_select(-3, self.places)
        return tokens.flatten(-2)

    def _in_each(self, prompt: Tensor) -> Tensor:
        """Prompts [B, H, P, d] in every window, [B, H W, P, d]."""
        everywhere: Tensor = prompt.unsqueeze(-3).expand(-1, -1, self.count, -1, -1)
        return everywhere.flatten(1, 2)
