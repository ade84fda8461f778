"""Parquet and Arrow IPC tables: light columns are streamed, image columns are read in small pieces."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from prompttune.errors import DataError, first_line
from prompttune.serve.infer.libraries import library

ARROW_SUFFIXES = frozenset({".parquet", ".arrow", ".feather"})
LIGHT_ROWS = 1024
"""Number of rows of the light columns in memory at a time."""
PIECE_BYTES = 2**23
"""Approximate bytes of encoded images that are read at a time."""
PIECE_ROWS = range(8, 1025)
"""Smallest and largest number of rows in a piece."""
READ_BUFFER = 2**18
IMAGE_FIELDS = ("bytes", "path")
"""Fields of the struct in which Hugging Face data sets store an image; the first filled one is used."""


class ArrowTable(Protocol):
    """A table in groups of rows; reading can start at each group."""

    schema: Any
    """``pyarrow.Schema``."""
    groups: int
    total: int | None
    """Number of rows; None if it is known only at the end."""

    def batches(self, group: int, columns: Sequence[str], rows: int) -> Iterator[Any]:
        """A group from its start, as ``pyarrow.RecordBatch`` of at most ``rows`` rows, with at least these columns."""

    def piece_rows(self, column: str, group: int) -> int:
        """Number of rows of an image column to read at a time."""

    def close(self) -> None:
        """Close the file."""


def open_table(path: Path) -> ArrowTable:
    """Open a table by its suffix; only its metadata is read.

    Raises:
        DataError: the table is damaged, or its format is not the one of its suffix.
        MissingExtraError: pyarrow is not installed.
    """
    library("pyarrow.parquet", "tables", "or write the table as CSV")
    with reading(path):
        if path.suffix.lower() == ".parquet":
            return _Parquet(path)
        with path.open("rb") as stream:
            return _Ipc(path, is_file=stream.read(6) == b"ARROW1")


def light_rows(table: ArrowTable, columns: Sequence[str]) -> Iterator[tuple[int, int, dict[str, list[Any]]]]:
    """All rows in order without their images: group, first row counted in the group, and values of each column."""
    for group in range(table.groups):
        first = 0
        for batch in table.batches(group, columns, LIGHT_ROWS):
            yield group, first, {"": [None] * batch.num_rows, **_values(batch, columns)}
            first += batch.num_rows


def pieces(table: ArrowTable, column: str, group: int) -> Iterator[Any]:
    """An image column of a group from its start, as ``pyarrow.Array`` of a few rows each."""
    for batch in table.batches(group, [column], table.piece_rows(column, group)):
        yield batch.column(column)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn pyarrow's errors for a damaged table into one line.

    Raises:
        DataError: the table cannot be read.
    """
    import pyarrow

    try:
        yield
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as problem:
        raise DataError(f"cannot read the table {path}: {first_line(problem)}") from None


def class_names(schema: Any, column: str) -> list[str] | None:
    """Class names behind the integers of a column, if Hugging Face ``datasets`` recorded them."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in described["names"]] if described["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


class _Parquet:
    """A Parquet file; its groups are row groups."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        # Without a buffer, the reader loads the whole column of a row group into memory.
        self._file = pyarrow.parquet.ParquetFile(path, buffer_size=READ_BUFFER, pre_buffer=False)
        self.schema = self._file.schema_arrow
        self.groups: int = self._file.metadata.num_row_groups
        self.total: int | None = self._file.metadata.num_rows

    def batches(self, group: int, columns: Sequence[str], rows: int) -> Iterator[Any]:
        wanted = [part for column in columns for part in self._parts(column)]
        batches: Iterator[Any] = self._file.iter_batches(
            batch_size=rows, row_groups=[group], columns=wanted, use_threads=False
        )
        return batches

    def piece_rows(self, column: str, group: int) -> int:
        metadata, wanted = self._file.metadata.row_group(group), self._parts(column)
        chunks = [metadata.column(index) for index in range(metadata.num_columns)]
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in wanted)
        rows: int = PIECE_BYTES * metadata.num_rows // max(size, 1)
        return min(max(rows, PIECE_ROWS[0]), PIECE_ROWS[-1])

    def _parts(self, column: str) -> list[str]:
        """The fields of a struct that hold an image; any other column itself."""
        kind = self.schema.field(column).type
        inner = [kind.field(index).name for index in range(kind.num_fields)]
        return [f"{column}.{name}" for name in IMAGE_FIELDS if name in inner] or [column]

    def close(self) -> None:
        self._file.close()


class _Ipc:
    """Arrow IPC, mapped into memory: uncompressed data is loaded page by page when it is read.

    The groups of the file format are its record batches. The streaming format, as Hugging Face ``datasets`` caches it,
    is one group, readable only from its start.
    """

    def __init__(self, path: Path, is_file: bool) -> None:
        import pyarrow.dataset

        self._map = pyarrow.memory_map(str(path))
        self._is_file = is_file
        reader = self._reader(None)
        self.schema = reader.schema
        self.groups: int = reader.num_record_batches if is_file else 1
        self.total: int | None = pyarrow.dataset.dataset(path, format="ipc").count_rows() if is_file else None

    def _reader(self, columns: Sequence[str] | None) -> Any:
        import pyarrow

        self._map.seek(0)
        options = pyarrow.ipc.IpcReadOptions(
            included_fields=None if columns is None else sorted(self.schema.get_field_index(name) for name in columns)
        )
        return (pyarrow.ipc.open_file if self._is_file else pyarrow.ipc.open_stream)(self._map, options=options)

    def batches(self, group: int, columns: Sequence[str], rows: int) -> Iterator[Any]:
        reader = self._reader(columns or self._lightest())
        for batch in [reader.get_batch(group)] if self._is_file else reader:
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)

    def piece_rows(self, column: str, group: int) -> int:  # noqa: ARG002  # a slice of a batch costs nothing
        return PIECE_ROWS[-1]

    def _lightest(self) -> list[str]:
        """A column from which the number of rows can be read cheaply."""
        import pyarrow

        fixed = [field.name for field in self.schema if pyarrow.types.is_primitive(field.type)]
        return (fixed or self.schema.names)[:1]

    def close(self) -> None:
        self._map.close()


def _values(batch: Any, columns: Sequence[str]) -> dict[str, list[Any]]:
    return {name: batch.column(name).to_pylist() for name in columns}
