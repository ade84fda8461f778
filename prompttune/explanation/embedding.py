"""t-SNE of pooled features of labelled images, a picture a subject.

t-SNE, https://jmlr.org/papers/v9/vandermaaten08a.html, by scikit-learn. It shows neighbourhoods and nothing of
distances between groups; the accuracy of each image's nearest other image, in the features themselves, stands beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from prompttune.data import CorruptImages, ImageSource, load_parts, make_loader
from prompttune.data.base import Renumbered
from prompttune.errors import DataError
from prompttune.evaluation.scored import Chosen, choose_split
from prompttune.explanation.settings import ExplainSettings
from prompttune.explanation.subjects import Subject

PERPLEXITY = 30.0
"""scikit-learn's and the paper's usual value; a third of the images at most."""
FEWEST = 5
"""Images below which t-SNE says nothing."""
EXACT = 500
"""Up to so many images, exact gradients: no sum depends on how threads met, and few images take no longer."""
MAX_CORRUPT = 10


@dataclass(frozen=True, eq=False)
class Embedding:
    """Features of one subject, laid out in two dimensions."""

    name: str
    places: NDArray[np.float32]
    """[images, 2]."""
    targets: NDArray[np.int64]
    """Class index of each image."""
    classes: list[str]
    nearest_accuracy: float
    """Share of the images whose nearest other image, by the features' distance, is of their class."""


def images_of(data: str | ImageSource, settings: ExplainSettings) -> Chosen:
    """The labelled images to show, all of them with the same classes."""
    if not isinstance(data, str):
        return Chosen([data], "all", "the images that were given")
    parts = load_parts(data, seed=settings.seed, limit=settings.data_limit)
    chosen = choose_split(parts.named, parts.name, settings.split)
    classes = list(dict.fromkeys(name for source in chosen.sources for name in source.classes))
    return dataclasses.replace(chosen, sources=[Renumbered(source, classes) for source in chosen.sources])


@torch.no_grad()
def features_of(
    subject: Subject, sources: list[ImageSource], settings: ExplainSettings, on_batch: Callable[[], None]
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
    """Pooled features [images, D], class indices [images], and one line for each image that cannot be read.

    Raises:
        DataError: too many images cannot be read.
    """
    features, targets, corrupt = [], [], CorruptImages(MAX_CORRUPT)
    for source in sources:
        loader = make_loader(
            source, subject.preprocess.transform(), batch_size=settings.batch_size, shuffle=False, seed=0, workers=0
        )
        for batch in loader:
            corrupt.add(batch.corrupt)
            if len(batch.targets):
                features.append(subject.features(batch.images.to(subject.device)).float().cpu())
                targets.append(batch.targets)
            on_batch()
    if not features:
        raise DataError("none of the labelled images can be read")
    return torch.cat(features).numpy(), torch.cat(targets).numpy(), corrupt.lines


def embed(
    name: str, features: NDArray[np.float32], targets: NDArray[np.int64], classes: list[str], seed: int
) -> Embedding:
    """Lay features [images, D] out in two dimensions; the same seed gives the same places.

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
