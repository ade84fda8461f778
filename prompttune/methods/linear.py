"""Linear probe: a trained head on frozen features, by default the backbone's own. It is the baseline for all methods.

On a ViT the features may be those of several blocks, one after the other; the backbone's final norm is applied to the
tokens of each. Blocks behind the last one that is read are not computed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone
from prompttune.errors import BackboneError
from prompttune.layers.probe import probe
from prompttune.methods.base import Features, Levels, Method, MethodConfig, State, implements, setting
from prompttune.methods.over_vit import MAP_SIDE, MapReader, map_key, pooled_map, rising

POOLS = ("backbone", "class", "mean", "map")


@dataclass(frozen=True)
class LinearConfig(MethodConfig):
    """Settings of the linear probe; ``layers=()`` is the last block."""

    method = "linear"
    summary = "Linear probe: a head on the frozen features"
    shapes_graph = ("layers", "pool")

    layers: tuple[int, ...] = setting((), "blocks whose tokens the head reads, 0 first; by default the last block")
    pool: str = setting(
        "backbone",
        "input of the head: the backbone's own pooling, the class token, the mean of the patches, or their map in at "
        f"most {MAP_SIDE} x {MAP_SIDE} places",
        POOLS,
    )

    def check(self) -> None:
        """See :meth:`MethodConfig.check`."""
        self.require(rising(self.layers), f"layers {self.layers} must rise, from 0 on")

    def resolved(self, backbone: Backbone) -> LinearConfig:
        """The last block alone becomes ``()``."""
        if self == LinearConfig():
            return self
        name = backbone.name
        if not isinstance(backbone, VitBackbone):
            raise BackboneError(f"linear: layers and pool need a ViT, which {name} is not; leave them out")
        depth = backbone.depth
        self.require(max(self.layers, default=0) < depth, f"layers {self.layers} do not fit {depth} blocks of {name}")
        if self.pool == "class" and backbone.model.cls_token is None:
            raise BackboneError(f"linear: {name} has no class token; pool backbone, mean and map need none")
        return dataclasses.replace(self, layers=()) if self.layers == (depth - 1,) else self


@implements(LinearConfig)
class Linear(Method):
    """Linear probe; the only parameters are the head's."""

    only_reads = True

    backbones = (Backbone,)
    gives_maps_on = (VitBackbone,)
    config: LinearConfig

    @property
    def width(self) -> int:
        """See :attr:`Method.width`: channels of all layers."""
        backbone, places = self.driven, 1
        if self.config.pool == "map":
            assert isinstance(backbone, VitBackbone)
            places = min(backbone.grid[0], MAP_SIDE) * min(backbone.grid[1], MAP_SIDE)
        return backbone.width * places * max(1, len(self.config.layers))

    def task_state(self) -> State:
        """Empty."""
        return {}

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:
        """``features`` [B, D'], those of each layer in turn, and the backbone's maps of patch tokens."""
        backbone = self.driven
        if not isinstance(backbone, VitBackbone):
            return {"features": backbone(images)}
        layers = self.config.layers or (backbone.depth - 1,)
        reader, found, tokens = MapReader(backbone, levels), [], backbone.embed(images)
        for block in backbone.blocks[: 1 + max((*layers, *levels))]:
            tokens = block.run_read(tokens, reader.whole or self.config.pool in ("mean", "map"))
            reader.read(block, tokens)
            probe(f"block{block.index}", tokens)
            if block.index in layers:
                found.append(self._pool(backbone, tokens))
        return {"features": found[0] if len(found) == 1 else torch.cat(found, dim=1), **reader.state}

    def _pool(self, backbone: VitBackbone, tokens: Tensor) -> Tensor:
        """Normed features [B, D or r c D] of tokens [B, N, D]."""
        match self.config.pool:
            case "class":
                return backbone.normed(tokens[:, 0])
            case "mean":
                return backbone.patch_map(tokens).mean(dim=1)
            case "map":
                return pooled_map(backbone.patch_map(tokens), backbone.grid).flatten(1)
        return backbone.pool(tokens)

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; the image state is all that the head reads."""
        return Features(image["features"], maps=tuple(image[map_key(level)] for level in levels))
