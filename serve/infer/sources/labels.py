"""True labels of inputs."""

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
    """Source of the true labels; :meth:`parse` reads the option ``--labels``."""

    folder: bool = False
    """Whether an image's label is the name of its folder."""
    table: LabelTable | None = None
    """Labels by path."""
    column: str | None = None
    """Column of a table, key of a JSON line or member of a shard; those sources read the label themselves."""

    @classmethod
    def parse(cls, text: str) -> Labels:
        """Read ``folder``, the path of a ``.csv`` file, or the name of a column, key or member.

        Raises:
            UsageError: the text is empty, or the file does not exist.
            DataError: the file is not a table of ``path,label``, or names an image twice.
        """
        if not text.strip():
            raise UsageError("--labels needs 'folder', a .csv file of path,label, or the name of a column")
        if text == FOLDER:
            return cls(folder=True)
        if text.lower().endswith(".csv"):
            return cls(table=LabelTable(Path(text)))
        return cls(column=text)

    def of(self, path: Path, written: str | None = None) -> str | None:
        """The label of an image file; None if it does not have one or if ``column`` names its place.

        Args:
            path: path of the file.
            written: the path as the user wrote it, if it differs.
        """
        if self.folder:
            return Path(os.path.normpath(path.absolute())).parent.name or None
        return self.table.of(path, written) if self.table else None


class LabelTable:
    """A CSV file whose header has ``path`` and ``label``; other columns are ignored.

    An image is looked up in this order:

    1. by its path, compared as written on both sides;
    2. by its location; relative paths in the table start from the table's folder, and links to folders are followed;
    3. by its file name alone, if a single row has this name and the file of that row is not on this machine.

    Args:
        file: the table. A row without a label, or with a word such as ``nan`` for a missing one, leaves its image
            unlabelled.

    Raises:
        UsageError: the file does not exist.
        DataError: the file cannot be read, lacks a column, has a row without a path or two rows for one file.
    """

    def __init__(self, file: Path) -> None:
        self._written: dict[str, str | None] = {}
        self._placed: dict[str, str | None] = {}
        self._named: dict[str, str | None] = {}
        """Location of the only row with a file name; None if several rows have it."""
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
                raise DataError(f"{file} line {row.line}: {row.path} is already on line {first}; list each image once")
            self._written[nfc(os.path.normpath(path))] = self._placed[place] = row.label
            name = place.rpartition("/")[2]
            self._named[name] = None if name in self._named else place

    def of(self, path: Path, written: str | None = None) -> str | None:
        """The label of an image file; None if it does not have one.

        Args:
            path: path of the file.
            written: the path as the user wrote it, if it differs.
        """
        key = nfc(os.path.normpath(path if written is None else written))
        if key in self._written:
            return self._written[key]
        place = self._place(str(path))
        if place in self._placed:
            return self._placed[place]
        other = self._named.get(nfc(path.name))
        # A row whose file exists says nothing about other files of the same name.
        return None if other is None or exists(find_file(Path(), other)) else self._placed[other]

    def _place(self, path: str) -> str:
        """Canonical location of a file, with links to folders resolved; a link to a file keeps its own name."""
        folder, slash, name = path.rpartition("/")
        return nfc(f"{self._real_folder(folder or slash)}/{name}")


def _real_folder(folder: str) -> str:
    try:
        return str(Path(folder).resolve())
    except (OSError, RuntimeError, ValueError):  # not a path: its row reports that when it is opened
        return folder


def target_index(target: str, labels: Sequence[str], as_index: bool) -> int | None:
    """The class index of a true label; None if the task does not have this class.

    Args:
        target: the true label.
        labels: names of the task's classes.
        as_index: whether a target that is not a class name may be a class index, counted from 0, as in the ``.cls``
            members of WebDataset. Names come first: a number that is a class name means that class.
    """
    if target in labels:
        return labels.index(target)
    forms = [nfc(label) for label in labels] if not target.isascii() else []
    if nfc(target) in forms:
        return forms.index(nfc(target))
    if as_index and target.isascii() and target.isdigit() and len(target) < 10 and int(target) < len(labels):
        return int(target)
    return None
