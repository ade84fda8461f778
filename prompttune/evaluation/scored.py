"""What is scored: which split of a data set, and which of its classes is which of a model's. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prompttune.errors import DataError, UsageError, shortened

SPLITS = ("val", "test", "train", "all")
"""What may be asked for. Without a wish, the first two are looked for, in this order; a data set that has neither is
scored whole."""
DEFAULT_SPLIT = "val, else test, else all"
SHOWN = 8
"""Classes that a message names."""

Source = TypeVar("Source")


@dataclass(frozen=True)
class Chosen:
    """Images to score."""

    sources: list[Any]
    """Image sources, or sources of masks; each has classes of its own."""
    split: str
    """The one of :data:`SPLITS` that they are."""
    what: str
    """The same in words, such as ``the split val of photos``."""
    notes: tuple[str, ...] = ()
    """What a user has to know about the choice, a line each."""


def choose_split(named: Mapping[str, Source], name: str, wanted: str | None = None) -> Chosen:
    """The images of a data set that are scored.

    Args:
        named: the splits that the data set has, ``all`` alone for one without splits.
        name: of the data set, for messages.
        wanted: one of :data:`SPLITS`; None for the default.

    Raises:
        UsageError: an unknown split.
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
    """The classes of data and a model's, by name."""

    columns: list[NDArray[np.int64]]
    """For each source, the index in ``labels`` of each of its classes; -1 for one that has no image."""
    labels: tuple[str, ...]
    """The model's classes, then those of the data that it does not have."""
    unseen: int
    """How many the latter are."""


def match_classes(sources: Sequence[Any], labels: Sequence[str]) -> Matched:
    """Bring the classes of data to a model's, by their names. Classes without images do not count.

    Raises:
        DataError: no class is in both; the message names those of either side.
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
    """Names of the classes that have images, as far as that can be told without reading any."""
    if (labels := source.labels()) is None:
        return list(source.classes)
    present = set(labels)
    return [name for index, name in enumerate(source.classes) if index in present]


def class_notes(labels: Sequence[str], unseen: int, support: Sequence[int], images: str = "images") -> list[str]:
    """What to say about classes that only the model or only the data have.

    Args:
        labels: as in :class:`Matched`, as is ``unseen``.
        unseen: how many of them are the data's alone.
        support: what there is of each class.
        images: what that is.
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
