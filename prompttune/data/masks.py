"""Images with a class for each pixel: ADE20K's folders, and rendered shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from prompttune.data.base import MaskSource, Parts, Subset
from prompttune.data.files import Walk, components
from prompttune.data.shape_masks import load_shape_masks
from prompttune.data.split_names import ALL, TEST, TRAIN, VAL, split_of
from prompttune.data.splitting import at_most
from prompttune.data.text import nfc, text_lines
from prompttune.errors import DataError, UsageError
from prompttune.images import read_oriented
from prompttune.images.masks import IGNORE_INDEX, Mask, indexed, read_numbers

IMAGES, ANNOTATIONS = "images", "annotations"
NAMES_FILE = "classes.txt"
ADE20K_NAMES_FILE = "objectInfo150.txt"
LAYOUT = "images/training, annotations/training, images/validation and annotations/validation"


@dataclass(frozen=True)
class MaskSplits:
    """A data set of masks, ready to train on."""

    train: MaskSource
    val: MaskSource
    classes: list[str]
    name: str
    """Specification of the data set, as given by the user."""


class FileMaskSource(MaskSource):
    """Image files, each with an annotation file whose pixels are class numbers.

    Args:
        pairs: image and annotation files.
        classes: class names by index.
        reduce_zero_label: whether 0 in an annotation means that a pixel has no class; 1 is then the class of index 0.
        root: folder of the data set.
    """

    def __init__(
        self, pairs: Sequence[tuple[Path, Path]], classes: Sequence[str], reduce_zero_label: bool, root: Path
    ) -> None:
        self.pairs = list(pairs)
        self.root = root
        self.classes = list(classes)
        self.reduce_zero_label = reduce_zero_label

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[Image.Image, Mask]:
        """See :class:`MaskSource`."""
        image_path, mask_path = self.pairs[index]
        image, orientation = read_oriented(image_path)
        numbers, drawn = read_numbers(mask_path)
        if orientation != drawn:  # it may fit the upright picture or the stored one
            raise ValueError(
                f"the image has EXIF orientation {orientation}, the annotation {mask_path.name} has {drawn}; "
                "store both upright, or both with the same orientation"
            )
        mask = indexed(numbers, self.reduce_zero_label)
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"the annotation {mask_path.name} has {mask.shape[1]} x {mask.shape[0]} pixels, "
                f"the image {image.width} x {image.height}"
            )
        classes = mask[mask != IGNORE_INDEX]
        if classes.size and int(classes.max()) >= len(self.classes):
            number = int(classes.max()) + self.reduce_zero_label
            raise ValueError(f"the annotation {mask_path.name} has the number {number}, which is not a class")
        return image, mask

    def describe(self, index: int) -> str:
        """The path of the image."""
        return str(self.pairs[index][0])


def mask_files_at(source: Any, index: int) -> tuple[Path, Path, str] | None:
    """Image and annotation, and the image's path relative to the data set's folder; None if they are not files."""
    while isinstance(source, Subset):
        index, source = source.indices[index], source.source
    if not isinstance(source, FileMaskSource):
        return None
    image, mask = source.pairs[index]
    return image, mask, image.relative_to(source.root).as_posix()


def load_masks(
    spec: str,
    *,
    root: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    reduce_zero_label: bool = True,
) -> MaskSplits:
    """Load a data set of masks for training: the split ``train``, and ``val`` or else ``test`` for validation.

    Args:
        spec: see :func:`load_mask_parts`.
        root: folder that a relative path starts from.
        limit: largest number of images in each split.
        seed: seed of the selection for ``limit``.
        reduce_zero_label: whether 0 in a folder's annotations means that a pixel has no class.

    Raises:
        UsageError: the name is unknown, or the limit is out of range.
        DataError: the data are missing or incomplete, or do not name classes; one line that says what to do.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    parts = load_mask_parts(spec, root=root, reduce_zero_label=reduce_zero_label)
    train = parts.named.get(TRAIN)
    val = parts.named.get(VAL, parts.named.get(TEST))
    if train is None or val is None:
        raise DataError(f"{parts.name} has no split {TRAIN if train is None else VAL}; a training reads {LAYOUT}")
    # unnamed classes are named by their numbers, so the shorter list is a prefix of the longer one
    classes = max(train.classes, val.classes, key=len)
    if not 2 <= len(classes) <= IGNORE_INDEX:
        raise DataError(f"{parts.name} has {len(classes)} classes; a segmentation needs from 2 to {IGNORE_INDEX}")
    train.classes = val.classes = classes
    held: Any = at_most(val, limit, seed)
    trained: Any = at_most(train, limit, seed)
    return MaskSplits(trained, held, classes, spec)


def load_mask_parts(spec: str, *, root: str | None = None, reduce_zero_label: bool = True) -> Parts:
    """Load the splits of a data set of masks, for scoring; the sources are :class:`MaskSource`.

    Args:
        spec: ``demo/shapes-seg``, or a folder in ADE20K's layout: ``images/training``, ``annotations/training``,
            ``images/validation`` and ``annotations/validation``, an annotation with the name of its image. Other usual
            names of splits work too, see :func:`~prompttune.data.split_names.split_of`; without splits the files are
            directly in ``images`` and ``annotations``. A test split without annotations is skipped.
        root: folder that a relative path starts from.
        reduce_zero_label: whether 0 in a folder's annotations means that a pixel has no class.

    Raises:
        UsageError: the name is unknown.
        DataError: the data are missing or incomplete; one line that says what to do.
    """
    kind, _, name = spec.partition("/")
    if kind == "demo":
        return load_shape_masks(name)
    folder = Path(root or "").expanduser() / Path(spec).expanduser()
    if not folder.is_dir():
        raise DataError(f"no data at {folder}; give a folder with {LAYOUT}, or demo/shapes-seg")
    found = Walk(folder)
    found.warn()
    images, annotations = (_split_folders(found, top) for top in (IMAGES, ANNOTATIONS))
    if images.keys() > {TEST} and TEST not in annotations:
        images.pop(TEST, None)
    named: dict[str, Any] = {}
    for split, place in images.items():
        if split not in annotations:
            wanted = place.replace(IMAGES, ANNOTATIONS, 1)
            raise DataError(f"no folder {folder / wanted}; a segmentation reads {LAYOUT}")
        pairs = _pairs(found, place, annotations[split])
        named[split] = FileMaskSource(pairs, _classes(folder, pairs, reduce_zero_label), reduce_zero_label, folder)
    return Parts(named, str(folder))


def _split_folders(walk: Walk, top: str) -> dict[str, str]:
    """The folder of each split, relative to the data set's, or the folder itself if it does not have splits."""
    if top not in walk.folders:
        raise DataError(f"no folder {walk.root / top}; a segmentation reads {LAYOUT}")
    found: dict[str, str] = {}
    for name in walk.folders:
        parts = components(name)
        if len(parts) == 2 and parts[0] == top and (split := split_of(parts[1])):
            if split in found:
                raise DataError(f"the folders {found[split]} and {name} of {walk.root} mean the same split: "
                                "keep one of them")  # fmt: skip
            found[split] = name
    return found or {ALL: top}


def _pairs(walk: Walk, images: str, annotations: str) -> list[tuple[Path, Path]]:
    """Images of a split, sorted by path, each with the annotation of the same path and name."""
    places = {
        PurePath(name).with_suffix(""): name for name in _below(walk, annotations) if name.lower().endswith(".png")
    }
    found = _below(walk, images)
    if not found:
        raise DataError(f"{walk.root / images} does not hold any images")
    pairs = {name: places.get(annotations / PurePath(name).relative_to(images).with_suffix("")) for name in found}
    if missing := [name for name, place in pairs.items() if place is None]:
        raise DataError(f"{walk.root / missing[0]} has no annotation {PurePath(missing[0]).stem}.png in "
                        f"{walk.root / annotations} ({len(missing)} of {len(found)} images have none)")  # fmt: skip
    return [(walk.root / name, walk.root / place) for name, place in pairs.items() if place is not None]


def _below(walk: Walk, folder: str) -> list[str]:
    return [name for name in walk.images if name.startswith(f"{folder}/")]


def _classes(folder: Path, pairs: Sequence[tuple[Path, Path]], reduce_zero_label: bool) -> list[str]:
    """Class names from ``classes.txt`` or ADE20K's own list, else the numbers that occur."""
    if (folder / NAMES_FILE).is_file():
        names = [nfc(line.strip()) for line in text_lines(folder / NAMES_FILE, "the class names") if line.strip()]
    elif (folder / ADE20K_NAMES_FILE).is_file():
        rows = list(text_lines(folder / ADE20K_NAMES_FILE, "the class names"))[1:]
        names = [row.split("\t")[-1].strip() for row in rows if row.strip()]
    else:
        return _numbered(pairs, reduce_zero_label)
    if len(set(names)) < len(names):
        raise DataError(f"the class names of {folder} are not all different")
    return names


def _numbered(pairs: Sequence[tuple[Path, Path]], reduce_zero_label: bool) -> list[str]:
    """Names for the annotations' numbers, up to the largest; unreadable annotations are reported later."""
    greatest = 0
    for _, path in pairs:
        try:
            numbers, _ = read_numbers(path)
        except (OSError, ValueError):
            continue
        known = numbers[numbers < IGNORE_INDEX]
        greatest = max(greatest, int(known.max())) if known.size else greatest
    return [str(number) for number in range(int(reduce_zero_label), greatest + 1)]
