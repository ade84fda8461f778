"""Image files: named directly, found in folders and by patterns, or listed in a text file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from prompttune.data.files import exists, find_file, find_images, is_url
from prompttune.data.text import text_lines
from prompttune.errors import DataError, UsageError
from prompttune.serve.infer.items import FilePayload, Item
from prompttune.serve.infer.settings import SourceSettings
from prompttune.serve.infer.sources.base import Bounded, SourceContext, file_of, printable
from prompttune.serve.infer.sources.labels import Labels

COMMENT = "#"


class ImageFiles(Bounded):
    """Image files, in the given order. Items do not have a row.

    Args:
        paths: the files; a missing one still gives an item, whose payload cannot be opened.
        labels: source of the true labels.
    """

    def __init__(self, paths: Sequence[Path], labels: Labels | None = None) -> None:
        super().__init__()
        self._paths = paths
        self._labels = labels
        self.total = len(paths)

    @classmethod
    def takes(cls, name: str, settings: SourceSettings) -> bool:  # noqa: ARG003
        """Every name that no other source takes."""
        return True

    @classmethod
    def open(cls, name: str, context: SourceContext) -> ImageFiles:
        """See :class:`Source`."""
        return cls(find_images([name]), context.settings.truth)

    def _items(self) -> Iterator[Item]:
        for path in self._paths:
            target = self._labels.of(path) if self._labels else None
            yield Item(printable(str(path)), FilePayload(path), target=target)


class ImageList(Bounded):
    """A text file with the path of an image on each line, in UTF-8 or in the bytes of the file names.

    Blank lines are skipped, and lines that start with ``#`` (write ``./#…`` for a file of such a name); spaces at the
    ends of a line belong to the name. An item's row is the number of its line, counted from 0, and its source the path
    as written.

    All relative paths of a list start from one folder: the current folder if the first relative path that exists in
    either is found there, else the list's folder. If none exists in either, they start from the list's folder.

    Args:
        path: the list.
        labels: source of the true labels.

    Raises:
        UsageError: the file does not exist.
        DataError: the file cannot be read or is empty.
    """

    suffixes = (".txt", ".lst", ".list")

    def __init__(self, path: Path, labels: Labels | None = None) -> None:
        super().__init__()
        if not path.is_file():
            raise UsageError(f"no file {path}; a list is a text file with a path on each line")
        self._path = path
        self._labels = labels
        self.total, self._folder = self._survey()
        if not self.total:
            raise DataError(f"the list {path} names no image: write a path on each line")

    @classmethod
    def open(cls, name: str, context: SourceContext) -> ImageList:
        """See :class:`Source`."""
        return cls(Path(name), context.settings.truth)

    def _survey(self) -> tuple[int, Path]:
        """The number of paths, and the folder that relative paths start from."""
        beside = self._path.parent
        folder: Path | None = None
        total = 0
        for _, line in self._lines():
            total += 1
            if folder is None and not os.path.isabs(line) and not is_url(line):  # noqa: PTH117  # a Path a line is slow
                folder = next((one for one in (Path(), beside) if exists(find_file(one, line))), None)
        return total, beside if folder is None else folder

    def _lines(self) -> Iterator[tuple[int, str]]:
        # A list made by find holds the bytes of the names, whatever their encoding.
        for number, name in enumerate(text_lines(self._path, "the list", any_bytes=True)):
            if name.strip() and not name.startswith(COMMENT):
                yield number, name

    def _items(self) -> Iterator[Item]:
        for number, line in self._lines():
            payload, error = file_of(self._folder, line)
            target = self._labels.of(payload.path, written=line) if self._labels and payload else None
            yield Item(printable(line), payload, row=number, target=target, error=error)
