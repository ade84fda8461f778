"""Linear probe: a trained head on the frozen backbone's pooled features. It is the baseline for all methods."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.backbones.vit import VitBackbone
from prompttune.methods.base import Features, Levels, Method, MethodConfig, State, implements
from prompttune.methods.over_vit import map_key, run_blocks


@dataclass(frozen=True)
class LinearConfig(MethodConfig):
    """A linear probe has no settings of its own."""

    method = "linear"
    summary = "Linear probe: a head on the frozen features"


@implements(LinearConfig)
class Linear(Method):
    """Linear probe; the only parameters are the head's."""

    only_reads = True

    backbones = (Backbone,)
    gives_maps_on = (VitBackbone,)

    def task_state(self) -> State:
        """Empty."""
        return {}

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:
        """``features`` [B, D], pooled, of the plain backbone, and its maps of patch tokens."""
        backbone = self.driven
        if not levels:
            return {"features": backbone(images)}
        assert isinstance(backbone, VitBackbone)
        found = run_blocks(backbone, images, backbone.depth, levels)
        return {"features": backbone.pool(found.pop("tokens"))} | found

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; the image state is all that the head reads."""
        return Features(image["features"], maps=tuple(image[map_key(level)] for level in levels))
