"""A bottleneck of two linear layers, ``up(act(down(x)))``: per-task tensors, and the computation that reads them.

It is the core of the adapters of SA²VP, AdaptFormer and Houlsby et al.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("down", "down_bias", "up", "up_bias")


class Bottleneck(nn.Module):
    """Parameters of one bottleneck: ``down`` D to r, ``up`` r to D. The caller initialises them."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)


def stacked(name: str, blocks: Iterable[nn.Module], scale: float = 1.0) -> dict[str, Tensor]:
    """The state of one bottleneck per block, with its output scaled.

    Returns:
        ``{name}.down`` [1, L, D, r], ``{name}.down_bias`` [1, L, r], ``{name}.up`` [1, L, r, D], ``{name}.up_bias``
        [1, L, D].
    """
    parts: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for block in blocks:
        assert isinstance(block, Bottleneck)
        parts["down"].append(block.down.weight.T)
        parts["down_bias"].append(block.down.bias)
        parts["up"].append(scale * block.up.weight.T)
        parts["up_bias"].append(scale * block.up.bias)
    return {f"{name}.{part}": torch.stack(tensors).unsqueeze(0) for part, tensors in parts.items()}


def stacked_layout(name: str, depth: int, width: int, rank: int | str) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the tensors of :func:`stacked`, without the leading dimension."""
    return {
        f"{name}.down": (depth, width, rank),
        f"{name}.down_bias": (depth, rank),
        f"{name}.up": (depth, rank, width),
        f"{name}.up_bias": (depth, width),
    }


def of_block(state: Mapping[str, Tensor], name: str, index: int) -> dict[str, Tensor]:
    """One block's tensors from a state of :func:`stacked`, by the names of :func:`bottleneck`'s arguments."""
    return {part: state[f"{name}.{part}"][:, index] for part in PARTS}


def bottleneck(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    activation: str,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Run bottlenecks, one for all rows or one per row.

    Args:
        x: [B, N, D].
        down, down_bias, up, up_bias: [1 or B, D, r], [1 or B, r], [1 or B, r, D], [1 or B, D].
        activation: ``gelu`` (the exact, erf form) or ``relu``.
        dropout: probability after the activation, while ``training``.

    Returns:
        [B, N, D].
    """
    hidden = x @ down + down_bias.unsqueeze(1)
    hidden = F.relu(hidden) if activation == "relu" else F.gelu(hidden)
    return torch.add(F.dropout(hidden, dropout, training) @ up, up_bias.unsqueeze(1))
