"""CSV tables of images: ``path,label`` and optionally ``split``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prompttune.data.base import FileSource, Parts, shortened
from prompttune.data.split_names import ALL, SPLITS, TEST, TRAIN, VAL, split_of
from prompttune.errors import DataError


@dataclass(frozen=True)
class _Row:
    path: str
    label: str
    split: str
    line: int


def read_table(file: Path) -> Parts:
    """Read a CSV file with a header of ``path,label`` or ``path,label,split``; more columns are ignored.

    Paths are relative to the file. Labels are names, numbered in their sorted order. ``split`` is a usual name of a
    split, see :func:`~prompttune.data.split_names.split_of`.

    Raises:
        DataError: the file is missing or empty, or lacks a column; a line, given by its number, has no path or label,
            an unknown split, or an image that stood before.
    """
    rows = _read_rows(file)
    _check_rows(rows, file)
    splits = {split: [row for row in rows if row.split == split] for split in (ALL, *SPLITS)}
    known = {row.label for row in splits[TRAIN]}
    strange = next((row for row in splits[VAL] or splits[TEST] if known and row.label not in known), None)
    return Parts(
        {split: _source(part, file.parent) for split, part in splits.items() if part},
        str(file),
        None
        if strange is None
        else f"{file} line {strange.line}: the label {strange.label!r} occurs in no training row",
    )


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
        yield _Row(
            values["path"], values["label"], _split(row, columns, f"{file} line {reader.line_num}"), reader.line_num
        )


def _split(row: dict[str, str], columns: list[str], where: str) -> str:
    if "split" not in columns:
        return ALL
    if (split := split_of(row["split"] or "")) is None:
        raise DataError(f"{where}: the split must be train, val or test, not {row['split']!r}")
    return split


def _check_rows(rows: list[_Row], file: Path) -> None:
    if not rows:
        raise DataError(f"{file} has a header but no rows")
    seen: dict[str, int] = {}
    for row in rows:
        where = f"{file} line {row.line}"
        for name, value in (("path", row.path), ("label", row.label)):
            if not value:
                raise DataError(f"{where}: no {name}")
        if (first := seen.setdefault(row.path, row.line)) != row.line:
            # an image listed twice could train and validate
            raise DataError(f"{where}: {row.path} stands on line {first} already; list each image once")


def _source(rows: list[_Row], folder: Path) -> FileSource:
    classes = sorted({row.label for row in rows})
    index = {name: number for number, name in enumerate(classes)}
    return FileSource([folder / row.path for row in rows], [index[row.label] for row in rows], classes, folder)
