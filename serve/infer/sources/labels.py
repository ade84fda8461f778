"""Where the true label of an input comes from."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prompttune.data.files import exists, find_file
from prompttune.data.text import labelled_rows, nfc
from prompttune.errors import DataError, UsageError

FOLDER = "folder"


@dataclass(frozen=True)
class Labels:
    """Where the true labels come from; :meth:`parse` makes one of the option ``--labels``."""

    folder: bool = False
    """An image's label is the name of the folder that it lies in."""
    table: LabelTable | None = None
    """Labels by path."""
    column: str | None = None
    """Column of a table, key of a JSON line or member of a shard; such sources read it themselves."""

    @classmethod
    def parse(cls, text: str) -> Labels:
        """Make sense of ``folder``, the path of a ``.csv`` file, or the name of a column, key or member.

        Raises:
            UsageError: no text, or no such file.
            DataError: the file is no table of ``path,label``, or names an image twice.
        """
        if not text.strip():
            raise UsageError("--labels wants folder, a .csv file of path,label, or the name of a column")
        if text == FOLDER:
            return cls(folder=True)
        if text.lower().endswith(".csv"):
            return cls(table=LabelTable(Path(text)))
        return cls(column=text)

    def of(self, path: Path, written: str | None = None) -> str | None:
        """The label of an image file, None where it has none or ``column`` says where it is.

        Args:
            path: where the file is.
            written: its path as the user wrote it, if that differs.
        """
        if self.folder:
            return Path(os.path.normpath(path.absolute())).parent.name or None
        return self.table.of(path, written) if self.table else None


class LabelTable:
    """A CSV file with a header that has ``path`` and ``label``; more columns are ignored.

    An image is looked for, in this order,

    1. by its path as it is written on both sides;
    2. by the place it is at; relative paths of the table belong to the table's folder, and links of folders are
       followed;
    3. by its file name alone, where one row has that name and the file which that row means is not on this machine.

    Args:
        file: the table. A row without a label, or with a word such as ``nan`` that stands for none, leaves its image
            without one.

    Raises:
        UsageError: there is no such file.
        DataError: it cannot be read, lacks a column, or has rows without a path or two for one file.
    """

    def __init__(self, file: Path) -> None:
        self._written: dict[str, str | None] = {}
        self._placed: dict[str, str | None] = {}
        self._named: dict[str, str | None] = {}
        """Place of the row that alone has a file name, None where several have it."""
        self._real_folder = functools.lru_cache(maxsize=4096)(_real_folder)
        lines: dict[str, int] = {}
        try:
            rows = list(labelled_rows(file, "the labels"))
        except FileNotFoundError:
            raise UsageError(f"no file {file} for --labels") from None
        for row in rows:
            path = row.path if exists(file.parent / row.path) else row.path.replace("\\", "/")
            place = self._place(path if path.startswith("/") else f"{file.parent}/{path}")
            if (first := lines.setdefault(place, row.line)) != row.line:
                raise DataError(
                    f"{file} line {row.line}: {row.path} stands on line {first} already; list each image once"
                )
            self._written[nfc(os.path.normpath(path))] = self._placed[place] = row.label
            name = place.rpartition("/")[2]
            self._named[name] = None if name in self._named else place

    def of(self, path: Path, written: str | None = None) -> str | None:
        """The label of an image file, None where it has none.

        Args:
            path: where the file is.
            written: its path as the user wrote it, if that differs.
        """
        key = nfc(os.path.normpath(path if written is None else written))
        if key in self._written:
            return self._written[key]
        place = self._place(str(path))
        if place in self._placed:
            return self._placed[place]
        other = self._named.get(nfc(path.name))
        # a row that means a file which is there says nothing about its namesakes
        return None if other is None or exists(find_file(Path(), other)) else self._placed[other]

    def _place(self, path: str) -> str:
        """Where a file is, whichever way leads there; a file that is a link stays what its name says."""
        folder, slash, name = path.rpartition("/")
        return nfc(f"{self._real_folder(folder or slash)}/{name}")


def _real_folder(folder: str) -> str:
    try:
        return str(Path(folder).resolve())
    except (OSError, RuntimeError, ValueError):  # no path at all: its row says so when it is opened
        return folder


def target_index(target: str, labels: Sequence[str], as_index: bool) -> int | None:
    """The class that a true label means, None if the task has no such class.

    Args:
        target: the true label.
        labels: names of the task's classes.
        as_index: whether a target that is no name may be the number of a class, counted from 0, as in the ``.cls``
            members of WebDataset. A name comes first: classes that are numbers are named by them.
    """
    if target in labels:
        return labels.index(target)
    forms = [nfc(label) for label in labels] if not target.isascii() else []
    if nfc(target) in forms:
        return forms.index(nfc(target))
    if as_index and target.isascii() and target.isdigit() and len(target) < 10 and int(target) < len(labels):
        return int(target)
    return None
