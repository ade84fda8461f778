"""Seeded, stratified selections of images: a validation split, and a smaller part of a split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from prompttune.data.base import DataSplits, ImageSource, Subset
from prompttune.errors import DataError

SEEDS = 2**32
"""Number of seeds that NumPy's generator accepts."""


def hold_out(source: ImageSource, fraction: float, seed: int, name: str) -> DataSplits:
    """Split one source: ``fraction`` of each class becomes validation images, but each class keeps a training image.

    Raises:
        DataError: every class has only one image.
    """
    labels = source.labels()
    train, val = split_indices(len(source), labels, fraction, seed)
    if not val:
        raise DataError(f"no class of {name} has two images, so none can be held out for validation; "
                        "add images or a validation split")  # fmt: skip
    return DataSplits(Subset(source, train), Subset(source, val), list(source.classes), name)


def split_indices(size: int, labels: Sequence[int] | None, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation images, each in ascending order.

    A class of one image is used for training. Every other class keeps a training image, even if ``fraction`` would take
    them all. Without labels the selection is not stratified.
    """
    from sklearn.model_selection import train_test_split

    classes = [0] * size if labels is None else labels
    counts = Counter(classes)
    spare = [index for index in range(size) if counts[classes[index]] > 1]
    if not spare:
        return list(range(size)), []
    kinds = len({classes[index] for index in spare})
    # the splitter needs at least one image per class on either side; every class in `spare` has two
    held = min(max(round(fraction * len(spare)), kinds), len(spare) - kinds)
    _, val = train_test_split(
        spare, test_size=held, random_state=seed % SEEDS, stratify=[classes[index] for index in spare]
    )
    val = _keep_one(sorted(val), classes, counts)
    train = sorted(set(range(size)) - set(val))
    return train, val


def _keep_one(val: Sequence[int], classes: Sequence[int], counts: Counter[int]) -> list[int]:
    """Return a class's first validation image to training if validation has taken all of its images."""
    taken = Counter(classes[index] for index in val)
    given_back = {kind for kind, count in taken.items() if count == counts[kind]}
    kept = []
    for index in val:
        if classes[index] in given_back:
            given_back.remove(classes[index])
        else:
            kept.append(index)
    return kept


def at_most(source: ImageSource, limit: int | None, seed: int) -> ImageSource:
    """Keep at most ``limit`` images: first one of each class, then in proportion to the classes.

    With the same seed, a smaller selection is part of every larger one.
    """
    if limit is None or len(source) <= limit:
        return source
    labels = source.labels() or [0] * len(source)
    members: dict[int, list[int]] = defaultdict(list)
    for index in np.random.RandomState(seed % SEEDS).permutation(len(source)).tolist():
        members[labels[index]].append(index)
    # an image's rank within its class, as a share of the class: 0 for the first of every class
    ranked = sorted(
        (rank / len(indices), order, index)
        for order, indices in enumerate(members.values())
        for rank, index in enumerate(indices)
    )
    return Subset(source, sorted(index for _, _, index in ranked[:limit]))
