"""The interface of segmentation heads, and the linear head.

A head is split like a method: ``task_state()`` holds its tensors with leading dimension 1, and ``forward`` reads a
state of leading dimension 1 (one task) or B (one task per row), so that each row of a batch may have its own head.
Every product with a task's tensor is therefore a batched matrix product or a weighted sum, never a convolution with
one weight for the whole batch, and norms over the batch are not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prompttune.layers.probe import probe
from prompttune.segmentation.resize import Resize

if TYPE_CHECKING:
    from prompttune.methods.base import Layout, State

PREFIX = "head."
"""Prefix of the state keys of a head."""


class SegmentationHead(nn.Module):
    """Logits for each place; a subclass names its parameters like its state keys without :data:`PREFIX`.

    Args:
        width: channels D of the patch tokens.
        grid: rows R and columns C of the patch map.
        size: height and width of the logits' map.
        classes: number of classes of the task.
    """

    def __init__(self, width: int, grid: tuple[int, int], size: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.grid = grid
        self.size = size
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def task_state(self) -> State:
        """All parameters with leading dimension 1."""
        return {f"{PREFIX}{name}": parameter.unsqueeze(0) for name, parameter in self.named_parameters()}

    def state_layout(self) -> Layout:
        """Shape of each state tensor; ``head.weight`` and ``head.bias`` have the axis ``classes``."""
        layout: Layout = {f"{PREFIX}{name}": tuple(one.shape) for name, one in self.named_parameters()}
        return layout | {f"{PREFIX}weight": ("classes", self.weight.shape[1]), f"{PREFIX}bias": ("classes",)}

    def forward(self, maps: tuple[Tensor, ...], state: State) -> Tensor:
        """Logits [B, classes, h, w] from patch tokens [B, R C, D], one tensor per level."""
        raise NotImplementedError

    def map_of(self, tokens: Tensor) -> Tensor:
        """Tokens [B, R C, K] as maps [B, K, R, C]."""
        placed: Tensor = tokens.transpose(1, 2).unflatten(2, self.grid)
        return placed


class LinearHead(SegmentationHead):
    """A 1 x 1 convolution of the last block's patch tokens, then bilinear upsampling.

    It follows the linear probes of DINOv2 (https://arxiv.org/abs/2304.07193, section 7.4), with the backbone's final
    norm instead of their batch norm.
    """

    def __init__(self, width: int, grid: tuple[int, int], size: tuple[int, int], classes: int) -> None:
        super().__init__(width, grid, size, classes)
        self.upsample = Resize.bilinear(grid, size)

    def forward(self, maps: tuple[Tensor, ...], state: State) -> Tensor:
        """See :meth:`SegmentationHead.forward`."""
        weight, bias = state["head.weight"], state["head.bias"]  # [1 or B, C, D], [1 or B, C]
        scores = maps[-1].to(weight.dtype) @ weight.transpose(1, 2)  # [B, R C, classes]
        # The bias comes last: that of a padding class is -inf, which must not be interpolated.
        upsampled: Tensor = self.upsample(self.map_of(scores))
        probe("head", upsampled)
        return torch.add(upsampled, bias[:, :, None, None])
