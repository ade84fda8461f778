"""The interface of heads that answer for each place, and the linear head.

Every product with a task's tensor is a batched matrix product or a weighted sum, never a convolution with one weight
for the whole batch, and norms over the batch are not used: each row may have its own head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prompttune.axes import State
from prompttune.layers.probe import probe
from prompttune.task_types.base import Head
from prompttune.task_types.segmentation.resize import Resize


class MapHead(Head):
    """Logits for each place.

    Args:
        width: channels D of the patch tokens.
        grid: rows R and columns C of the patch map.
        size: height and width of the logits' map.
        classes: number of classes of the task.
    """

    size: tuple[int, int]

    def __init__(self, width: int, grid: tuple[int, int], size: tuple[int, int], classes: int) -> None:
        super().__init__(width, classes)
        self.grid = grid
        self.size = size

    def map_of(self, tokens: Tensor) -> Tensor:
        """Tokens [B, R C, K] as maps [B, K, R, C]."""
        placed: Tensor = tokens.transpose(1, 2).unflatten(2, self.grid)
        return placed


class LinearHead(MapHead):
    """A 1 x 1 convolution of the last block's patch tokens, then bilinear upsampling.

    It follows the linear probes of DINOv2 (https://arxiv.org/abs/2304.07193, section 7.4), with the backbone's final
    norm instead of their batch norm.
    """

    def __init__(self, width: int, grid: tuple[int, int], size: tuple[int, int], classes: int) -> None:
        super().__init__(width, grid, size, classes)
        self.upsample = Resize.bilinear(grid, size)

    def forward(self, features: Tensor, maps: tuple[Tensor, ...], state: State) -> Tensor:  # noqa: ARG002
        """See :class:`Head`: logits [B, C, h, w]."""
        weight, bias = state["head.weight"], state["head.bias"]  # [1 or B, C, D], [1 or B, C]
        scores = maps[-1].to(weight.dtype) @ weight.transpose(1, 2)  # [B, R C, classes]
        # The bias comes last: that of a padding class is -inf, which must not be interpolated.
        upsampled: Tensor = self.upsample(self.map_of(scores))
        probe("head", upsampled)
        return torch.add(upsampled, bias[:, :, None, None])
