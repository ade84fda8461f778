"""Parquet and Arrow IPC tables: light columns are streamed, image columns are read in small pieces."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prompttune.errors import DataError, first_line
from prompttune.serve.infer import libraries

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


@dataclass(frozen=True)
class LightRows:
    """Consecutive rows of a group, without their images."""

    group: int
    first: int
    """First row, counted in the group."""
    length: int
    values: dict[str, list[Any]]
    """Values of each column [length]."""


class ArrowTable(Protocol):
    """A table in groups; reading can start at each group."""

    schema: Any
    """``pyarrow.Schema``."""
    total: int | None
    """Number of rows; None if it is known only at the end."""

    def light(self, columns: Sequence[str]) -> Iterator[LightRows]:
        """All rows in order, with only these columns."""

    def pieces(self, column: str, group: int) -> Iterator[Any]:
        """A column of a group from its start, as ``pyarrow.Array`` of a few rows each."""

    def close(self) -> None:
        """Close the file."""


def open_table(path: Path) -> ArrowTable:
    """Open a table by its suffix; only its metadata is read.

    Raises:
        DataError: the table is damaged, or its format is not the one of its suffix.
        MissingExtraError: pyarrow is not installed.
    """
    libraries.pyarrow("or write the table as CSV")
    with reading(path):
        if path.suffix.lower() == ".parquet":
            return _Parquet(path)
        with path.open("rb") as stream:
            return _IpcFile(path) if stream.read(6) == b"ARROW1" else _IpcStream(path)


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
        self.total: int | None = self._file.metadata.num_rows

    def light(self, columns: Sequence[str]) -> Iterator[LightRows]:
        for group in range(self._file.metadata.num_row_groups):
            if not columns:
                yield LightRows(group, 0, self._file.metadata.row_group(group).num_rows, {})
                continue
            first = 0
            for batch in self._batches(group, LIGHT_ROWS, columns):
                yield LightRows(group, first, batch.num_rows, _values(batch, columns))
                first += batch.num_rows

    def pieces(self, column: str, group: int) -> Iterator[Any]:
        field = self.schema.field(column)
        inner = [field.type.field(index).name for index in range(field.type.num_fields)]
        wanted = [f"{column}.{name}" for name in IMAGE_FIELDS if name in inner] or [column]
        metadata = self._file.metadata.row_group(group)
        chunks = [metadata.column(index) for index in range(metadata.num_columns)]
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in wanted)
        rows = PIECE_BYTES * metadata.num_rows // max(size, 1)
        for batch in self._batches(group, min(max(rows, PIECE_ROWS[0]), PIECE_ROWS[-1]), wanted):
            yield batch.column(column)

    def _batches(self, group: int, rows: int, columns: Sequence[str]) -> Iterator[Any]:
        batches: Iterator[Any] = self._file.iter_batches(
            batch_size=rows, row_groups=[group], columns=list(columns), use_threads=False
        )
        return batches

    def close(self) -> None:
        self._file.close()


class _Ipc:
    """Arrow IPC, mapped into memory: uncompressed data is loaded page by page when it is read."""

    def __init__(self, path: Path) -> None:
        import pyarrow

        self._map = pyarrow.memory_map(str(path))
        self.schema = self._reader(None).schema
        self.total: int | None = None

    def _reader(self, columns: Sequence[str] | None) -> Any:
        raise NotImplementedError

    def _options(self, columns: Sequence[str] | None) -> Any:
        import pyarrow

        return pyarrow.ipc.IpcReadOptions(
            included_fields=None if columns is None else sorted(self.schema.get_field_index(name) for name in columns)
        )

    def _lightest(self) -> list[str]:
        """A column from which the number of rows can be read cheaply."""
        import pyarrow

        fixed = [field.name for field in self.schema if pyarrow.types.is_primitive(field.type)]
        return (fixed or self.schema.names)[:1]

    def close(self) -> None:
        self._map.close()


class _IpcFile(_Ipc):
    """The file format; its groups are record batches."""

    def __init__(self, path: Path) -> None:
        import pyarrow.dataset

        super().__init__(path)
        self.total = pyarrow.dataset.dataset(path, format="ipc").count_rows()

    def _reader(self, columns: Sequence[str] | None) -> Any:
        import pyarrow

        return pyarrow.ipc.open_file(self._map, options=self._options(columns))

    def light(self, columns: Sequence[str]) -> Iterator[LightRows]:
        reader = self._reader(columns or self._lightest())
        for group in range(reader.num_record_batches):
            yield from _light_rows(reader.get_batch(group), group, 0, columns)

    def pieces(self, column: str, group: int) -> Iterator[Any]:
        yield self._reader([column]).get_batch(group).column(column)


class _IpcStream(_Ipc):
    """The streaming format, as Hugging Face ``datasets`` caches it: one group, readable only from its start."""

    def _reader(self, columns: Sequence[str] | None) -> Any:
        import pyarrow

        self._map.seek(0)
        return pyarrow.ipc.open_stream(self._map, options=self._options(columns))

    def light(self, columns: Sequence[str]) -> Iterator[LightRows]:
        first = 0
        for batch in self._reader(columns or self._lightest()):
            yield from _light_rows(batch, 0, first, columns)
            first += batch.num_rows

    def pieces(self, column: str, group: int) -> Iterator[Any]:  # noqa: ARG002
        for batch in self._reader([column]):
            yield batch.column(column)


def _light_rows(batch: Any, group: int, first: int, columns: Sequence[str]) -> Iterator[LightRows]:
    for start in range(0, batch.num_rows, LIGHT_ROWS):
        part = batch.slice(start, LIGHT_ROWS)
        yield LightRows(group, first + start, part.num_rows, _values(part, columns))


def _values(batch: Any, columns: Sequence[str]) -> dict[str, list[Any]]:
    return {name: batch.column(name).to_pylist() for name in columns}
