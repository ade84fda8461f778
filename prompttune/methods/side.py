"""A narrow network of the task beside the frozen blocks: our own method, a relative of side networks.

A map h of the task, d channels at the places of the patches, begins as a learned map. At each block that is read it
takes up the block's patch tokens through one small product, then a 3 x 3 convolution and a small MLP of its own::

    h += W LN(tokens);  h += |conv(IN(h)) + b|;  h += V GELU(U IN(h) + c)

IN norms each channel over the places of the map, which takes away the image's contrast; the absolute value takes away
its polarity. No class token is read. The head reads the mean of LN(h) over the places: where something is stands in the
learned map. The stem adds the pixels, at 8 a side of a patch, through three convolutions of the task. The tokens of the
image never see h, so that the products of all tasks of an image stand side by side as one.

Any other model gives maps in the place of blocks, those of timm's ``forward_intermediates``: the ends of its stages, or
its blocks. They are resized to the last of their grids with at least 10 rows.

Ladder Side-Tuning (https://arxiv.org/abs/2206.06522) has a narrow transformer beside the frozen one, LoSA
(https://arxiv.org/abs/2402.02887) low-rank mixers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone, for_timm
from prompttune.backbones.conv import ConvBackbone
from prompttune.backbones.plain import PlainBackbone
from prompttune.backbones.swin import SwinBackbone
from prompttune.backbones.vit import VitBackbone
from prompttune.layers.bottleneck import plain_norm
from prompttune.layers.probe import probe
from prompttune.layers.resize import resized, resizing
from prompttune.methods.base import Features, Levels, MethodConfig, MethodOver, State, implements, setting
from prompttune.methods.over_vit import rising

READS = 6
"""Number of blocks that are read by default."""
ROWS = 10
"""Fewest rows of the map of the task over a model without patches, if one of the model's maps has as many."""
PIXELS = 8
"""Pixels a side of a patch that the stem sees."""
STEM = (3, 16, 32)
"""Channels that enter each convolution of the stem."""
EPSILON = 1e-4


@dataclass(frozen=True)
class SideConfig(MethodConfig):
    """Settings of the side network."""

    method = "side"
    summary = "Narrow network of the task beside the frozen blocks"
    shapes_graph = ("width", "layers", "stem")

    width: int = setting(32, "channels d of the side network", above=0)
    layers: tuple[int, ...] = setting((), f"blocks that are read, 0 first; by default {READS}, evenly spaced")
    stem: bool = setting(True, "read the pixels too, through three convolutions of the task")
    dropout: float = setting(0.0, "dropout on the tokens that are read, while training", low=0, below=1)

    def check(self) -> None:
        """See :meth:`MethodConfig.check`."""
        self.require(rising(self.layers), f"layers {self.layers} must rise, from 0 on")

    def resolved(self, backbone: Backbone) -> SideConfig:
        """Fill in the blocks that are read."""
        in_blocks = isinstance(backbone, VitBackbone)
        count = backbone.depth if in_blocks else len(cast(Any, backbone.model).feature_info)
        last = count - 1
        layers = self.layers or tuple(sorted({number * last // (READS - 1) for number in range(READS)}))
        self.require(layers[-1] <= last, f"layers {layers} do not fit {count} {'blocks' if in_blocks else 'maps'}")
        return replace(self, layers=layers)


@implements(SideConfig)
class Side(MethodOver[VitBackbone]):
    """``map`` [d, N]; for each of R reads ``read`` [d, D], ``mix`` [d, 9 d], ``up`` [2 d, d], ``down`` [d, 2 d], with
    ``mix_bias`` and ``up_bias``; ``stem.{i}``, the three convolutions, [c', 9 c] each."""

    backbones = (VitBackbone,)
    only_reads = True
    config: SideConfig
    resize0: Tensor
    resize1: Tensor

    def __init__(self, config: SideConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        width, reads, rows, columns = config.width, len(config.layers), *self.grid
        self.map = nn.Parameter(0.02 * torch.randn(width, rows * columns))
        self.read = nn.Parameter(torch.randn(reads, width, backbone.width) / math.sqrt(backbone.width))
        self.mix, self.mix_bias = _drawn(reads, width, 9 * width), _drawn(reads, width, 1, fan=9 * width)
        self.up, self.up_bias = _drawn(reads, 2 * width, width), _drawn(reads, 2 * width, 1, fan=width)
        self.down = nn.Parameter(0.3 * _drawn(reads, width, 2 * width).detach())
        sizes = (*STEM, width) if config.stem else ()
        self.stem = nn.ParameterList(_drawn(out, 9 * into) for into, out in itertools.pairwise(sizes))
        for axis, size in enumerate(self.grid):
            resize = resizing(backbone.image_size, PIXELS * size)
            self.register_buffer(f"resize{axis}", resize, persistent=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the map h."""
        return self.backbone.grid

    @property
    def width(self) -> int:
        """See :attr:`Method.width`."""
        return self.config.width

    def task_state(self) -> State:
        """The parameters with leading dimension 1; ``read.{j}`` of each read by itself: none is cut from a copy."""
        state = {name: tensor for name, tensor in self.named_parameters() if name != "read"}
        state |= {f"read.{index}": part for index, part in enumerate(self.read)}
        return {name: tensor.unsqueeze(0) for name, tensor in state.items()}

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:  # noqa: ARG002
        """``patches.{j}`` [B, D, N], the normed patch tokens of each read, and with the stem ``pixels`` [B, 27, M], the
        neighbourhoods that its first convolution sees."""
        backbone, state = self.backbone, self.pixels(images)
        tokens = backbone.embed(images)
        for block in backbone.blocks[: self.config.layers[-1] + 1]:
            tokens = block.run_read(tokens, whole=True)
            probe(f"block{block.index}", tokens)
            if block.index in self.config.layers:
                patches = plain_norm(tokens[:, backbone.num_prefix_tokens :])
                state[f"patches.{self.config.layers.index(block.index)}"] = patches.transpose(1, 2)
        return state

    def pixels(self, images: Tensor) -> State:
        """``pixels`` of :meth:`image_state`, if there is a stem."""
        if not self.config.stem:
            return {}
        small = resized(images.to(self.resize0.dtype), self.resize0, self.resize1)  # [B, 3, 8 R, 8 C]
        return {"pixels": neighbourhoods(instance_norm(small.flatten(2)), self._sides(0), 2)}

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        h = state["map"]  # [1 or B K, d, N]
        if self.config.stem:
            h = h + self._see(image["pixels"], state)
        for at in range(len(self.config.layers)):
            patches = F.dropout(image[f"patches.{at}"], self.config.dropout, self.training)
            h = h + multiply_side_by_side(state[f"read.{at}"], patches)  # [B K, d, N]
            near = neighbourhoods(instance_norm(h), self.grid)
            h = h + (state["mix"][:, at] @ near + state["mix_bias"][:, at]).abs()
            hidden = F.gelu(state["up"][:, at] @ instance_norm(h) + state["up_bias"][:, at])
            h = h + state["down"][:, at] @ hidden
        return Features(plain_norm(h.transpose(1, 2)).mean(dim=1))

    def _see(self, pixels: Tensor, state: State) -> Tensor:
        """The stem, [B, 27, M] to a map [B K, d, N]."""
        first = state["stem.0"]
        seen = instance_norm(multiply_side_by_side(first, pixels.to(first.dtype))).abs()
        seen = F.gelu(instance_norm(state["stem.1"] @ neighbourhoods(seen, self._sides(1), 2)))
        return instance_norm(state["stem.2"] @ neighbourhoods(seen, self._sides(2), 2))

    def _sides(self, number: int) -> tuple[int, int]:
        """Rows and columns of the map that enters a convolution of the stem."""
        rows, columns = self.grid
        return rows * PIXELS >> number, columns * PIXELS >> number


@implements(SideConfig)
class SideOverMaps(Side):
    """Side over the maps of any timm model; ``read.{j}`` [d, D] for D channels of map j."""

    backbones = (SwinBackbone, ConvBackbone, PlainBackbone)  # type: ignore[assignment]

    def __init__(self, config: SideConfig, backbone: Backbone) -> None:
        model = backbone.model
        blank = torch.zeros(1, 3, backbone.image_size, backbone.image_size, device=next(model.parameters()).device)
        with torch.no_grad():
            shapes = [one.shape for one in intermediates(model, blank, config.layers)]
        self._grid = next((shape[2:] for shape in reversed(shapes) if shape[2] >= ROWS), shapes[0][2:])
        super().__init__(config, backbone)
        reads = [torch.randn(config.width, channels) / math.sqrt(channels) for _, channels, *_ in shapes]
        del self.read  # of one width
        self.read = nn.ParameterList(reads)  # type: ignore[assignment]
        for at, (_, _, *sides) in enumerate(shapes):
            for axis, (size, wanted) in enumerate(zip(sides, self._grid, strict=True)):
                self.register_buffer(f"map{at}_{axis}", resizing(size, wanted), persistent=False)

    @property
    def grid(self) -> tuple[int, int]:
        """See :attr:`Side.grid`."""
        rows, columns = self._grid
        return rows, columns

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:  # noqa: ARG002
        """See :meth:`Side.image_state`."""
        state = self.pixels(images)
        for at, found in enumerate(intermediates(self.backbone.model, images, self.config.layers)):
            found = resized(found, self.get_buffer(f"map{at}_0"), self.get_buffer(f"map{at}_1"))
            state[f"patches.{at}"] = plain_norm(found.flatten(2).transpose(1, 2)).transpose(1, 2)
        return state


def intermediates(model: Any, images: Tensor, numbers: tuple[int, ...]) -> list[Tensor]:
    """Some maps [B, D, R, C] of those that timm gives for a model."""
    settings = {"norm": False, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}
    return cast(list[Tensor], model.forward_intermediates(for_timm(model, images), indices=list(numbers), **settings))


def instance_norm(maps: Tensor) -> Tensor:
    """Each channel of [..., c, N] over its places, in float32: squares overflow in float16."""
    return F.layer_norm(maps.float(), maps.shape[-1:], eps=EPSILON).to(maps.dtype)


def neighbourhoods(maps: Tensor, sides: tuple[int, int], stride: int = 1) -> Tensor:
    """The 3 x 3 places around every ``stride``-th place, zeros outside: [B, c, R C] to [B, 9 c, N]."""
    padded = F.pad(maps.unflatten(-1, sides), (1, 1, 1, 1))
    starts = [(row, column) for row in range(3) for column in range(3)]
    parts = [padded[..., y : y + sides[0] : stride, x : x + sides[1] : stride] for y, x in starts]
    return torch.cat(parts, dim=1).flatten(2)


def multiply_side_by_side(weight: Tensor, maps: Tensor) -> Tensor:
    """Weights [1 or B K, d, D] times the maps [B, D, N] of their image, [B K, d, N]; one product for all K tasks."""
    if weight.shape[0] == 1:
        return weight @ maps
    joined = weight.unflatten(0, (maps.shape[0], -1)).flatten(1, 2)  # [B, K d, D]
    found: Tensor = (joined @ maps).unflatten(1, (-1, weight.shape[1]))  # [B, K, d, N]
    return found.flatten(0, 1)


def _drawn(*size: int, fan: int | None = None) -> nn.Parameter:
    """Uniform within 1 / sqrt(fan) of zero, by default the inputs of a matrix, as torch draws linear layers."""
    bound = (fan or size[-1]) ** -0.5
    return nn.Parameter(torch.empty(size).uniform_(-bound, bound))
