"""Images with a class for each pixel, in ADE20K's folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from PIL import Image

from prompttune.data.base import FileSource, Parts
from prompttune.data.files import Walk, components
from prompttune.data.split_names import ALL, TEST, split_of
from prompttune.data.text import nfc, text_lines
from prompttune.errors import DataError
from prompttune.images import read_oriented
from prompttune.images.masks import IGNORE_INDEX, Mask, indexed, read_numbers

IMAGES, ANNOTATIONS = "images", "annotations"
NAMES_FILE = "classes.txt"
ADE20K_NAMES_FILE = "objectInfo150.txt"
LAYOUT = "images/training, annotations/training, images/validation and annotations/validation"


class MaskFileSource(FileSource):
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
        super().__init__([image for image, _ in pairs], [], classes, root)
        self.masks = [mask for _, mask in pairs]
        self.reduce_zero_label = reduce_zero_label

    def files(self, index: int) -> tuple[Path, ...]:
        """Image and annotation."""
        return self.paths[index], self.masks[index]

    def labels(self) -> list[int] | None:
        """None: a mask does not have a class of its own."""
        return None

    def load(self, index: int) -> tuple[Image.Image, Mask]:
        """See :class:`ImageSource`."""
        image_path, mask_path = self.files(index)
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


def read_mask_folder(folder: Path, reduce_zero_label: bool = True) -> Parts:
    """Read a folder in ADE20K's layout.

    Args:
        folder: holds ``images/training``, ``annotations/training``, ``images/validation`` and
            ``annotations/validation``, an annotation with the name of its image. Other usual names of splits work too,
            see :func:`~prompttune.data.split_names.split_of`; without splits the files are directly in ``images`` and
            ``annotations``. A test split without annotations is skipped.
        reduce_zero_label: whether 0 in an annotation means that a pixel has no class.

    Raises:
        DataError: the data are missing or incomplete; one line that says what to do.
    """
    if not folder.is_dir():
        raise DataError(f"no data at {folder}; give a folder with {LAYOUT}, or demo/shapes-seg")
    found = Walk(folder)
    found.warn()
    images, annotations = (_split_folders(found, top) for top in (IMAGES, ANNOTATIONS))
    if images.keys() > {TEST} and TEST not in annotations:
        images.pop(TEST, None)
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    for split, place in images.items():
        if split not in annotations:
            wanted = place.replace(IMAGES, ANNOTATIONS, 1)
            raise DataError(f"no folder {folder / wanted}; a segmentation reads {LAYOUT}")
        pairs[split] = _pairs(found, place, annotations[split])
    classes = _classes(folder, [pair for part in pairs.values() for pair in part], reduce_zero_label)
    if len(classes) > IGNORE_INDEX:
        raise DataError(f"{folder} has {len(classes)} classes; a mask has at most {IGNORE_INDEX}")
    sources = {split: MaskFileSource(part, classes, reduce_zero_label, folder) for split, part in pairs.items()}
    return Parts(sources, str(folder), target="mask")


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
