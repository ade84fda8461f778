"""CSV tables of images: ``path,label`` and optionally ``split``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prompttune.data.base import FileSource, Parts
from prompttune.data.files import find_file, windows_path
from prompttune.data.split_names import ALL, SPLITS, TEST, TRAIN, VAL, split_of
from prompttune.data.text import LabelledRow, labelled_rows
from prompttune.errors import DataError

WHAT = "the table"


@dataclass(frozen=True)
class _TableImage:
    path: Path
    label: str
    split: str
    line: int


def read_table(file: Path) -> Parts:
    """Read a CSV file with a header of ``path,label`` or ``path,label,split``; other columns are ignored.

    Paths are relative to the file, see :func:`~prompttune.data.files.find_file`. Labels are names, numbered in their
    sorted order. ``split`` is a usual name of a split, see :func:`~prompttune.data.split_names.split_of`.

    Raises:
        DataError: the file is missing or empty or lacks a column; or a line, named by its number, has too many or too
            few cells, no path or label, an unknown split, or an image that is listed twice.
    """
    try:
        rows = list(labelled_rows(file, WHAT))
    except FileNotFoundError:
        raise DataError(f"no CSV file at {file}") from None
    if not rows:
        raise DataError(f"{WHAT} {file} has a header but no rows")
    images = _images(rows, file)
    splits = {split: [image for image in images if image.split == split] for split in (ALL, *SPLITS)}
    known = {image.label for image in splits[TRAIN]}
    strange = next((one for one in splits[VAL] or splits[TEST] if known and one.label not in known), None)
    return Parts(
        {split: _source(part, file.parent) for split, part in splits.items() if part},
        str(file),
        None
        if strange is None
        else f"{file} line {strange.line}: the label {strange.label!r} occurs in no training row",
    )


def _images(rows: Sequence[LabelledRow], file: Path) -> list[_TableImage]:
    images: list[_TableImage] = []
    seen: dict[Path, int] = {}
    lost: list[str] = []
    windows = 0
    for row in rows:
        where = f"{WHAT} {file} line {row.line}"
        if row.label is None:
            what = f"the label {row.written!r} stands for a missing one" if row.written else "no label"
            raise DataError(f"{where}: {what}; remove the row, or name its class")
        split = ALL if row.split is None else split_of(row.split)
        if split is None:
            raise DataError(f"{where}: the split must be train, val or test, not {row.split!r}")
        path = find_file(file.parent, row.path)
        if (why := windows_path(file.parent, row.path)) is not None:
            windows += 1
            lost += [f"{where}: {why}"] if not path.exists() else []
        if (first := seen.setdefault(path, row.line)) != row.line:
            # an image listed twice could train and validate
            raise DataError(f"{where}: {row.path} is already on line {first}; list each image once")
        images.append(_TableImage(path, row.label, split, row.line))
    if lost and len(lost) == windows:
        raise DataError(lost[0])
    return images


def _source(images: Sequence[_TableImage], folder: Path) -> FileSource:
    classes = sorted({image.label for image in images})
    index = {name: number for number, name in enumerate(classes)}
    return FileSource([image.path for image in images], [index[image.label] for image in images], classes, folder)
