"""Resizing and pooling of maps as products with fixed matrices.

Bilinear interpolation and adaptive average pooling are linear, and the same for each row and column. As two small
matrix products they have one form for every runtime, need no Resize operator, and give the same gradients on a GPU each
time, which PyTorch's own bilinear interpolation does not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def interpolation(source: int, target: int) -> Tensor:
    """Matrix [target, source] of bilinear interpolation along one axis, pixels as areas (``align_corners=False``)."""
    unit = torch.eye(source).unsqueeze(1)  # [source, 1, source]: the response of each column
    resized: Tensor = F.interpolate(unit, size=target, mode="linear", align_corners=False)
    return resized[:, 0].T.contiguous()


def pooling(source: int, target: int) -> Tensor:
    """Matrix [target, source] of adaptive average pooling along one axis."""
    matrix = torch.zeros(target, source)
    for place in range(target):
        start, end = place * source // target, math.ceil((place + 1) * source / target)
        matrix[place, start:end] = 1 / (end - start)
    return matrix


class Resize(nn.Module):
    """Applies one matrix to the rows of a map and one to its columns.

    Args:
        rows: [h, R].
        columns: [w, C].
    """

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        # Fixed matrices are not a task's parameters, so they are not saved with it.
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    @classmethod
    def bilinear(cls, source: tuple[int, int], target: tuple[int, int]) -> Resize:
        """From ``source`` rows and columns to ``target``."""
        return cls(interpolation(source[0], target[0]), interpolation(source[1], target[1]))

    @classmethod
    def pooled(cls, source: tuple[int, int], target: int) -> Resize:
        """Pool to ``target`` rows and columns, each the mean of the places that it covers."""
        return cls(pooling(source[0], target), pooling(source[1], target))

    def forward(self, maps: Tensor) -> Tensor:
        """[B, K, R, C] to [B, K, h, w]."""
        rows, columns = self.get_buffer("rows"), self.get_buffer("columns")
        # The fixed matrix is the first factor of both products: quantisers treat a fixed second factor as a weight.
        across = (columns.to(maps.dtype) @ maps.transpose(-1, -2)).transpose(-1, -2)  # [B, K, R, w]
        return rows.to(maps.dtype) @ across
