"""Bilinear, antialiased resizing as products with fixed matrices, which every format exports."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resizing(size: int, wanted: int) -> Tensor:
    """The matrix [wanted, size] of a resize along one axis."""
    with torch.device("cpu"):
        rows = torch.eye(size)[None, None]
        return F.interpolate(rows, size=(wanted, size), mode="bilinear", antialias=True)[0, 0]


def resized(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Maps [B, C, R, R'] by the matrices of their rows and columns."""
    # The fixed matrix is the first factor of both: quantisers treat a fixed second factor as a weight.
    across = columns.to(maps.dtype) @ maps.transpose(2, 3)
    return rows.to(maps.dtype) @ across.transpose(2, 3)
