"""Clusters of a task's images, found as in DAM-VP's released code."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.errors import TrainingError
from prompttune.methods.damvp.config import DAMVPConfig


def gather_features(backbone: Backbone, batches: Iterable[tuple[Tensor, Tensor]], most: int) -> Tensor:
    """Pooled features of at most ``most`` images from the plain backbone, float32 [N, D] on the CPU.

    Raises:
        TrainingError: the batches hold no image, or the features of an image are not finite.
    """
    gathered: list[Tensor] = []
    count = 0
    with torch.no_grad():
        for images, _ in batches:
            gathered.append(backbone(images[: most - count]).float().cpu())
            count += len(gathered[-1])
            if count >= most:
                break
    if not count:
        raise TrainingError("dam-vp found no image to cluster")
    features = torch.cat(gathered)
    if not features.isfinite().all():
        raise TrainingError("dam-vp cannot cluster: the backbone's features of some image are not finite")
    return features


def find_centres(features: Tensor, config: DAMVPConfig) -> Tensor:
    """Mean features of each cluster, [K, D].

    Agglomerative clustering with average linkage over Euclidean distances: clusters merge until the nearest two are
    ``config.cluster_distance`` apart on average, or until ``config.clusters`` remain. More than ``config.max_clusters``
    continue to merge.

    Args:
        features: [N, D].
        config: settings that end the merging.

    Raises:
        TrainingError: the number of images is below ``config.clusters``.
    """
    from sklearn.cluster import AgglomerativeClustering

    count = len(features)
    if config.clusters is not None and config.clusters > count:
        raise TrainingError(f"dam-vp cannot make {config.clusters} clusters of {count} images: lower --clusters")
    if count == 1:
        return features

    def label(**stop: object) -> Tensor:
        return torch.from_numpy(AgglomerativeClustering(linkage="average", **stop).fit(features.numpy()).labels_)

    if config.clusters is not None:
        labels = label(n_clusters=config.clusters)
    else:
        distance = config.cluster_distance or float(torch.pdist(features.double()).mean())
        labels = label(n_clusters=None, distance_threshold=distance)
        if labels.max() >= config.max_clusters:
            labels = label(n_clusters=config.max_clusters)
    return torch.stack([features[labels == cluster].mean(dim=0) for cluster in range(int(labels.max()) + 1)])
