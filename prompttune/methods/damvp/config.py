"""Settings of DAM-VP."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from prompttune.backbones.base import Backbone
from prompttune.methods.base import MethodConfig, setting

RELEASED_SIZE, RELEASED_IMAGE = 30, 224
INITS = ("zero", "released")


@dataclass(frozen=True)
class DAMVPConfig(MethodConfig):
    """Settings of DAM-VP; the defaults follow the paper and its code if these name one value for every backbone."""

    method = "dam-vp"
    summary = "Pixel prompts, one for each cluster of the images"
    paper = "https://arxiv.org/abs/2303.08138"
    shapes_graph = ("prompt_size",)
    start_file = "meta_init"

    prompt_size: int | None = setting(
        None,
        f"width of the border in pixels; by default {RELEASED_SIZE} of {RELEASED_IMAGE}, scaled to the image",
        low=1,
    )
    clusters: int | None = setting(None, "number of clusters; by default as many as are cluster_distance apart", low=1)
    cluster_distance: float | None = setting(
        None, "smallest distance between clusters' features; by default the mean between two images", above=0
    )
    max_clusters: int = setting(16, "largest number of clusters", low=1)
    cluster_images: int = setting(1000, "number of training images to cluster", low=1)
    init: str = setting("zero", "initial prompts: zero, or the released code's normal draw", choices=INITS)
    meta_init: str | None = setting(None, "file of prompttune meta, or dam-vp checkpoint, with the initial prompt")

    def check(self) -> None:
        """See :meth:`MethodConfig.check`."""
        distance = self.cluster_distance
        self.require(self.clusters is None or distance is None, "give clusters or cluster_distance, not both")
        self.require(
            self.clusters is None or self.clusters <= self.max_clusters,
            f"clusters {self.clusters} is above max_clusters {self.max_clusters}",
        )

    def resolved(self, backbone: Backbone) -> DAMVPConfig:
        """Fill in the border's width for this backbone's image size."""
        side = backbone.image_size
        size = self.prompt_size or max(1, round(side * RELEASED_SIZE / RELEASED_IMAGE))
        self.require(2 * size < side, f"a border of {size} pixels leaves nothing of an image of {side}")
        return dataclasses.replace(self, prompt_size=size)
