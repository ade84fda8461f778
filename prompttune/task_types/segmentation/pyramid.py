"""A light pyramid head after UPerNet: https://arxiv.org/abs/1807.10221.

Patch tokens of four depths each pass a 1 x 1 convolution to K channels. The deepest map also passes pyramid pooling:
its means over 1, 2, 3 and 6 places per side, 1 x 1 convolutions of those, all of them next to the map, and a 1 x 1
convolution of the whole. Then each map is added to the next shallower one, every sum is smoothed by a 3 x 3
convolution, and all of them together are fused and classified.

Differences from UPerNet keep it light, and exact if each row of a batch has its own head:

- a plain ViT has one resolution, so the maps of its depths are resized: the shallowest to that of the logits, the next
  one to twice the grid, the two deepest stay (mmsegmentation's neck for ViTs learns transposed convolutions instead);
- 3 x 3 convolutions are depthwise, followed by a 1 x 1 one; that of the pooled maps is a 1 x 1 one;
- a layer norm over the channels of each place replaces batch norm;
- pooled sizes that the grid does not have are left out.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.axes import State
from prompttune.layers.probe import probe
from prompttune.task_types.segmentation.heads import MapHead
from prompttune.task_types.segmentation.resize import Resize

PYRAMID_LEVELS = 4
POOLED = (1, 2, 3, 6)
"""Numbers of places per side of the pooled maps."""
KERNEL = 3
EPSILON = 1e-5
_DEEPEST = PYRAMID_LEVELS - 1


class PyramidHead(MapHead):
    """``lateral``, ``pooled``, ``top``, ``depthwise``, ``pointwise``, ``fuse``, norms, and the classifier.

    Args:
        width: channels D of the patch tokens.
        grid: rows R and columns C of the patch map.
        size: height and width of the logits' map.
        classes: number of classes of the task.
        channels: number of channels K.
    """

    def __init__(self, width: int, grid: tuple[int, int], size: tuple[int, int], classes: int, channels: int) -> None:
        super().__init__(channels, grid, size, classes)
        self.channels = channels
        self.pool_sizes = tuple(side for side in POOLED if side <= min(grid))
        pools, k = len(self.pool_sizes), channels
        self.lateral = _matrix(PYRAMID_LEVELS, width, k)
        self.pooled = _matrix(pools, k, k)
        self.top = _matrix(1 + pools, k, k, inputs=(1 + pools) * k)
        self.depthwise = nn.Parameter(torch.empty(PYRAMID_LEVELS, k, KERNEL**2))
        nn.init.uniform_(self.depthwise, -1 / KERNEL, 1 / KERNEL)
        self.pointwise = _matrix(PYRAMID_LEVELS, k, k)
        self.fuse = _matrix(PYRAMID_LEVELS, k, k, inputs=PYRAMID_LEVELS * k)
        # Norms: of the laterals, of the pooled maps, of their fusion, of the smoothed sums, of the last fusion.
        norms = PYRAMID_LEVELS + pools + 1 + PYRAMID_LEVELS + 1
        self.scale = nn.Parameter(torch.ones(norms, k))
        self.shift = nn.Parameter(torch.zeros(norms, k))
        self._make_resizing()

    def _make_resizing(self) -> None:
        grid, size = self.grid, self.size
        double = tuple(min(2 * side, most) for side, most in zip(grid, size, strict=True))
        places = [size, (double[0], double[1]), grid, grid]
        """Height and width of each level, the shallowest first."""
        self.spread = nn.ModuleList(Resize.bilinear(grid, place) for place in places)
        self.descend = nn.ModuleList(Resize.bilinear(deeper, place) for place, deeper in itertools.pairwise(places))
        self.gather = nn.ModuleList(Resize.bilinear(place, size) for place in places)
        self.pool = nn.ModuleList(Resize.pooled(grid, side) for side in self.pool_sizes)
        self.unpool = nn.ModuleList(Resize.bilinear((side, side), grid) for side in self.pool_sizes)

    def forward(self, features: Tensor, maps: tuple[Tensor, ...], state: State) -> Tensor:  # noqa: ARG002
        """See :class:`Head`: logits [B, C, h, w]."""
        laterals = [self._lateral(level, tokens, state) for level, tokens in enumerate(maps)]
        found = [*laterals[:_DEEPEST], self._join_pooled(laterals[_DEEPEST], state)]
        summed = [self.spread[level](one) for level, one in enumerate(found)]
        for level in reversed(range(_DEEPEST)):
            summed[level] = summed[level] + self.descend[level](summed[level + 1])
        # A sum of products replaces one product of all maps side by side.
        parts = [
            self.gather[level](_mix(self._smooth(level, one, state), state["head.fuse"][:, level]))
            for level, one in enumerate(summed)
        ]
        fused = self._norm(parts[0] + parts[1] + parts[2] + parts[3], -1, state)
        probe("head", fused)
        weight, bias = state["head.weight"], state["head.bias"]  # [1 or B, C, K], [1 or B, C]
        return torch.add(_mix(fused, weight.transpose(1, 2)), bias[:, :, None, None])

    def _lateral(self, level: int, tokens: Tensor, state: State) -> Tensor:
        """Tokens [B, R C, D] to a map [B, K, R, C]."""
        weight = state["head.lateral"][:, level]  # [1 or B, D, K]
        return self._norm(self.map_of(tokens.to(weight.dtype) @ weight), level, state)

    def _join_pooled(self, deepest: Tensor, state: State) -> Tensor:
        """The deepest map combined with its means over larger places, [B, K, R, C]."""
        joined = _mix(deepest, state["head.top"][:, 0])
        for number, (pool, unpool) in enumerate(zip(self.pool, self.unpool, strict=True)):
            means = _mix(pool(deepest), state["head.pooled"][:, number])
            pooled = self._norm(means, PYRAMID_LEVELS + number, state)
            joined = joined + unpool(_mix(pooled, state["head.top"][:, 1 + number]))
        return self._norm(joined, PYRAMID_LEVELS + len(self.pool_sizes), state)

    def _smooth(self, level: int, one: Tensor, state: State) -> Tensor:
        """3 x 3 depthwise, then 1 x 1: [B, K, h, w] to the same."""
        kernel = state["head.depthwise"][:, level, :, :, None, None]  # [1 or B, K, 9, 1, 1]
        smoothed = _mix(depthwise(one, kernel), state["head.pointwise"][:, level])
        return self._norm(smoothed, PYRAMID_LEVELS + len(self.pool_sizes) + 1 + level, state)

    def _norm(self, one: Tensor, number: int, state: State) -> Tensor:
        """Layer norm over the channels of each place with the task's own scale and shift, then ReLU."""
        scale, shift = state["head.scale"][:, number, None], state["head.shift"][:, number, None]  # [1 or B, 1, K]
        height, width = one.shape[2:]
        places = F.layer_norm(one.flatten(2).transpose(1, 2), (self.channels,), eps=EPSILON)  # [B, h w, K]
        scaled = F.relu(torch.add(places * scale, shift))
        placed: Tensor = scaled.transpose(1, 2).unflatten(2, (height, width))
        return placed


def _matrix(count: int, rows: int, columns: int, inputs: int | None = None) -> nn.Parameter:
    """``count`` matrices [rows, columns], initialised so that products keep the scale of their input."""
    made = nn.Parameter(torch.empty(count, rows, columns))
    nn.init.trunc_normal_(made, std=(inputs or rows) ** -0.5)
    return made


def _mix(one: Tensor, weight: Tensor) -> Tensor:
    """A 1 x 1 convolution: [B, K, h, w] with [1 or B, K, M] to [B, M, h, w]."""
    height, width = one.shape[2:]
    mixed = weight.transpose(1, 2) @ one.flatten(2)  # [B, M, h w]
    placed: Tensor = mixed.unflatten(2, (height, width))
    return placed


def depthwise(one: Tensor, kernel: Tensor) -> Tensor:
    """A 3 x 3 convolution of each channel with zero padding, as a weighted sum of shifted maps.

    Args:
        one: [B, K, h, w].
        kernel: [1 or B, K, 9, 1, 1], row by row.
    """
    height, width = one.shape[2:]
    padded = F.pad(one, (1, 1, 1, 1))
    shifted = [padded[:, :, y : y + height, x : x + width] for y in range(KERNEL) for x in range(KERNEL)]
    total = shifted[0] * kernel[:, :, 0]
    for place, part in enumerate(shifted[1:], 1):
        total = total + part * kernel[:, :, place]
    return total
