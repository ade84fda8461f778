"""What is scored: a split of a data set, with its classes matched to a model's. Works without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prompttune.errors import DataError, UsageError, shortened

SPLITS = ("val", "test", "train", "all")
"""Splits that a user may choose. By default the first two are tried in this order; a data set that has neither is
scored whole."""
DEFAULT_SPLIT = "val, else test, else all"
SHOWN = 8
"""Number of classes in a message."""

Source = TypeVar("Source")


@dataclass(frozen=True)
class Chosen:
    """Images to score."""

    sources: list[Any]
    """Image sources, or sources of masks; each has its own classes."""
    split: str
    """Name of the split, one of :data:`SPLITS`."""
    what: str
    """Description of the images, such as ``the split val of photos``."""
    notes: tuple[str, ...] = ()
    """Remarks about the choice for the user, one line each."""


def choose_split(named: Mapping[str, Source], name: str, wanted: str | None = None) -> Chosen:
    """Choose the images of a data set to score.

    Args:
        named: the splits of the data set; only ``all`` for one without splits.
        name: name of the data set in messages.
        wanted: one of :data:`SPLITS`; None for the default.

    Raises:
        UsageError: the split is unknown.
        DataError: the data set does not have that split.
    """
    if wanted not in (None, *SPLITS):
        raise UsageError(f"unknown split {wanted!r}; one of {', '.join(SPLITS)}")
    split = wanted or next((split for split in ("val", "test") if split in named), "all")
    if split == "all":
        parts = [part for part in named if part != "all"]
        words = f"all images of {name}" + (f" ({', '.join(parts)})" if parts else "")
        return Chosen(list(named.values()), split, words)
    if split not in named:
        has = "no splits" if list(named) == ["all"] else f"only {' and '.join(named)}"
        raise DataError(f"{name} has no split {split}, it has {has}; give another --split, such as all")
    others = f", which has {', '.join(named)}" if len(named) > 1 else ""
    return Chosen([named[split]], split, f"the split {split} of {name}{others}")


@dataclass(frozen=True)
class Matched:
    """The classes of data and of a model, matched by name."""

    columns: list[NDArray[np.int64]]
    """Index in ``labels`` of each class, for each source; -1 for a class without images."""
    labels: tuple[str, ...]
    """The model's classes, then the classes that only the data have."""
    unseen: int
    """Number of the classes that only the data have."""


def match_classes(sources: Sequence[Any], labels: Sequence[str]) -> Matched:
    """Match the classes of data to a model's by name. Classes without images are ignored.

    Raises:
        DataError: data and model share no class; the message names the classes of either side.
    """
    held = [_with_images(source) for source in sources]
    found = list(dict.fromkeys(name for names in held for name in names))
    if not set(found) & set(labels):
        raise DataError(
            f"no class of the data is one of the model's; only in the data: {shortened(found, SHOWN) or 'none'}; "
            f"only in the model: {shortened(list(labels), SHOWN)}"
        )
    every = (*labels, *(name for name in found if name not in set(labels)))
    index = {name: position for position, name in enumerate(every)}
    columns = [np.array([index.get(name, -1) for name in source.classes], dtype=np.int64) for source in sources]
    return Matched(columns, every, len(every) - len(labels))


def _with_images(source: Any) -> list[str]:
    """Names of the classes with images, as far as they are known without reading images."""
    if (labels := source.labels()) is None:
        return list(source.classes)
    present = set(labels)
    return [name for index, name in enumerate(source.classes) if index in present]


def class_notes(labels: Sequence[str], unseen: int, support: Sequence[int], images: str = "images") -> list[str]:
    """Remarks about classes that only the model or only the data have.

    Args:
        labels: class names, as in :class:`Matched`.
        unseen: number of classes that only the data have.
        support: count of each class.
        images: name of what is counted.
    """
    known = len(labels) - unseen
    notes = []
    if absent := [label for label, count in zip(labels[:known], support, strict=False) if not count]:
        notes.append(
            f"no {images} of {len(absent)} of the {known} classes: {shortened(absent, SHOWN)}; they have no figures"
        )
    strange = [(label, count) for label, count in zip(labels[known:], support[known:], strict=True) if count]
    if strange:
        names = shortened([label for label, _ in strange], SHOWN)
        kinds = f"class {names}" if len(strange) == 1 else f"the classes {names}"
        total = sum(count for _, count in strange)
        notes.append(f"{total} {images} of {kinds}, which the model does not have, are counted as wrong")
    return notes
