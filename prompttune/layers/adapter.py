"""The bottleneck adapter of SA²VP, split into its per-task tensors and the computation that reads them.

``adapter(z) = up(act(down(LayerNorm(z))))``: SA²VP, https://arxiv.org/abs/2312.10376, Eq. 3.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.layers.bottleneck import bottleneck

ADAPTER_NORM_EPS = 1e-6
ACTIVATIONS = ("gelu", "relu")


class Adapter(nn.Module):
    """Parameters of one adapter: ``norm`` [D], ``down`` D to r, ``up`` r to D."""

    def __init__(self, width: int, rank: int, zero_up: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=ADAPTER_NORM_EPS)
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.normal_(self.down.bias, std=1e-6)
        if zero_up:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        else:
            nn.init.xavier_uniform_(self.up.weight)
            nn.init.normal_(self.up.bias, std=1e-6)

    def folded(self, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tensors of the equivalent adapter without an affine norm and with its output already scaled by ``gamma``.

        Returns:
            down [D, r], its bias [r], up [r, D], its bias [D].
        """
        down = self.down.weight * self.norm.weight
        down_bias = self.down.weight @ self.norm.bias + self.down.bias
        return down.T, down_bias, gamma * self.up.weight.T, gamma * self.up.bias


def apply_adapter(
    z: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    activation: str,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Run folded adapters, one for all rows or one per row.

    Args:
        z: [B, N, D].
        down, down_bias, up, up_bias: [1 or B, D, r], [1 or B, r], [1 or B, r, D], [1 or B, D].
        activation: one of :data:`ACTIVATIONS`; GELU is the exact (erf) one.
        dropout: probability after each linear layer, while ``training``.

    Returns:
        [B, N, D].
    """
    # In float32, whatever the type of z: squares overflow in float16.
    normed = F.layer_norm(z.float(), z.shape[-1:], eps=ADAPTER_NORM_EPS).to(z.dtype)
    given = bottleneck(normed, down, down_bias, up, up_bias, activation, dropout, training)
    return F.dropout(given, dropout, training)
