"""What methods over a ViT share: reading maps of patch tokens, the loop over changed blocks, and prompt tokens."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone, VitBlock
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Levels, MethodConfig, MethodOver, State, setting

MAP_SIDE = 4
"""Largest side of a :func:`pooled_map`."""


class MapReader:
    """Collects the maps of one pathway while a forward runs through its blocks.

    Args:
        backbone: backbone whose final norm is applied to every map, even those of earlier blocks.
        levels: blocks to read; empty for none.
        inserted: number of prompt tokens between the prefix tokens and the patches.
        image: an image state with the maps of the blocks in front, see :attr:`state`.
    """

    def __init__(
        self, backbone: VitBackbone, levels: Levels, inserted: int = 0, image: Mapping[str, Tensor] | None = None
    ) -> None:
        self._backbone, self._levels, self._inserted = backbone, levels, inserted
        self._found = {level: image[map_key(level)] for level in levels if image and map_key(level) in image}

    @property
    def whole(self) -> bool:
        """Whether the last block must compute all tokens, not only the pooled ones."""
        return bool(self._levels)

    def read(self, block: VitBlock, tokens: Tensor) -> None:
        """Keep tokens [B, N, D] that leave a block if this level is requested."""
        if block.index in self._levels:
            self._found[block.index] = self._backbone.patch_map(tokens, self._inserted)

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """Normed patch tokens [B, R C, D] of each level."""
        return tuple(self._found.values())

    @property
    def state(self) -> State:
        """The maps as tensors of an image state."""
        return {map_key(level): found for level, found in self._found.items()}


def map_key(level: int) -> str:
    """Key of a level's map in an image state."""
    return f"map.{level}"


@dataclass(frozen=True, kw_only=True)
class BlocksConfig(MethodConfig):
    """Base of the settings of methods that tune the blocks of a ViT."""

    fewest_blocks: ClassVar[int] = 1
    """Number of blocks that the method needs."""

    first_block: int = setting(0, "first block that the task changes; those in front are shared by all tasks", low=0)

    def resolved(self, backbone: Backbone) -> MethodConfig:
        """The same settings, if :attr:`first_block` leaves enough blocks of a ViT."""
        if first := self.first_block:
            kind, depth, name = type(backbone).__name__, getattr(backbone, "depth", 0), backbone.name
            self.require(isinstance(backbone, VitBackbone), f"first_block needs a ViT; {name} is a {kind}")
            fits = depth - first >= self.fewest_blocks
            self.require(
                fits, f"first_block {first} does not leave {self.fewest_blocks} of the {depth} blocks of {name}"
            )
        return self

    def graph_settings(self) -> dict[str, Any]:
        """See :meth:`MethodConfig.graph_settings`."""
        return super().graph_settings() | {"first_block": self.first_block}


def rising(layers: tuple[int, ...]) -> bool:
    """Whether blocks are named once each and in order."""
    return all(a < b for a, b in itertools.pairwise((-1, *layers)))


def pooled_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens [..., R C, D] averaged over places, at most :data:`MAP_SIDE` a side: [..., r c, D].

    The places are those of torch's adaptive average pooling, which has no counterpart in ONNX for sides that do not
    divide.
    """
    found: Tensor = patches.unflatten(-2, grid)  # [..., R, C, D]
    for axis, size in ((-3, grid[0]), (-2, grid[1])):
        if (count := min(size, MAP_SIDE)) < size:
            bins = [(place * size // count, -(-(place + 1) * size // count)) for place in range(count)]
            means = [found.narrow(axis, start, stop - start).mean(axis, keepdim=True) for start, stop in bins]
            found = torch.cat(means, dim=axis)
    return found.flatten(-3, -2)


class OverVit(MethodOver[VitBackbone]):
    """Base of methods that leave the blocks in front of ``first_block`` to the image state.

    A method has parameters for the changed blocks alone: a tensor of blocks has one row for each, see :meth:`place`.
    """

    backbones = (VitBackbone,)

    @property
    def first_block(self) -> int:
        """Number of blocks in front of the first one that the task changes."""
        return int(getattr(self.config, "first_block", 0))

    @property
    def changed(self) -> tuple[VitBlock, ...]:
        """The blocks from :attr:`first_block` on."""
        return self.backbone.blocks[self.first_block :]

    def place(self, block: VitBlock) -> int:
        """Number of a block among the :attr:`changed` ones."""
        return block.index - self.first_block

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:
        """``tokens`` [B, N, D] that enter block :attr:`first_block`, and the maps of the levels in front of it."""
        return run_blocks(self.backbone, images, self.first_block, levels)


def run_blocks(backbone: VitBackbone, images: Tensor, count: int, levels: Levels = ()) -> State:
    """The image state of the first ``count`` blocks: ``tokens`` [B, N, D] that leave them, and the maps of levels."""
    reader, tokens = MapReader(backbone, levels), backbone.embed(images)
    for block in backbone.blocks[:count]:
        tokens = block.run_read(tokens, reader.whole)
        reader.read(block, tokens)
        probe(f"block{block.index}", tokens)
    return {"tokens": tokens, **reader.state}


def keys_and_values(backbone: VitBackbone, images: Tensor) -> State:
    """``key.{i}`` and ``value.{i}`` [B, H, N, d] of every block i of the plain backbone, and ``tokens`` [B, 1 or N, D]
    that leave the last one."""
    found: State = {}
    tokens = backbone.embed(images)
    for block in backbone.blocks:
        normed = block.norm1(tokens)
        key, value = block.key_value(normed)
        found |= {f"key.{block.index}": key, f"value.{block.index}": value}
        attended = block.attend(block.query(block.read(normed)), key, value)
        tokens = block.feed_forward(block.read(tokens) + block.project(attended))
        probe(f"block{block.index}", tokens)
    return {**found, "tokens": tokens}


class InsideBlocks(OverVit):
    """Base of methods that change the computation inside the blocks and keep the tokens: adapters, LoRA."""

    gives_maps_on = (VitBackbone,)

    def run_block(self, block: VitBlock, tokens: Tensor, state: State, whole: bool) -> Tensor:
        """A block with the task's part in it, [B, N, D] to the tokens of ``block.read``."""
        raise NotImplementedError

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        backbone = self.backbone
        reader, tokens = MapReader(backbone, levels, image=image), image["tokens"]  # [B, N, D]
        for block in self.changed:
            tokens = self.run_block(block, tokens, state, reader.whole)
            reader.read(block, tokens)
            probe(f"block{block.index}", tokens)
        return Features(backbone.pool(tokens), maps=reader.maps)


def prompt_bound(patch_size: int, width: int) -> float:
    """VPT's bound v of uniform(-v, v): sqrt(6 / (3 patch² + D)), D the channels of an embedded patch."""
    return float((6.0 / (3 * patch_size**2 + width)) ** 0.5)


class PromptTokens(OverVit):
    """Base of methods with P prompt tokens between the prefix tokens and the patches.

    Args:
        config: settings with ``num_prompts`` and ``dropout``.
        backbone: a ViT.
    """

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.count, self.dropout = int(config.num_prompts), float(config.dropout)

    def drawn(self, *size: int) -> nn.Parameter:
        """Prompts of this size, drawn as in VPT."""
        bound = prompt_bound(self.backbone.patch_size, self.backbone.width)
        return nn.Parameter(torch.empty(size).uniform_(-bound, bound))

    def rows(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        """Expand a state tensor [1 or B, ...] to every image of tokens [B, N, D], with dropout."""
        return F.dropout(prompts.expand(tokens.shape[0], *prompts.shape[1:]), self.dropout, self.training)

    def insert(self, tokens: Tensor, prompts: Tensor) -> Tensor:
        """Tokens [B, N, D] with prompts [B, P, D] after the prefix tokens."""
        return self._joined(tokens, prompts, 0)

    def replace(self, tokens: Tensor, prompts: Tensor) -> Tensor:
        """Tokens [B, N + P, D] with other prompts [B, P, D]."""
        return self._joined(tokens, prompts, self.count)

    def _joined(self, tokens: Tensor, prompts: Tensor, replaced: int) -> Tensor:
        prefix = self.backbone.num_prefix_tokens
        return torch.cat((tokens[:, :prefix], prompts, tokens[:, prefix + replaced :]), dim=1)

    def pool(self, tokens: Tensor) -> Tensor:
        """The backbone's own pooling without the prompts, from the last block's [B, 1 or N + P, D] to [B, D]."""
        backbone, prefix = self.backbone, self.backbone.num_prefix_tokens
        if not backbone.pools_class_token:
            tokens = torch.cat((tokens[:, :prefix], tokens[:, prefix + self.count :]), dim=1)
        return backbone.pool(tokens)
