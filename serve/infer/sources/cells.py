"""Images in the cells of Parquet and Arrow tables, read in place."""

from __future__ import annotations

import functools
import io
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from prompttune.errors import DataError, PrompttuneError
from prompttune.serve.infer.items import Encoded
from prompttune.serve.infer.sources.arrow import IMAGE_FIELDS, open_table, pieces, reading
from prompttune.serve.infer.sources.base import EMPTY_CELL, file_of

KEPT_ROWS = 32
"""Number of rows behind the newest piece that are kept, for threads that come a little later."""
OPEN_TABLES = 4


@dataclass(frozen=True, slots=True)
class CellPayload(Encoded):
    """An image in a cell of a Parquet or Arrow table: encoded, or in a file that the cell names."""

    table: Path
    column: str
    group: int
    row: int
    """Row, counted in the group."""

    def stream(self) -> BinaryIO:
        """Read the image; the rows next to it are read too and kept for later calls."""
        try:
            value = _cells(self.table, self.column).read(self.group, self.row)
        except PrompttuneError as problem:
            raise OSError(str(problem)) from None
        if isinstance(value, dict):
            value = next((value[name] for name in IMAGE_FIELDS if value.get(name)), None)
        if not value:
            raise OSError(EMPTY_CELL)
        if isinstance(value, bytes):
            return io.BytesIO(value)
        file, error = file_of(self.table.parent, value)
        if file is None:
            raise OSError(error)
        return file.stream()


class _Cells:
    """The images of an open table, read from the last position onwards. Threads share the read rows."""

    def __init__(self, path: Path, column: str) -> None:
        self._path = path
        self._column = column
        self._table = open_table(path)
        self._lock = threading.Lock()
        self._kept: deque[tuple[int, int, Any]] = deque()
        """Group, first row and values of each piece; the newest last."""
        self._group = -1
        self._next = 0
        self._pieces: Iterator[Any] = iter(())
        self._damage: DataError | None = None

    def read(self, group: int, row: int) -> Any:
        """The value of a cell.

        Raises:
            DataError: the table is damaged at this place.
        """
        with self._lock, reading(self._path):
            first, values = self._piece(group, row)
            return values[row - first].as_py()

    def _piece(self, group: int, row: int) -> tuple[int, Any]:
        for kept, first, values in self._kept:
            if kept == group and first <= row < first + len(values):
                return first, values
        if group != self._group or row < self._next:
            self._group, self._next, self._damage = group, 0, None
            self._pieces = pieces(self._table, self._column, group)
        if self._damage is None:
            try:
                with reading(self._path):
                    for values in self._pieces:
                        first, self._next = self._next, self._next + len(values)
                        self._keep(group, first, values)
                        if row < self._next:
                            return first, values
                self._damage = DataError(f"the table {self._path} has changed: it ends before this row")
            except DataError as problem:
                self._damage = problem  # later rows fail with the same error, without another attempt
        raise self._damage

    def _keep(self, group: int, first: int, values: Any) -> None:
        self._kept.append((group, first, values))
        behind = sum(len(older) for _, _, older in self._kept) - len(values)
        while behind - len(self._kept[0][2]) >= KEPT_ROWS:
            behind -= len(self._kept.popleft()[2])


_OPENING = threading.Lock()


@functools.lru_cache(maxsize=OPEN_TABLES)
def _opened(path: Path, column: str, stamp: tuple[int, int]) -> _Cells:  # noqa: ARG001  # a file that was replaced is another
    return _Cells(path, column)


def _cells(path: Path, column: str) -> _Cells:
    with reading(path):
        status = path.stat()
    with _OPENING:  # so that concurrent threads open the table once
        return _opened(path, column, (status.st_size, status.st_mtime_ns))
