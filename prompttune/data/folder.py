"""Folders of images: one folder per class, inside folders of splits or without splits."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prompttune.data.base import FileSource, ImageSource, Parts
from prompttune.data.files import Walk, components, why_unread
from prompttune.data.split_names import ALL, SPLITS, TRAIN, split_of
from prompttune.data.text import is_text, nfc
from prompttune.errors import DataError, shortened

logger = logging.getLogger("prompttune")

UNLABELLED = frozenset({"unknown", "unlabeled", "unlabelled"})
"""Names, besides those of splits and words such as ``images``, of a single folder of images without classes."""


@dataclass
class _Tree:
    """A folder as found by the walk."""

    folders: dict[str, _Tree] = field(default_factory=lambda: defaultdict(_Tree))
    """Visible folders by name."""
    images: list[str] = field(default_factory=list)
    """Images directly in the folder, relative to the walk's root."""
    unread: list[str] = field(default_factory=list)
    """Unsupported pictures directly in the folder."""

    @classmethod
    def of(cls, found: Walk) -> _Tree:
        top = cls()
        for name in found.folders:
            top.at(components(name))
        for name in found.images:
            top.at(components(name)[:-1]).images.append(name)
        for name in found.unread:
            top.at(components(name)[:-1]).unread.append(name)
        return top

    def at(self, names: Sequence[str]) -> _Tree:
        place = self
        for name in names:
            place = place.folders[name]
        return place

    def all_images(self) -> list[str]:
        return [image for tree in self.everything() for image in tree.images]

    def everything(self) -> Iterator[_Tree]:
        """This folder and all folders below it."""
        yield self
        for below in self.folders.values():
            yield from below.everything()


def read_folder(folder: Path) -> Parts:
    """Read class folders, which are in folders of splits (``train/cat``) or directly in the folder (``cat``).

    :func:`~prompttune.data.split_names.split_of` defines the names of splits, which are never classes. Images are found
    at any depth below their class folder, as :class:`~prompttune.data.files.Walk` finds them. Classes are numbered in
    the order of their names, in Unicode's form NFC. A split without class folders has no labels: it is skipped with a
    warning if another split has them.

    Raises:
        DataError: the folder is missing or has no class folders, or its splits and classes cannot be told apart; the
            message says what was found and what to change.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    found = Walk(folder)
    if strange := next((name for name in (*found.folders, *found.images) if not is_text(name)), None):
        raise DataError(f"the name {os.fsencode(strange)!r} in {folder} is not text in UTF-8: rename it")
    found.warn()
    tree = _Tree.of(found)
    places = _splits(folder, tree) or {ALL: (folder, tree)}
    if ALL not in places:
        _warn_loose(folder, tree)
    named: dict[str, ImageSource] = {}
    unfit: list[str] = []
    for split in (ALL, *SPLITS):
        if split not in places:
            continue
        place, part = places[split]
        if split != TRAIN and split != ALL and len(places) > 1 and _is_unlabelled(part):
            images = len(part.all_images())
            logger.warning("%s has no class folders, so its %d images have no labels: they are not used", place, images)
            continue
        source, empty = _classes(place, part, folder)
        named[split] = source
        unfit += empty
    return Parts(named, str(folder), next(iter(unfit), None))


def _splits(folder: Path, tree: _Tree) -> dict[str, tuple[Path, _Tree]]:
    """Place and content of each split; empty for a folder without splits."""
    found: dict[str, list[str]] = {}
    for name in tree.folders:
        if split := split_of(name):
            found.setdefault(split, []).append(name)
    others = [name for name, below in tree.folders.items() if not split_of(name) and below.all_images()]
    if found and others:
        names = [name for several in found.values() for name in several]
        raise DataError(
            f"{folder} has folders of splits ({shortened(names)}) beside other folders with images "
            f"({shortened(others)}); put every class folder into a split, or rename a class with a split's name"
        )
    if double := next((names for names in found.values() if len(names) > 1), None):
        raise DataError(f"the folders {' and '.join(double)} of {folder} mean the same split: keep one of them")
    return {split: _unwrapped(folder / names[0], tree.folders[names[0]], split) for split, names in found.items()}


def _unwrapped(place: Path, tree: _Tree, split: str) -> tuple[Path, _Tree]:
    """The content of a split that an archive has put into another folder of the same name, as ``train/train``."""
    while len(tree.folders) == 1 and not tree.images and split_of(only := next(iter(tree.folders))) == split:
        place, tree = place / only, tree.folders[only]
    return place, tree


def _is_unlabelled(tree: _Tree) -> bool:
    """Whether a split has images, or nothing, in place of class folders."""
    names = [name for name, below in tree.folders.items() if below.all_images()]
    return not tree.folders or (len(names) == 1 and not tree.images and names[0].casefold() in UNLABELLED)


def _classes(place: Path, tree: _Tree, root: Path) -> tuple[FileSource, list[str]]:
    """The images of class folders, and the reason why they are unfit for training."""
    if not tree.folders:
        raise DataError(f"{place} has no class folders; put the images of each class into a folder of its own")
    _warn_loose(place, tree)
    classes: dict[str, str] = {}
    for name, below in tree.folders.items():
        _check_class(place, name, below)
        label = nfc(name)
        if classes.setdefault(label, name) != name:
            raise DataError(
                f"{place} has two class folders {label}, which differ in their Unicode form alone: keep one"
            )
    images = {label: tree.folders[classes[label]].all_images() for label in sorted(classes)}
    return _source(images, root), [
        _why_empty(place / classes[label], tree.folders[classes[label]]) for label, found in images.items() if not found
    ]


def _warn_loose(place: Path, tree: _Tree) -> None:
    if tree.images:
        logger.warning("%d images directly in %s are in no class folder: they are not used", len(tree.images), place)


def _source(images: Mapping[str, Sequence[str]], root: Path) -> FileSource:
    paths = [root / name for found in images.values() for name in sorted(found, key=components)]
    labels = [index for index, found in enumerate(images.values()) for _ in found]
    return FileSource(paths, labels, list(images), root)


def _check_class(place: Path, name: str, tree: _Tree) -> None:
    if split_of(name):
        raise DataError(f"{place} holds the folder {name}, which has a split's name: move it, or rename the class")
    below = [one for one in tree.folders if split_of(one)]
    if len({split_of(one) for one in below}) > 1:
        raise DataError(
            f"{place / name} holds folders of splits ({shortened(below)}); give that folder as the data set, or write "
            f"the split before the class: {below[0]}/{name}"
        )


def _why_empty(folder: Path, tree: _Tree) -> str:
    what = f"class folder {folder} holds no image"
    if unread := [name for below in tree.everything() for name in below.unread]:
        return f"{what} that is read here: {why_unread(unread)}"
    why = "; its files have been found elsewhere already" if folder.is_symlink() else ""
    return f"{what}{why}; add images or remove the folder"
