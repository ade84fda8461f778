"""What bounded sources share: their state, and how a path in a list or a table becomes an item."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from prompttune.data.files import NO_URLS, exists, find_file, is_url, windows_path
from prompttune.data.text import NO_BASE64, is_base64, is_text
from prompttune.serve.infer.items import FilePayload, Item

NO_TASK = "no task"
EMPTY_CELL = "the image cell is empty"


class Bounded:
    """Base of sources that end by themselves and give the same items whenever they are opened."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    @property
    def bounded(self) -> bool:
        """True."""
        return True

    @property
    def total(self) -> int | None:
        """Number of items, None where it is not known before the end."""
        return None

    def items(self) -> Iterator[Item]:
        """The inputs, in order.

        Raises:
            DataError: the source cannot be read any further.
        """
        for item in self._items():
            if self._closed.is_set():
                return
            yield item

    def counts(self) -> Mapping[str, int]:
        """What became of inputs that gave no item, so far."""
        return {}

    def close(self) -> None:
        """End it, from another thread if need be: no further item is given."""
        self._closed.set()

    def _items(self) -> Iterator[Item]:
        raise NotImplementedError


def printable(name: str) -> str:
    """A file name as text that every output can hold: bytes of it that are no UTF-8 stand as ``\\xff``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def text_of(value: object) -> str | None:
    """A cell or a JSON value as a label or a task; None where it is missing or empty.

    A whole number is written without a fraction, as tables keep whole numbers with gaps as floating point.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    elif isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    return None if value is None or value == "" else str(value)


def file_of(folder: Path, written: str) -> tuple[FilePayload | None, str | None]:
    """Where the image is that a path means, or why there is none; see :func:`~prompttune.data.files.find_file`."""
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
        written: the path as it stands there, or None.
        folder: what a relative path belongs to.
        container: the table; the item's source where there is no path.
        row: number of the row.
        column: where the path stands.
        task: task of this row.
        target: true label of this row.
        no_task: whether a task must stand in every row.
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
