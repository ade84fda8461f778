"""The LSTM cell of LSPT's long-term prompt coding, whose input half can be folded per task.

LSPT, https://arxiv.org/abs/2402.17406, section 3.3. Gates in PyTorch's order: input, forget, cell, output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PromptLSTMCell(nn.Module):
    """Weights of one LSTM cell of width D, full (like ``nn.LSTMCell``) or factored to a low rank.

    Args:
        width: channels D of input, hidden and cell.
        rank: None for full matrices [4D, D]; else each matrix is a product [4D, rank] [rank, D].
    """

    def __init__(self, width: int, rank: int | None) -> None:
        super().__init__()
        self.rank = rank
        gates = 4 * width
        bound = width**-0.5
        if rank is None:
            self.weight_ih = nn.Parameter(torch.empty(gates, width).uniform_(-bound, bound))
            self.weight_hh = nn.Parameter(torch.empty(gates, width).uniform_(-bound, bound))
        else:
            self.up_ih, self.down_ih = _factors(gates, rank, width)
            self.up_hh, self.down_hh = _factors(gates, rank, width)
        self.bias_ih = nn.Parameter(torch.empty(gates).uniform_(-bound, bound))
        self.bias_hh = nn.Parameter(torch.empty(gates).uniform_(-bound, bound))

    def input_gates(self, inputs: Tensor) -> Tensor:
        """The gates' part from the inputs and both biases: [..., D] to [..., 4D]."""
        if self.rank is None:
            gates = inputs @ self.weight_ih.T
        else:
            gates = inputs @ self.down_ih.T @ self.up_ih.T
        return gates + (self.bias_ih + self.bias_hh)

    def hidden_weights(self) -> dict[str, Tensor]:
        """The factors of the hidden state, for ``hidden @ weight``, by name.

        ``weight`` [D, 4D], or ``down`` [D, rank] and ``up`` [rank, 4D].
        """
        if self.rank is None:
            return {"weight": self.weight_hh.T}
        return {"down": self.down_hh.T, "up": self.up_hh.T}


def _factors(rows: int, rank: int, columns: int) -> tuple[nn.Parameter, nn.Parameter]:
    up, down = torch.empty(rows, rank), torch.empty(rank, columns)
    nn.init.xavier_uniform_(up)
    nn.init.xavier_uniform_(down)
    return nn.Parameter(up), nn.Parameter(down)


def lstm_step(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the cell from summed gates.

    Args:
        gates: [B, P, 4D].
        cell: [B, P, D].

    Returns:
        Hidden and cell, [B, P, D] each.
    """
    enter, forget, candidate, leave = gates.unflatten(-1, (4, -1)).unbind(-2)
    cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * cell.tanh(), cell
