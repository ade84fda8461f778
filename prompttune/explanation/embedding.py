"""t-SNE of pooled features of labelled images, one picture per subject.

t-SNE: https://jmlr.org/papers/v9/vandermaaten08a.html, by scikit-learn. It shows neighbourhoods, but not the distances
between groups. The accuracy of each image's nearest other image, measured on the features, is reported next to it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prompttune.data import load_parts
from prompttune.data.base import Renumbered
from prompttune.data.objects import Data, is_source, settled
from prompttune.errors import DataError
from prompttune.evaluation.scored import Chosen, choose_split
from prompttune.explanation.settings import ExplainSettings

PERPLEXITY = 30.0
"""Usual value of scikit-learn and the paper; at most a third of the number of images."""
FEWEST = 5
"""Smallest number of images for t-SNE."""
EXACT = 500
"""Largest number of images for exact gradients, whose sums do not depend on the threads and cost no more time."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """Features of one subject, projected to two dimensions."""

    name: str
    places: NDArray[np.float32]
    """[images, 2]."""
    targets: NDArray[np.int64]
    """Class index of each image."""
    classes: list[str]
    nearest_accuracy: float
    """Share of images whose nearest other image, by distance of the features, has their class."""


def images_of(data: Data, settings: ExplainSettings) -> Chosen:
    """The labelled images to show, all with the same classes."""
    if is_source(data):
        return Chosen([data], "all", "the images that were given")
    parts = load_parts(settled(data), seed=settings.seed, limit=settings.data_limit)
    chosen = choose_split(parts.named, parts.name, settings.split)
    classes = list(dict.fromkeys(name for source in chosen.sources for name in source.classes))
    return dataclasses.replace(chosen, sources=[Renumbered(source, classes) for source in chosen.sources])


def embed(
    name: str, features: NDArray[np.float32], targets: NDArray[np.int64], classes: list[str], seed: int
) -> Embedding:
    """Project features [images, D] to two dimensions; the same seed gives the same places.

    Raises:
        DataError: there are too few images.
    """
    from sklearn.manifold import TSNE

    if len(features) < FEWEST:
        raise DataError(f"t-SNE needs {FEWEST} labelled images or more, not {len(features)}")
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    method = "exact" if len(features) <= EXACT else "barnes_hut"
    places = TSNE(perplexity=perplexity, init="pca", random_state=seed, method=method).fit_transform(features)
    return Embedding(name, places, targets, classes, _nearest_accuracy(features, targets))


def _nearest_accuracy(features: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=1).fit(features).kneighbors(return_distance=False)  # without itself
    return float((targets[nearest[:, 0]] == targets).mean())
