"""Tables of images: CSV, Parquet and Arrow IPC."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from prompttune.data.text import csv_rows, misfit, separated, text_of
from prompttune.errors import DataError, UsageError, choose
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.sources.arrow import (
    ARROW_SUFFIXES,
    IMAGE_FIELDS,
    class_names,
    light_rows,
    open_table,
    reading,
)
from prompttune.serve.infer.sources.base import NO_TASK, Bounded, SourceContext, path_item, printable
from prompttune.serve.infer.sources.cells import CellPayload

CSV_DIALECTS = {".csv": "excel", ".tsv": "excel-tab"}
TABLE_SUFFIXES = frozenset(CSV_DIALECTS) | ARROW_SUFFIXES
"""Suffixes of tables, in upper or lower case."""
PATH_COLUMNS = ("path", "file", "file_name", "filename", "image", "image_path")
"""Column names that mean the image's path; the first one in a table is used."""
NAMED_COLUMNS = 20
"""Largest number of columns in an error message."""

Kind = Literal["cell", "path"]
"""Content of an image column: the images themselves, or their paths."""


@dataclass(frozen=True)
class _Columns:
    """Columns of a table to read."""

    image: str
    kind: Kind
    task: str | None
    label: str | None

    @property
    def texts(self) -> list[str]:
        """Columns that an item needs, each once."""
        wanted = (self.image if self.kind == "path" else None, self.task, self.label)
        return list(dict.fromkeys(name for name in wanted if name is not None))


class _Format(Protocol):
    total: int | None

    def items(self) -> Iterator[Item]: ...


class TableSource(Bounded):
    """Each row of a table is an item; its number, counted from 0, is the item's row.

    The suffix tells the format: ``.csv`` and ``.tsv`` (UTF-8, with a header), ``.parquet``, ``.arrow`` and ``.feather``
    (the file and the streaming format of Arrow IPC). Images stay in the table until their payload is opened. Labels and
    tasks become text, whole numbers without a fraction; integers that Hugging Face ``datasets`` wrote as class labels
    become class names.

    Args:
        path: the table.
        image_column: column with the path of an image, relative to the table's folder; or, except in CSV, with an
            encoded image or a struct of ``bytes`` and ``path``, whose first filled field is used. None picks the only
            column with encoded images or structs, else the first of :data:`PATH_COLUMNS` in the table.
        task_column: column with the task of each row; a row without a task is an item with an error.
        label_column: column with the true label of each row; a row may lack it.

    Raises:
        UsageError: the file or a column does not exist, a column has the wrong type, or the image column is ambiguous.
        DataError: the table is damaged. CSV files are read through at once, so that a run does not stop half way.
        MissingExtraError: the table is not CSV and pyarrow is not installed.
    """

    suffixes = tuple(TABLE_SUFFIXES)
    has_columns = True
    has_image_column = True

    def __init__(
        self,
        path: Path,
        image_column: str | None = None,
        task_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        super().__init__()
        choose("kind of table", path.suffix.lower(), sorted(TABLE_SUFFIXES))
        if not path.is_file():
            raise UsageError(f"no table {path}")
        self._format: _Format
        if path.suffix.lower() in CSV_DIALECTS:
            self._format = _Csv(path, image_column, task_column, label_column)
        else:
            self._format = _Arrow(path, image_column, task_column, label_column)
        self.total = self._format.total

    @classmethod
    def open(cls, name: str, context: SourceContext) -> TableSource:
        """See :class:`Source`."""
        settings = context.settings
        return cls(Path(name), settings.image_column, settings.task_column, settings.label_column)

    def _items(self) -> Iterator[Item]:
        return self._format.items()


def _choose(
    path: Path, kinds: Sequence[tuple[str, Kind | None]], image: str | None, task: str | None, label: str | None
) -> _Columns:
    """Find the requested columns, and the image column if it is not given.

    Args:
        path: the table.
        kinds: the possible image content of each column, by name.
        image: ``image_column`` of :class:`TableSource`.
        task: ``task_column`` of :class:`TableSource`.
        label: ``label_column`` of :class:`TableSource`.
    """
    names = [name for name, _ in kinds]
    known = dict(kinds)
    image = _find_images(path, known) if image is None else choose("column", image, known)
    for name in (image, *(choose("column", one, known) for one in (task, label) if one is not None)):
        if names.count(name) > 1:
            raise UsageError(f"{path} has {names.count(name)} columns named {name!r}")
    kind = known[image]
    if kind is None:
        raise UsageError(f"the column {image!r} of {path} holds neither paths nor images; columns: {_listed(names)}")
    return _Columns(image, kind, task, label)


def _find_images(path: Path, known: Mapping[str, Kind | None]) -> str:
    cells = [name for name, kind in known.items() if kind == "cell"]
    if len(cells) == 1:
        return cells[0]
    named = next((name for name in PATH_COLUMNS if known.get(name)), None)
    if named is None:
        raise UsageError(f"name the column of {path} that holds the images with --image-column: {_listed(list(known))}")
    return named


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_COLUMNS} more" if len(names) > NAMED_COLUMNS else ""
    return (", ".join(names[:NAMED_COLUMNS]) or "none") + more


class _Csv:
    """A CSV file; blank lines are skipped, and spaces around a cell are dropped."""

    def __init__(self, path: Path, *columns: str | None) -> None:
        self._path = path
        rows = self._rows()
        self._header = next(rows, (0, []))[1]
        if not any(self._header):
            raise DataError(f"the table {path} is empty; its first line must name the columns")
        if other := separated(self._header):
            raise DataError(f"the table {path} has one column{other}")
        self._columns = _choose(path, [(name, "path") for name in self._header], *columns)
        self.total: int | None = sum(1 for _ in rows)
        self._places = {name: self._header.index(name) for name in self._columns.texts}

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Line number and cells of each row, the header first."""
        return csv_rows(self._path, "the table", CSV_DIALECTS[self._path.suffix.lower()])

    def items(self) -> Iterator[Item]:
        for row, (line, cells) in enumerate(itertools.islice(self._rows(), 1, None)):
            yield self._item(row, line, cells)

    def _item(self, row: int, line: int, cells: list[str]) -> Item:
        values = {name: cells[place] or None for name, place in self._places.items() if place < len(cells)}
        columns = self._columns
        image = values.get(columns.image)
        if problem := misfit(cells, len(self._header)):
            return Item(printable(image or str(self._path)), row=row, error=f"line {line} {problem}")
        return path_item(
            image,
            self._path.parent,
            self._path,
            row,
            columns.image,
            task=values.get(columns.task or ""),
            target=values.get(columns.label or ""),
            no_task=columns.task is not None,
        )


class _Arrow:
    """Parquet and Arrow IPC."""

    def __init__(self, path: Path, *columns: str | None) -> None:
        self._path = path
        with contextlib.closing(open_table(path)) as table:
            schema = table.schema
            self.total = table.total
            self._columns = _choose(path, [(field.name, _kind(field.type)) for field in schema], *columns)
            for name in (self._columns.task, self._columns.label):
                kind = None if name is None else schema.field(name).type
                if kind is not None and _is_nested(kind):
                    raise UsageError(f"the column {name!r} of {path} holds {kind}, not text or numbers")
            self._classes = class_names(schema, self._columns.label) if self._columns.label else None

    def items(self) -> Iterator[Item]:
        columns = self._columns
        row = 0
        with contextlib.closing(open_table(self._path)) as table, reading(self._path):
            for group, first, values in light_rows(table, columns.texts):
                texts = [values.get(name or "", values[""]) for name in (columns.image, columns.task, columns.label)]
                for place, (image, task, label) in enumerate(zip(*texts, strict=True), first):
                    payload = CellPayload(self._path, columns.image, group, place)
                    yield self._item(row, payload, text_of(image), text_of(task), label)
                    row += 1

    def _item(self, row: int, payload: CellPayload, image: str | None, task: str | None, label: Any) -> Item:
        target = self._target(label)
        no_task = self._columns.task is not None
        if self._columns.kind == "path":
            return path_item(
                image, self._path.parent, self._path, row, self._columns.image,
                task=task, target=target, no_task=no_task,
            )  # fmt: skip
        if no_task and task is None:
            return Item(printable(str(self._path)), row=row, target=target, error=NO_TASK)
        return Item(printable(str(self._path)), payload, row=row, task=task, target=target, container=self._path)

    def _target(self, label: Any) -> str | None:
        if self._classes is None or not isinstance(label, int):
            return text_of(label)
        # Hugging Face data sets write -1 for an unknown label, as in the test split of a contest.
        if label == -1:
            return None
        return self._classes[label] if 0 <= label < len(self._classes) else str(label)


def _kind(kind: Any) -> Kind | None:
    """The possible image content of a column, by its pyarrow type."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        names = {kind.field(index).name for index in range(kind.num_fields)}
        return "cell" if names & set(IMAGE_FIELDS) else None
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return "cell"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "path"
    return None


def _is_nested(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_nested(kind))
