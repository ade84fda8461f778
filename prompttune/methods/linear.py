"""Linear probe: a trained head on the frozen backbone's pooled features. It is the baseline for all methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone
from prompttune.methods.base import Features, Levels, Method, MethodConfig, State, implements
from prompttune.methods.over_vit import MapReader


@dataclass(frozen=True)
class LinearConfig(MethodConfig):
    """A linear probe has no settings of its own."""

    method = "linear"
    summary = "Linear probe: a head on the frozen features"


@implements(LinearConfig)
class Linear(Method):
    """Linear probe; the only parameters are the head's."""

    backbones = (Backbone,)
    gives_maps_on = (VitBackbone,)

    def task_state(self) -> State:
        """Empty."""
        return {}

    def forward(self, images: Tensor, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """Pooled features of the plain backbone, [B, D], and its maps of patch tokens."""
        backbone = self.driven
        if not levels:
            features: Tensor = backbone(images)
            return Features(features)
        assert isinstance(backbone, VitBackbone)
        reader, tokens = MapReader(backbone, levels), backbone.embed(images)
        for block in backbone.blocks:
            tokens = block.run(tokens)
            reader.read(block, tokens)
        return Features(backbone.pool(tokens), maps=reader.maps)
