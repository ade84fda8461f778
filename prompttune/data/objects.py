"""Data sets that are objects of Python: ``torch.utils.data`` data sets and lists of images with their labels."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset
from torch.utils.data import Subset as TorchSubset

from prompttune.data.base import OBJECT, DataObject, FileSource, ImageSource, Parts, numbered
from prompttune.data.split_names import ALL, SPLITS
from prompttune.errors import DataError, PrompttuneError, UsageError, choose, describe_failure
from prompttune.images import read_image

Labelled: TypeAlias = Dataset[Any] | Sequence[tuple[str | Path, str | int]] | ImageSource
"""A map-style data set of (image, class index), or a list of (path, label)."""
Data: TypeAlias = str | Path | Labelled | Mapping[str, Labelled] | DataObject
"""Data as functions accept them: a name as in ``--data``, a path, an object, or ``{"train": ..., "val": ...}``."""


def settled(data: Data) -> str | DataObject:
    """Normalise a user's data to text or an object. ``Path("demo/digits")`` is a folder, never the built-in data.

    Raises:
        UsageError: the data are neither a map-style data set nor a list, or have unsupported labels or images.
    """
    given: Any = data
    if isinstance(given, str | DataObject):
        return given
    if isinstance(given, int | float) and not isinstance(given, bool):
        return str(given)  # YAML reads a folder named 2024 as a number
    if isinstance(given, os.PathLike):
        return str(given) if Path(given).is_absolute() else f"./{given}"
    return _made(given)


def _made(data: Any) -> DataObject:
    given = data if isinstance(data, Mapping) else {ALL: data}
    for name in data if isinstance(data, Mapping) else ():
        choose("split", name, SPLITS)
    if not given:
        raise UsageError("the data are an empty mapping: give {'train': ..., 'val': ...}")
    # a split that does not name its classes uses those of the other split
    names = next((found for one in given.values() if (found := _class_names(one))), None)
    named = {split: _source(one, names) for split, one in given.items()}
    digest = hashlib.sha256()
    for split, source in named.items():
        digest.update(repr((split, len(source), source.classes, source.labels())).encode())
        if isinstance(source, FileSource):
            digest.update(repr([os.fspath(path) for path in source.paths]).encode())
    kind = type(next(iter(given.values()))).__name__
    images = "+".join(str(len(source)) for source in named.values())
    name = f"{OBJECT}{kind}[{images}]-{digest.hexdigest()[:12]}"
    return DataObject(name, Parts(named, name))


class DatasetSource(ImageSource):
    """A map-style data set of (image, class index), such as torchvision's.

    An image is a PIL image, or uint8: a NumPy array [H, W, 3] or a tensor [3, H, W]. Class names come from ``classes``
    or ``class_to_idx``, else they are the numbers. Labels come from ``targets`` unless something transforms them;
    otherwise every item is read once for its label.

    Args:
        dataset: the data set, which is not changed.
        name: name in messages; by default the object's class.
        names: class names, if the data set does not define them.

    Raises:
        UsageError: an image or a label is of another kind; the message names the item.
    """

    def __init__(self, dataset: Any, name: str = "", names: list[str] | None = None) -> None:
        self.name = name or type(dataset).__name__
        self.dataset = _reading(dataset)
        if not len(dataset):
            raise UsageError(f"the data set {self.name} is empty")
        with contextlib.suppress(OSError, ValueError):  # an unreadable image is counted later
            _image(self._item(0)[0], f"{self.name}[0]")
        self._names = _class_names(dataset) or names
        targets = _targets(dataset)
        self._labels = None if targets is None else self._checked(targets)
        self.classes = numbered(self.labels()) if self._names is None else self._names

    def _checked(self, labels: Iterable[Any]) -> list[int]:
        return [self._label(label, index) for index, label in enumerate(labels)]

    def _label(self, label: Any, index: int) -> int:
        made = _label(label, where := f"{self.name}[{index}]")
        if self._names is not None and made >= len(self._names):
            raise UsageError(f"{where} has the label {made}, but the data set names {len(self._names)} classes")
        return made

    def _item(self, index: int) -> tuple[Any, Any]:
        try:
            item = self.dataset[index]
        except (OSError, ValueError, PrompttuneError):
            raise
        except Exception as problem:  # any error of the data set's code concerns one image
            raise DataError(f"{self.name}[{index}] cannot be read: {describe_failure(problem)}") from problem
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise UsageError(f"{self.name}[{index}] is a {type(item).__name__}, not a pair (image, label)")
        return item[0], item[1]

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`ImageSource`."""
        image, label = self._item(index)
        label = self._label(label, index)
        if self._labels is not None and label != self._labels[index]:
            raise UsageError(f"{self.name}[{index}] has the label {label}, which was {self._labels[index]} before")
        return _image(image, f"{self.name}[{index}]"), label

    def describe(self, index: int) -> str:
        """The path if the data set consists of files, else its name and the index."""
        files = getattr(self.dataset, "samples", None)
        return str(files[index][0]) if files else f"{self.name}[{index}]"

    def labels(self) -> list[int]:
        """See :class:`ImageSource`; the images may have to be read for them."""
        if self._labels is None:
            self._labels = self._checked(map(self._read_label, range(len(self))))
        return list(self._labels)

    def _read_label(self, index: int) -> Any:
        try:
            return self._item(index)[1]
        except (OSError, ValueError, DataError) as problem:
            where, why = f"{self.name}[{index}]", " ".join(str(problem).split())
            raise DataError(f"the label of {where} cannot be read ({why}): give the data set targets") from problem


def is_source(data: object) -> TypeGuard[ImageSource]:
    """Whether data are already an image source."""
    return all(hasattr(data, part) for part in ("load", "describe", "labels", "classes"))


def _source(data: Any, names: list[str] | None) -> ImageSource:
    if isinstance(data, DataLoader):
        raise UsageError("the data are a DataLoader: give the data set that it reads, loader.dataset")
    if isinstance(data, IterableDataset):
        name = type(data).__name__
        raise UsageError(f"{name} is an iterable-style data set, which has no index: give a map-style one, or a folder")
    if isinstance(data, list | tuple):
        return _listed(data)
    if is_source(data):
        return data
    if not hasattr(type(data), "__getitem__") or not hasattr(type(data), "__len__"):
        raise UsageError(
            f"the data are a {type(data).__name__}: give a path, a map-style data set with a length, or a list of "
            "(path, label)"
        )
    return DatasetSource(data, names=names)


def _listed(rows: Sequence[Any]) -> FileSource:
    """Files and labels; labels that are names are sorted as text, numbers as numbers."""
    if not rows:
        raise UsageError("the list of (path, label) is empty")
    seen: dict[str, int] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, tuple | list) or len(row) != 2 or not isinstance(row[0], str | os.PathLike):
            raise UsageError(f"item {index} of the list is not a pair (path, label), but {_kind(row)}")
        if isinstance(row[1], str) and row[1].strip():
            continue
        _label(row[1], f"item {index} of the list")
    for index, (path, _) in enumerate(rows):
        if (first := seen.setdefault(os.fspath(path), index)) != index:
            raise UsageError(f"items {first} and {index} of the list are both {path}: list each image once")
        if not Path(path).expanduser().is_file():
            raise UsageError(f"item {index} of the list: the file {path} does not exist")
    labels = [label if isinstance(label, str) else operator.index(label) for _, label in rows]
    numbers = all(isinstance(label, int) for label in labels)
    classes = [str(label) for label in sorted(set(labels) if numbers else {str(label) for label in labels})]
    index_of = {name: index for index, name in enumerate(classes)}
    paths = [Path(path).expanduser() for path, _ in rows]
    return FileSource(paths, [index_of[str(label)] for label in labels], classes, Path())


def _kind(row: Any) -> str:
    inner = ", ".join(type(part).__name__ for part in row) if isinstance(row, tuple | list) else ""
    return f"({inner})" if inner else type(row).__name__


def _label(label: Any, where: str) -> int:
    try:
        made = int(operator.index(label))
    except TypeError:
        raise UsageError(
            f"{where} has the label {' '.join(repr(label).split()):.80}, which is not a whole number from 0"
        ) from None
    if made < 0:
        raise UsageError(f"{where} has the label {made}: class indices count from 0")
    return made


def _image(image: Any, where: str) -> Image.Image:
    pixels = image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) and image.dim() == 3 else image
    if isinstance(pixels, Image.Image | np.ndarray):
        with contextlib.suppress(UsageError):  # reported below, with the item
            return read_image(pixels)
    kind = (type(image).__name__, getattr(image, "dtype", ""), list(getattr(image, "shape", ())) or "")
    raise UsageError(
        f"{where} has the image {' '.join(map(str, kind)).strip()}: give a PIL image, a uint8 array [H, W, 3] or a "
        "uint8 tensor [3, H, W], so no transform that makes floats; prompttune resizes and normalises itself"
    )


def _reading(dataset: Any) -> Any:
    """The data set with our reader in place of torchvision's, which ignores orientation and clips 16 bits."""
    from torchvision.datasets.folder import default_loader

    if getattr(dataset, "loader", None) is not default_loader:
        return dataset
    dataset = copy.copy(dataset)
    dataset.loader = read_image
    return dataset


def _targets(dataset: Any) -> Iterable[Any] | None:
    """Labels that are known without reading images; None if they are unknown or if something changes them."""
    if type(dataset) is TorchSubset:
        known = _targets(dataset.dataset)
        return None if known is None else [list(known)[index] for index in dataset.indices]
    if type(dataset) is ConcatDataset:
        parts = [_targets(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else list(itertools.chain(*(part or () for part in parts)))
    if any(getattr(dataset, name, None) is not None for name in ("target_transform", "transforms")):
        return None
    targets = getattr(dataset, "targets", None)
    return None if targets is None or len(targets) != len(dataset) else list(targets)


def _class_names(dataset: Any) -> list[str] | None:
    if type(dataset) is TorchSubset:
        return _class_names(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return _class_names(dataset.datasets[0])
    names = getattr(dataset, "classes", None) or getattr(dataset, "all_categories", None)
    numbers = getattr(dataset, "class_to_idx", None)
    if names is None and isinstance(numbers, Mapping):
        names = sorted(numbers, key=lambda name: int(numbers[name]))
        if [int(numbers[name]) for name in names] != list(range(len(names))):
            raise UsageError(
                f"class_to_idx of {type(dataset).__name__} does not number its classes from 0 on, each once"
            )
    if names is None:
        return None
    made = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
    if len(set(made)) < len(made):
        raise UsageError(f"the class names of {type(dataset).__name__} are not all different")
    return made
