"""What a source is, the base of those that end, and items from paths in a list or a table."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, ClassVar

from prompttune.data.files import NO_URLS, exists, find_file, is_url, windows_path
from prompttune.data.text import NO_BASE64, is_base64, is_text
from prompttune.serve.infer.items import FilePayload, Item
from prompttune.serve.infer.settings import SourceSettings

NO_TASK = "no task"
EMPTY_CELL = "the image cell is empty"


@dataclass(frozen=True)
class SourceContext:
    """What a source is opened with."""

    settings: SourceSettings
    stdin: Callable[[], BinaryIO]
    """Opens standard input."""
    done: Callable[[Item], bool] = lambda _: False
    """Tells, for a watched folder, whether an earlier run has answered an image in its current state."""


class Source(ABC):
    """A sequence of inputs, registered in ``SOURCES``.

    ``items`` is called once. A bounded source gives the same items in the same order each time it is opened; resuming
    and sharding rely on that. Making an item is cheap; the work is left to its payload. ``close`` can be called from
    another thread; ``items`` ends soon afterwards.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Suffixes of its files, in lower case."""
    has_columns: ClassVar[bool] = False
    """Whether it reads tasks and labels from columns, keys or members."""
    has_image_column: ClassVar[bool] = False
    """Whether ``--image-column`` names the column of its images."""
    frames: bool = False
    """Whether its inputs are frames of a video or a stream, which have no labels."""
    bounded: bool = True
    """Whether it ends by itself and gives the same items each time it is opened."""
    rate: Fraction | None = None
    """Frames per second of a video, if known."""
    total: int | None = None
    """Number of items; None if it is known only at the end."""

    @classmethod
    def takes(cls, name: str, settings: SourceSettings) -> bool:  # noqa: ARG003  # for subclasses
        """Whether it opens an input of this name, if ``--input-format`` does not say so; by its suffixes."""
        return Path(name).suffix.lower() in cls.suffixes and not Path(name).is_dir()

    @classmethod
    def open(cls, name: str, context: SourceContext) -> Source:
        """Open an input; raises the errors of ``open_source``."""
        raise NotImplementedError

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """The inputs, in order.

        Raises:
            DataError: the source cannot be read any further.
        """

    def counts(self) -> Mapping[str, int]:
        """Counts so far of inputs without an item, such as ``skipped``, ``dropped`` and ``reconnects``."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Stop; no further item is given."""


class Bounded(Source):
    """Base of sources that end by themselves; a subclass gives ``_items``."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    def items(self) -> Iterator[Item]:
        """See :class:`Source`."""
        for item in self._items():
            if self._closed.is_set():
                return
            yield item

    def close(self) -> None:
        """See :class:`Source`."""
        self._closed.set()

    @abstractmethod
    def _items(self) -> Iterator[Item]:
        """The inputs, in order."""


def printable(name: str) -> str:
    """A file name as text that every output can hold: bytes that are not UTF-8 become ``\\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def file_of(folder: Path, written: str) -> tuple[FilePayload | None, str | None]:
    """The image file that a path names, or the reason for an error; see :func:`~prompttune.data.files.find_file`."""
    if is_url(written):
        return None, NO_URLS
    path = find_file(folder, written)
    if (why := windows_path(folder, written)) is not None and not exists(path):
        return None, why
    if not is_text(written) and not exists(path):
        return None, "no such file, and its name is not in UTF-8: save the list as UTF-8"
    return FilePayload(path), None


def path_item(
    written: str | None,
    folder: Path,
    container: Path,
    row: int,
    column: str,
    *,
    task: str | None,
    target: str | None,
    no_task: bool,
) -> Item:
    """The item of a row that names its image by a path.

    Args:
        written: the path as given, or None.
        folder: folder that relative paths start from.
        container: the table; the source of an item without a path.
        row: number of the row.
        column: name of the column with the path.
        task: task of this row.
        target: true label of this row.
        no_task: whether every row must name a task.
    """
    source = printable(written or str(container))
    payload, error = None, None
    if not written:
        error = EMPTY_CELL
    elif is_base64(written):
        source, error = printable(str(container)), f"the column {column} holds base64 text: {NO_BASE64}"
    elif no_task and task is None:
        error = NO_TASK
    else:
        payload, error = file_of(folder, written)
    return Item(source, payload, row=row, task=task, target=target, error=error)
