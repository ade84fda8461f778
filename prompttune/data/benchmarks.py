"""Layouts in which published benchmarks are distributed: VTAB-1k's lists, VPT's JSON splits, torchvision's folders.

- ``vtab/NAME/TRAIN/EVAL``: ``<root>/NAME/TRAIN.txt`` with lines ``path label``, paths relative to ``<root>/NAME``, as
  distributed with `NOAH <https://github.com/ZhangYuanhan-AI/NOAH>`_, SSF and FacT.
- ``fgvc/FOLDER/TRAIN/EVAL``: ``<root>/FOLDER/TRAIN.json`` of path to class id, paths relative to the folder or to its
  ``images`` or ``Images``, as distributed with `VPT <https://github.com/KMnP/vpt>`_.
- ``tv/NAME/TRAIN/EVAL``: torchvision's data set below ``<root>``; :func:`download` fetches it. Of a data set without
  validation images, ``train80`` and ``val20`` are parts of the training images, the same for every seed.

``<root>`` is a folder, or on the Hugging Face hub: :mod:`prompttune.data.roots`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from prompttune.data.base import FileSource, ImageSource, LabelledSource, Parts, Subset
from prompttune.data.roots import DataRoot, LocalRoot, data_root
from prompttune.data.split_names import TEST, TRAIN, VAL, split_of
from prompttune.data.splitting import split_indices
from prompttune.data.text import text_lines
from prompttune.errors import DataError, UsageError, choose
from prompttune.images import read_image

FGVC_IMAGE_FOLDERS = ("", "images", "Images")
PARTS = {"train80": 0, "val20": 1}
"""Parts of a training split, with their index in the result of the splitting."""
HELD_OUT = 0.2
VTAB_LISTS = ("train800", "val200", "train800val200", "test")


@dataclass(frozen=True)
class _Name:
    """A parsed specification."""

    kind: str
    root: DataRoot
    name: str
    train: str
    held: str

    @classmethod
    def read(cls, kind: str, name: str, root: str | None) -> _Name:
        parts = name.split("/")
        if len(parts) != 3 or not all(parts):
            raise UsageError(f"{kind}/{name}: give {kind}/NAME/TRAINING SPLIT/EVALUATION SPLIT")
        if root is None:
            raise UsageError(f"{kind}/{name} needs the folder that the data are kept in: give --data-root")
        return cls(kind, data_root(root), *parts)

    @property
    def expected(self) -> list[str]:
        """Files and folders below the root that loading needs."""
        if self.kind == "tv":
            return list(TORCHVISION[_torchvision_name(self)].expected)
        suffix = "txt" if self.kind == "vtab" else "json"
        return [f"{self.name}/{split}.{suffix}" for split in dict.fromkeys((self.train, self.held))]

    def fetched(self) -> Path:
        """The root as a local folder with the whole data set."""
        return self.root.fetch(self.expected if self.kind == "tv" else [self.name])


def load_benchmark(kind: str, name: str, root: str | None) -> Parts:
    """Load two splits of a benchmark's data set, see the description of this module.

    Raises:
        UsageError: the specification is not ``NAME/TRAIN/EVAL``, the root is missing, or the name is unknown.
        DataError: files are missing or wrong; the message names the first.
    """
    wanted = _Name.read(kind, name, root)
    if absent := wanted.root.missing(wanted.expected):
        raise DataError(f"{kind}/{name}: no {absent[0]}")
    train, val = BENCHMARKS[kind](wanted, wanted.fetched())
    return Parts({TRAIN: train, TEST if split_of(wanted.held) == TEST else VAL: val}, f"{kind}/{name}")


def missing_files(spec: str, root: str | None) -> list[str]:
    """Files and folders that a specification needs and that are missing; empty for other kinds."""
    kind, _, name = spec.partition("/")
    if kind not in BENCHMARKS:
        return []
    wanted = _Name.read(kind, name, root)
    return wanted.root.missing(wanted.expected)


def download(spec: str, root: str | None) -> None:
    """Download a missing torchvision data set from its publisher into the folder ``root``.

    Other kinds are ignored.

    Raises:
        UsageError: the root is not a folder.
        DataError: the data set cannot be downloaded.
    """
    kind, _, name = spec.partition("/")
    if kind != "tv":
        return
    wanted = _Name.read(kind, name, root)
    if not isinstance(wanted.root, LocalRoot):
        raise UsageError(f"{spec} is downloaded into a folder, not to {root}")
    if wanted.root.missing(wanted.expected):
        for split in ("train", "test"):
            _torchvision_split(wanted, split, wanted.root.folder, download=True)


def _vtab(wanted: _Name, root: Path) -> tuple[ImageSource, ImageSource]:
    base = root / wanted.name
    lists = {
        split: _read_list(base / f"{split}.txt")
        for split in dict.fromkeys((wanted.train, wanted.held, *VTAB_LISTS))
        if (base / f"{split}.txt").exists()
    }
    # some class may have no image in train800, so every existing list counts for the number of classes
    classes = [str(number) for number in range(1 + max(label for rows in lists.values() for _, label in rows))]
    train, held = (
        FileSource([base / path for path, _ in rows], [label for _, label in rows], classes, base)
        for rows in (lists[wanted.train], lists[wanted.held])
    )
    return train, held


def _read_list(file: Path) -> list[tuple[str, int]]:
    rows = []
    for number, line in enumerate(text_lines(file, "the list"), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise DataError(f"{file} line {number}: not 'path label' with a label from 0: {line.strip()!r}")
        rows.append((path.strip(), int(label)))
    if not rows:
        raise DataError(f"{file} does not list any images")
    return rows


def _fgvc(wanted: _Name, root: Path) -> tuple[ImageSource, ImageSource]:
    base = root / wanted.name
    train, held = (_read_json(base / f"{split}.json") for split in (wanted.train, wanted.held))
    first = next(iter(train))
    images = next((base / name for name in FGVC_IMAGE_FOLDERS if (base / name / first).exists()), None)
    if images is None:
        raise DataError(f"{base}: the image {first} of {wanted.train}.json is neither here nor in images or Images")
    ids = sorted(set(train.values()), key=lambda one: (isinstance(one, str), one))
    if strange := sorted({str(one) for one in held.values()} - {str(one) for one in ids}):
        raise DataError(f"{base / wanted.held}.json: the class {strange[0]} occurs in no image of {wanted.train}.json")
    index = {str(one): number for number, one in enumerate(ids)}
    sources = [
        FileSource([images / path for path in rows], [index[str(one)] for one in rows.values()], list(index), base)
        for rows in (train, held)
    ]
    return sources[0], sources[1]


def _read_json(file: Path) -> dict[str, int | str]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise DataError(f"cannot read {file}: {problem}") from None
    if not isinstance(rows, dict) or not rows or not all(isinstance(one, int | str) for one in rows.values()):
        raise DataError(f"{file} must be an object of image path to class id")
    return rows


@dataclass(frozen=True)
class _Torchvision:
    """A data set of torchvision: its class, its location, the names of its splits, and its labels."""

    made: str
    expected: tuple[str, ...]
    labels: Callable[[Any], Sequence[int]]
    by_flag: bool = False
    """Whether ``train=`` selects the split instead of ``split=``."""


TORCHVISION = {
    "cifar10": _Torchvision("CIFAR10", ("cifar-10-batches-py",), lambda data: data.targets, by_flag=True),
    "cifar100": _Torchvision("CIFAR100", ("cifar-100-python",), lambda data: data.targets, by_flag=True),
    "svhn": _Torchvision("SVHN", ("train_32x32.mat", "test_32x32.mat"), lambda data: data.labels.tolist()),
    "gtsrb": _Torchvision(
        "GTSRB",
        ("gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"),
        lambda data: [label for _, label in data._samples],
    ),
    "food101": _Torchvision("Food101", ("food-101/meta", "food-101/images"), lambda data: data._labels),
    "dtd": _Torchvision("DTD", ("dtd/dtd/labels", "dtd/dtd/images"), lambda data: data._labels),
}


def _torchvision_name(wanted: _Name) -> str:
    return choose("data set of torchvision", wanted.name, TORCHVISION)


class _TorchvisionSource(LabelledSource):
    """A split of a data set of torchvision."""

    def __init__(self, data: Any, labels: Sequence[int], classes: Sequence[str], name: str) -> None:
        super().__init__(labels, classes, name)
        self.data = data

    def image(self, index: int) -> Image.Image:
        """See :class:`LabelledSource`."""
        return read_image(self.data[index][0])


def _torchvision(wanted: _Name, root: Path) -> tuple[ImageSource, ImageSource]:
    splits = {name: _torchvision_split(wanted, name, root) for name in dict.fromkeys((wanted.train, wanted.held))}
    count = 1 + max(max(labels) for _, labels in splits.values())
    classes = [str(number) for number in range(count)]
    sources = []
    for name in (wanted.train, wanted.held):
        data, labels = splits[name]
        source: ImageSource = _TorchvisionSource(data, labels, classes, f"tv/{wanted.name}/{name}")
        if name in PARTS:
            parts = split_indices(len(source), source.labels(), HELD_OUT, seed=0)
            source = Subset(source, parts[PARTS[name]])
        sources.append(source)
    return sources[0], sources[1]


def _torchvision_split(wanted: _Name, name: str, root: Path, *, download: bool = False) -> tuple[Any, list[int]]:
    from torchvision import datasets

    known = TORCHVISION[wanted.name]
    split = "train" if name in PARTS else choose("split", name, ("train", "val", "test"))
    which: dict[str, Any] = {"train": split == "train"} if known.by_flag else {"split": split}
    if known.by_flag and split == "val":
        raise UsageError(f"tv/{wanted.name} has no split val; give train80 and val20, or test")
    try:
        data = getattr(datasets, known.made)(root=str(root), download=download, **which)
    except (OSError, RuntimeError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        verb, where = ("download", "into") if download else ("load", "from")
        raise DataError(f"cannot {verb} tv/{wanted.name}, {split}, {where} {root}: {reason}") from None
    return data, [int(label) for label in known.labels(data)]


BENCHMARKS = {"vtab": _vtab, "fgvc": _fgvc, "tv": _torchvision}
load_vtab, load_fgvc, load_tv = (functools.partial(load_benchmark, kind) for kind in BENCHMARKS)
