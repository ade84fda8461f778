"""A bottleneck of two linear layers, ``up(act(down(x)))``: per-task tensors, and the computation that reads them.

It is the core of the adapters of SA²VP, AdaptFormer and Houlsby et al.; SA²VP's have a norm first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("down", "down_bias", "up", "up_bias")
ACTIVATIONS = ("gelu", "relu")
NORM_EPS = 1e-6


class Bottleneck(nn.Module):
    """Parameters of one bottleneck: ``down`` D to r, ``up`` r to D, and ``norm`` [D] if asked for.

    The caller initialises them.
    """

    def __init__(self, width: int, rank: int, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPS) if norm else None
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)

    def folded(self, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The equivalent tensors without the norm's affine part, the output scaled: see :data:`PARTS`."""
        weight: Tensor = self.down.weight
        bias: Tensor = self.down.bias
        if self.norm is not None:
            weight, bias = weight * self.norm.weight, weight @ self.norm.bias + bias
        return weight.T, bias, scale * self.up.weight.T, scale * self.up.bias


def plain_norm(tokens: Tensor) -> Tensor:
    """A layer norm without parameters over the channels of [..., D], in float32: squares overflow in float16."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=NORM_EPS).to(tokens.dtype)


def stacked(name: str, blocks: Iterable[nn.Module], scale: float = 1.0) -> dict[str, Tensor]:
    """The state of one bottleneck per block, with its output scaled.

    Returns:
        ``{name}.down`` [1, L, D, r], ``{name}.down_bias`` [1, L, r], ``{name}.up`` [1, L, r, D], ``{name}.up_bias``
        [1, L, D].
    """
    folded = [cast(Bottleneck, block).folded(scale) for block in blocks]
    parts = zip(PARTS, zip(*folded, strict=True), strict=True)
    return {f"{name}.{part}": torch.stack(tensors).unsqueeze(0) for part, tensors in parts}


def stacked_layout(name: str, depth: int, width: int, rank: int | str) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the tensors of :func:`stacked`, without the leading dimension."""
    shapes: tuple[tuple[int | str, ...], ...] = ((width, rank), (rank,), (rank, width), (width,))
    return {f"{name}.{part}": (depth, *shape) for part, shape in zip(PARTS, shapes, strict=True)}


def of_block(state: Mapping[str, Tensor], name: str, index: int) -> tuple[Tensor, ...]:
    """One block's tensors from a state of :func:`stacked`, in the order of :data:`PARTS`."""
    return tuple(state[f"{name}.{part}"][:, index] for part in PARTS)


def bottleneck(
    x: Tensor, parts: tuple[Tensor, ...], activation: str, dropout: float = 0.0, training: bool = False
) -> Tensor:
    """Run bottlenecks, one for all rows or one per row.

    Args:
        x: [B, N, D].
        parts: see :data:`PARTS`: [1 or B, D, r], [1 or B, r], [1 or B, r, D], [1 or B, D].
        activation: one of :data:`ACTIVATIONS`; ``gelu`` is the exact (erf) form.
        dropout: probability after the activation, while ``training``.

    Returns:
        [B, N, D].
    """
    down, down_bias, up, up_bias = parts
    hidden = x @ down + down_bias.unsqueeze(1)
    hidden = F.relu(hidden) if activation == "relu" else F.gelu(hidden)
    return torch.add(F.dropout(hidden, dropout, training) @ up, up_bias.unsqueeze(1))
