"""Rows as Parquet files, in one folder per task (Hive's layout)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from prompttune.files import LOCK_FILE, sync_file, sync_folder
from prompttune.serve.infer.libraries import library
from prompttune.serve.infer.rows import COLUMNS, LABELLED_COLUMNS, InputAnswer, Row, escaped
from prompttune.serve.infer.sinks.base import FOLDER, Sink, SinkSettings

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_FILE = 100_000
ROWS_PER_GROUP = 10_000
"""Largest number of rows in a row group, and number of rows that are converted together."""
LEAST_ROWS_PER_GROUP = 1000
"""Number of a task's rows that wait for their row group, unless the file ends."""
MOST_OPEN_FILES = 500
OTHER = "__other__"
"""Partition of unknown tasks, if their names cannot be folder names or there are too many of them."""
MOST_PARTITIONS = 1000
"""Number of partitions beyond which tasks unknown to the engine do not get their own."""
_LONGEST_NAME = 200
_UNFINISHED = ".unfinished"
_OURS = re.compile(r"task=[^/]*/part-\d+\.parquet")

pyarrow = partial(library, "pyarrow.parquet", "tables", "or write a .jsonl or .csv file")
"""The module ``pyarrow``, with its Parquet part."""


def arrow_schema(labelled: bool) -> pa.Schema:
    """The schema of the rows, ``task`` included, which is not in the files but in the path: ``task=<name>``."""
    arrow = pyarrow()
    score = arrow.struct([("label", arrow.string()), ("probability", arrow.float64())])
    types = {
        **dict.fromkeys(("row", "frame"), arrow.int64()),
        **dict.fromkeys(("timestamp", "probability", "target_probability"), arrow.float64()),
        "top_k": arrow.list_(score),
    }
    names = LABELLED_COLUMNS if labelled else COLUMNS
    return arrow.schema([(name, types.get(name, arrow.string())) for name in names])


class ParquetFolder(Sink):
    """A folder of ``task=<name>/part-0.parquet`` and so on, written from the row log at the end of the run.

    A character that UTF-8 cannot hold, from a file name that is not valid Unicode, is escaped (``\\udcff``).
    """

    content = "Parquet files by task"
    suffixes = (".parquet", FOLDER)

    def __init__(self, path: Path, settings: SinkSettings) -> None:
        self._schema = arrow_schema(settings.labelled)
        self._labelled = settings.labelled
        self._rows = settings.rows
        self._folder = path
        self._partitions: set[str] = set()
        path.mkdir(parents=True, exist_ok=True)

    def write(self, answer: InputAnswer) -> None:
        """Do nothing: the rows are in the row log."""

    def finish(self) -> None:
        """Write the files and replace those of an earlier run."""
        arrow, dataset = pyarrow(), import_module("pyarrow.dataset")
        new = self._folder / _UNFINISHED
        _remove_parts(new)
        writing = dataset.ParquetFileFormat()
        task = arrow.schema([self._schema.field("task")])
        dataset.write_dataset(
            arrow.RecordBatchReader.from_batches(self._schema, self._batches()),
            new,
            basename_template="part-{i}.parquet",
            format=writing,
            file_options=writing.make_write_options(compression="zstd"),
            partitioning=dataset.partitioning(task, flavor="hive"),
            use_threads=False,  # the files hold the rows in order
            max_rows_per_file=ROWS_PER_FILE,
            max_rows_per_group=ROWS_PER_GROUP,
            min_rows_per_group=min(LEAST_ROWS_PER_GROUP, ROWS_PER_GROUP),
            max_open_files=MOST_OPEN_FILES,
            max_partitions=2**30,
        )
        files = list(_parts(new))
        for file in files:
            sync_file(file)
        _remove_parts(self._folder)
        for file in files:
            task_folder = self._folder / file.parent.name
            task_folder.mkdir(exist_ok=True)
            file.replace(task_folder / file.name)
        for folder in {file.parent.name for file in files}:
            sync_folder(self._folder / folder)
        _remove_empty(*new.glob("*"), new)
        sync_folder(self._folder)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        rows = map(self._values, self._rows())
        while batch := list(islice(rows, ROWS_PER_GROUP)):
            yield pyarrow().RecordBatch.from_pylist(batch, schema=self._schema)

    def _values(self, row: Row) -> dict[str, Any]:
        values = {
            name: escaped(value) if isinstance(value, str) else value
            for name, value in row.to_dict(self._labelled).items()
        }
        name = quote(values["task"], safe="")
        fits = 0 < len(name) <= _LONGEST_NAME and len(self._partitions) < MOST_PARTITIONS
        if row.task_version is not None or name in self._partitions or fits:
            self._partitions.add(name)
            return values
        return {**values, "task": OTHER, "error": f"task {row.task!r}: {row.error}"}

    @classmethod
    def foreign_file(cls, path: Path) -> Path | None:
        """A file below a folder that prompttune did not write, by its name, its place and its columns."""
        arrow = pyarrow()
        for file in sorted(one for one in path.rglob("*") if not one.is_dir() and one.name != LOCK_FILE):
            place = file.relative_to(path).as_posix()
            if _OURS.fullmatch(place.removeprefix(f"{_UNFINISHED}/")) is None:
                return file
            if place.startswith(_UNFINISHED):  # a crash may have cut it
                continue
            try:
                if "task_version" not in arrow.parquet.read_schema(file).names:
                    return file
            except (OSError, arrow.ArrowException):
                return file
        return None

    @classmethod
    def clear(cls, path: Path) -> None:
        """Remove the files that prompttune wrote, and the subfolders that become empty."""
        for folder in (path / _UNFINISHED, path):
            _remove_parts(folder)
        _remove_empty(path / _UNFINISHED)


def _parts(folder: Path) -> Iterator[Path]:
    return (file for file in folder.glob("*/*") if _OURS.fullmatch(file.relative_to(folder).as_posix()))


def _remove_parts(folder: Path) -> None:
    """Remove the parts of all tasks, and the task folders that become empty; other files stay."""
    for file in list(_parts(folder)):
        file.unlink()
    _remove_empty(*folder.glob("task=*"))


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
