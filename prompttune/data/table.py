"""CSV tables of images: ``path,label`` and optionally ``split``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prompttune.data.base import (
    VALIDATION_NAMES,
    DataSplits,
    FileSource,
    check_class_count,
    shortened,
)
from prompttune.data.splitting import hold_out
from prompttune.errors import DataError

TRAIN = "train"


@dataclass(frozen=True)
class _Row:
    path: str
    label: str
    split: str
    line: int


def load_table(file: Path, val_fraction: float, seed: int) -> DataSplits:
    """Read a CSV file with a header of ``path,label`` or ``path,label,split``; more columns are ignored.

    Paths are relative to the file. Labels are names, numbered in their sorted order. ``split`` is ``train`` or
    ``val`` (or ``validation``, ``valid``, ``test``: the first of these that occurs is used, the others are not);
    without it, and where all rows train, ``val_fraction`` of each class is held out.

    Raises:
        DataError: the file is missing or empty, lacks a column or has fewer than two classes; a line, given by its
            number, has no path or label, an unknown split, or an image that stood before.
    """
    rows = _read_rows(file)
    _check_rows(rows, file)
    parts = {name: [row for row in rows if row.split == name] for name in (TRAIN, *VALIDATION_NAMES)}
    held = next((parts[name] for name in VALIDATION_NAMES if parts[name]), [])
    train = parts[TRAIN]
    if not train:
        raise DataError(f"{file} has no row with split {TRAIN}")
    classes = sorted({row.label for row in train})
    check_class_count(classes, str(file))
    if strange := [row for row in held if row.label not in classes]:
        row = strange[0]
        raise DataError(f"{file} line {row.line}: the label {row.label!r} occurs in no training row")
    source = _source(train, classes, file.parent)
    if not held:
        return hold_out(source, val_fraction, seed, str(file))
    return DataSplits(source, _source(held, classes, file.parent), classes, str(file))


def _read_rows(file: Path) -> list[_Row]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            return list(_rows(csv.DictReader(stream), file))
    except FileNotFoundError:
        raise DataError(f"no CSV file at {file}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DataError(f"cannot read {file}: {problem}") from None


def _rows(reader: csv.DictReader[str], file: Path) -> Iterator[_Row]:
    columns = [name.strip() for name in reader.fieldnames or ()]
    if missing := [name for name in ("path", "label") if name not in columns]:
        raise DataError(f"{file} line 1: no column {' and '.join(missing)} (columns: {shortened(columns) or 'none'}); "
                        "the header must be path,label or path,label,split")  # fmt: skip
    reader.fieldnames = columns
    for row in reader:
        values = {name: (row[name] or "").strip() for name in ("path", "label")}
        split = (row["split"] or "").strip() if "split" in columns else TRAIN
        yield _Row(values["path"], values["label"], split, reader.line_num)


def _check_rows(rows: list[_Row], file: Path) -> None:
    if not rows:
        raise DataError(f"{file} has a header but no rows")
    seen: dict[str, int] = {}
    for row in rows:
        where = f"{file} line {row.line}"
        for name, value in (("path", row.path), ("label", row.label)):
            if not value:
                raise DataError(f"{where}: no {name}")
        if row.split not in (TRAIN, *VALIDATION_NAMES):
            raise DataError(f"{where}: the split must be {TRAIN} or val, not {row.split!r}")
        if (first := seen.setdefault(row.path, row.line)) != row.line:
            # an image listed twice could train and validate
            raise DataError(f"{where}: {row.path} stands on line {first} already; list each image once")


def _source(rows: list[_Row], classes: list[str], folder: Path) -> FileSource:
    index = {name: number for number, name in enumerate(classes)}
    return FileSource([folder / row.path for row in rows], [index[row.label] for row in rows], classes)
