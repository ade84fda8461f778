"""DAM-VP, diversity-aware meta visual prompting: https://arxiv.org/abs/2303.08138 (CVPR 2023).

A task's images are clustered by the frozen backbone's features, and each cluster has its own prompt: a border of
pixels that is added to the image. An image uses the prompt of the nearest cluster, so it passes the backbone
twice. This is the paper's head-tuning setting; the rest follows https://github.com/shikiw/DAM-VP.

The centre c nearest to features f does not depend on |f|². Therefore f (c - m) - (|c|² - |m|²) / 2 is compared, with m
the mean of the centres: all but one product folds into the state, and the values stay small.

Deviations: the distance at which clusters stay apart has a default that depends on the images, while the released code
has one number for each of its backbones; the number of clusters is limited; the prompts start at zero unless
``init`` is ``released``; one optimiser with one learning rate trains prompts and head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from prompttune.backbones.base import Backbone
from prompttune.layers.probe import probe
from prompttune.methods.base import CLUSTERS, Features, Layout, Levels, Method, State, implements
from prompttune.methods.damvp.clustering import find_centres, gather_features
from prompttune.methods.damvp.config import DAMVPConfig


@implements(DAMVPConfig)
class DAMVP(Method):
    """``centres`` [K, D], found once, and ``prompts`` [K, 3, P], which train; P pixels are the border."""

    backbones = (Backbone,)
    config: DAMVPConfig
    centres: nn.Parameter
    prompts: nn.Parameter

    def __init__(self, config: DAMVPConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        assert config.prompt_size is not None
        self.prompt_size = config.prompt_size
        self.pixels = border_pixels(backbone.image_size, config.prompt_size)
        self._make(config.clusters or 1)

    def _make(self, clusters: int) -> None:
        """Create parameters for ``clusters`` clusters, all of them alike."""
        old = next(self.parameters(), torch.empty(0))
        centres = torch.zeros(clusters, self._backbone[0].width, device=old.device)
        prompt = torch.zeros(3, self.pixels)
        if self.config.init == "released":
            nn.init.normal_(prompt)
        self.centres = nn.Parameter(centres, requires_grad=False)
        self.prompts = nn.Parameter(prompt.to(old.device).repeat(clusters, 1, 1))

    def begin_training(self, batches: Iterable[tuple[Tensor, Tensor]], start: Tensor | None = None) -> None:
        """Cluster the first ``cluster_images`` training images and give every cluster the same prompt to start from."""
        backbone = self._backbone[0]
        centres = find_centres(gather_features(backbone, batches, self.config.cluster_images), self.config)
        self._make(len(centres))
        with torch.no_grad():
            self.centres.copy_(centres)
            if start is not None:
                self.prompts.copy_(start)

    def take_sizes(self, stored: Mapping[str, Tensor]) -> None:
        """Create as many clusters as there are stored centres."""
        clusters = len(stored["centres"]) if "centres" in stored and stored["centres"].ndim else 0
        if clusters and clusters != len(self.centres):
            self._make(clusters)

    def task_state(self) -> State:
        """``centres`` minus their mean, the ``offsets`` of the comparison, and ``prompts``."""
        mean = self.centres.mean(dim=0)
        shifted = self.centres - mean
        offsets = -0.5 * (shifted * (self.centres + mean)).sum(dim=-1)
        return {
            "centres": shifted.unsqueeze(0),
            "offsets": offsets.unsqueeze(0),
            "prompts": self.prompts.unsqueeze(0),
        }

    def state_layout(self) -> Layout:
        """See :meth:`Method.state_layout`."""
        return {
            "centres": (CLUSTERS, self._backbone[0].width),
            "offsets": (CLUSTERS,),
            "prompts": (CLUSTERS, 3, self.pixels),
        }

    def image_state(self, images: Tensor, levels: Levels = ()) -> State:  # noqa: ARG002
        """``image`` [B, 3, S, S], and ``features`` [B, D] of the plain backbone, which choose the cluster."""
        return {"image": images, "features": self._backbone[0](images)}

    def forward(self, image: State, state: State, aux: bool = False, levels: Levels = ()) -> Features:  # noqa: ARG002
        """See :meth:`Method.forward`; this method has no prompt pathway."""
        backbone, images = self._backbone[0], image["image"]
        nearest = nearest_clusters(image["features"], state["centres"], state["offsets"])  # [B]
        prompts = state["prompts"]  # [1 or B, K, 3, P]
        # Row b of prompts begins at b K, a single row at 0: one plain Gather for both, with a small gradient.
        begin = torch.arange(prompts.shape[0], device=prompts.device) * prompts.shape[1]  # [1 or B]
        border = prompts.flatten(0, 1).index_select(0, begin + nearest)  # [B, 3, P]
        features: Tensor = backbone(add_border(images, border.to(images.dtype), self.prompt_size))
        return Features(features)


def nearest_clusters(features: Tensor, centres: Tensor, offsets: Tensor) -> Tensor:
    """Index of the nearest centre of each image, int64 [B]; the first one wins a tie.

    Args:
        features: [B, D].
        centres: centres minus their mean, [1 or B, K, D].
        offsets: [1 or B, K]; -inf for a padding centre.
    """
    # Not a matrix product: autocast would round it, and its rounding may depend on the batch.
    products = (features.float().unsqueeze(1) * centres.float()).sum(dim=-1)  # [B, K]
    scores = torch.add(products, offsets.float())
    probe("cluster_scores", scores)
    return scores.argmax(dim=1)


def border_pixels(side: int, width: int) -> int:
    """Number of pixels in a border of ``width`` pixels around an image of ``side`` pixels."""
    return side * side - (side - 2 * width) ** 2


def add_border(images: Tensor, border: Tensor, width: int) -> Tensor:
    """Add a border [B, 3, P] of ``width`` to images [B, 3, S, S]: its pixels are top, bottom, left, right, by rows."""
    side = images.shape[-1]
    inner = side - 2 * width
    shapes = ((width, side), (width, side), (inner, width), (inner, width))
    parts, begin = [], 0
    for rows, columns in shapes:
        end = begin + rows * columns
        parts.append(border[..., begin:end].unflatten(-1, (rows, columns)))
        begin = end
    top, bottom, left, right = parts
    across, down = slice(width, side - width), slice(side - width, side)
    middle = images[:, :, across]
    middle = torch.cat(
        (middle[..., :width] + left, middle[..., across], middle[..., down] + right), dim=-1
    )  # [B, 3, S - 2 width, S]
    return torch.cat((images[:, :, :width] + top, middle, images[:, :, down] + bottom), dim=-2)
