"""Image files: named, found in folders and by patterns, or listed in a text file."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prompttune.errors import DataError, UsageError, first_line
from prompttune.images import is_image
from prompttune.serve.infer.items import FilePayload, Item
from prompttune.serve.infer.sources.common import NO_URLS, Bounded, is_url, printable
from prompttune.serve.infer.sources.labels import Labels

COMMENT = "#"


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Image files in the order of ``inputs``: files, folders (all images below, sorted) and glob patterns.

    A file that is named is taken whatever its extension.

    Raises:
        UsageError: an input that does not exist or is a URL, a pattern that matches nothing.
        DataError: a folder without images, or one that cannot be read.
    """
    found: list[Path] = []
    for one in inputs:
        path = Path(one)
        if path.is_dir():
            below = list(images_below(path, _refuse))
            if not below:
                raise DataError(f"no images below {path}")
            found += below
        elif path.exists():
            found.append(path)
        elif is_url(one):
            raise UsageError(f"{one}: {NO_URLS}")
        elif glob.has_magic(one):
            matches = [Path(match) for match in sorted(glob.glob(one, recursive=True))]  # noqa: PTH207  # Path.glob takes no absolute pattern
            files = [match for match in matches if match.is_file()]
            if not files:
                raise UsageError(f"nothing matches {one}")
            found += files
        else:
            raise UsageError(f"no file or folder {one}")
    return found


def images_below(folder: Path, refuse: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Images of a folder and of those below it, sorted; ``refuse`` is told of a folder that may not be entered."""
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        yield from (Path(parent) / name for name in sorted(files) if is_image(name))


def _refuse(problem: OSError) -> None:
    """A folder that may not be entered would otherwise be left out without a word."""
    raise DataError(f"cannot read the folder {problem.filename}: {problem.strerror}")


class FileSource(Bounded):
    """Image files, in the order given. Items have no row.

    Args:
        paths: the files; one that is missing gives an item all the same, whose payload cannot be opened.
        labels: where the true labels come from.
    """

    def __init__(self, paths: Sequence[Path], labels: Labels | None = None) -> None:
        super().__init__()
        self._paths = paths
        self._labels = labels

    @property
    def total(self) -> int | None:
        """Number of files."""
        return len(self._paths)

    def _items(self) -> Iterator[Item]:
        for path in self._paths:
            target = self._labels.of(path) if self._labels else None
            yield Item(printable(str(path)), FilePayload(path), target=target)


class ListSource(Bounded):
    """A text file with the path of an image on each line, UTF-8 or whatever bytes the file names have.

    Blank lines are skipped, and lines that begin with ``#`` (a file of such a name is written ``./#…``); blanks at the
    ends of a line belong to the name. An item's row is the number of its line, counted from 0, and its source the path
    as written.

    All relative paths of a list belong to one folder: the current one if the first of them that exists in either stands
    there, else the list's. Where none exists in either, it is the list's.

    Args:
        path: the list.
        labels: where the true labels come from.

    Raises:
        UsageError: there is no such file.
        DataError: it cannot be read, or names nothing.
    """

    def __init__(self, path: Path, labels: Labels | None = None) -> None:
        super().__init__()
        if not path.is_file():
            raise UsageError(f"no file {path}; a list is a text file with a path on each line")
        self._path = path
        self._labels = labels
        self._total, self._folder = self._survey()
        if not self._total:
            raise DataError(f"the list {path} names no image: write a path on each line")

    @property
    def total(self) -> int | None:
        """Number of lines that name an image."""
        return self._total

    def _survey(self) -> tuple[int, Path]:
        """The number of paths, and the folder that the relative ones belong to."""
        beside = self._path.parent
        folder: Path | None = None
        total = 0
        for _, line in self._lines():
            total += 1
            if folder is None and not os.path.isabs(line) and not is_url(line):  # noqa: PTH117  # a Path a line is slow
                folder = next((one for one in (Path(), beside) if _exists(one / line)), None)
        return total, beside if folder is None else folder

    def _lines(self) -> Iterator[tuple[int, str]]:
        try:
            # surrogateescape: a list made by find has the bytes of the names, whatever their encoding
            with self._path.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
                for number, line in enumerate(stream):
                    name = line.removesuffix("\n")
                    if name.strip() and not name.startswith(COMMENT):
                        yield number, name
        except OSError as problem:
            raise DataError(f"cannot read the list {self._path}: {problem.strerror or first_line(problem)}") from None

    def _items(self) -> Iterator[Item]:
        for number, line in self._lines():
            if is_url(line):
                yield Item(printable(line), row=number, error=NO_URLS)
                continue
            path = self._folder / line
            target = self._labels.of(path, written=line) if self._labels else None
            yield Item(printable(line), FilePayload(path), row=number, target=target)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long: its row says so when it is opened
        return False
