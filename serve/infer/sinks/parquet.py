"""Rows as Parquet files, in one folder per task (Hive's layout)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from prompttune.errors import DataError
from prompttune.files import replacing
from prompttune.serve.infer.rows import COLUMNS, LABELLED_COLUMNS, Answer, Row
from prompttune.serve.infer.sinks.appended import (
    PARTS,
    AppendedFile,
    Part,
    Taking,
    committed_lines,
    gone,
    state_number,
    whole_file,
)
from prompttune.serve.infer.sinks.parquet_folder import (
    SPOOL,
    make_folder,
    part_file,
    pyarrow,
    spool_file,
    written_files,
)
from prompttune.serve.infer.sinks.text import encodable, escaped

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_FILE = 100_000
ROWS_PER_GROUP = 10_000
"""Rows in a row group, which is the part in memory while a file is written."""
OTHER = "__other__"
"""Partition of unknown tasks, if their names cannot be folder names or there are too many of them."""
MOST_PARTITIONS = 1000
"""Number of partitions beyond which tasks unknown to the engine do not get their own."""
_LONGEST_NAME = 200
_SPOOL_BUFFER = 2**16

COLUMN_TYPES = {
    "source": "string",
    "row": "int64",
    "frame": "int64",
    "timestamp": "float64",
    "task_version": "string",
    "label": "string",
    "probability": "float64",
    "top_k": "list<struct<label: string, probability: float64>>",
    "error": "string",
    "target": "string",
    "target_probability": "float64",
}
"""Arrow types of the columns in a file. ``task`` is not in the file but in the path: ``task=<name>``."""


def arrow_schema(labelled: bool) -> pa.Schema:
    """The schema of every file: the columns of :data:`COLUMN_TYPES`; the last two only if there are labels."""
    arrow = pyarrow()
    score = arrow.struct([("label", arrow.string()), ("probability", arrow.float64())])
    plain = {"string": arrow.string(), "int64": arrow.int64(), "float64": arrow.float64()}
    names = [name for name in (LABELLED_COLUMNS if labelled else COLUMNS) if name != "task"]
    return arrow.schema([(name, plain.get(COLUMN_TYPES[name], arrow.list_(score))) for name in names])


def partition(task: str) -> str:
    """Name of a task's folder without ``task=``, percent-encoded as Hive does it."""
    return quote(escaped(task), safe="")


class ParquetParts:
    """A folder of ``task=<name>/part-00000.parquet`` and so on, each with ``rows_per_file`` rows except the last.

    The rows of a file depend on the rows only, not on their arrival times: until a task has enough of them they wait as
    JSON lines in :data:`SPOOL`, and a file appears only when it is complete. A file keeps the rows of the spool that it
    replaces, so a run can resume from any earlier commit.

    A character that UTF-8 cannot hold, from a file name that is not valid Unicode, is escaped (``\\udcff``).

    Args:
        folder: output folder, which is created. Without a state it must not hold files of this kind.
        labelled: whether there are true labels.
        state: an earlier :meth:`commit` to resume from; None starts anew.
        rows_per_file: number of a task's rows in one file; a state has its own number.

    Raises:
        MissingExtraError: pyarrow is not installed.
        DataError: the folder was changed after that commit.
        OSError: a file cannot be written.
    """

    picture_side: int | None = None

    def __init__(
        self, folder: Path, labelled: bool, state: Mapping[str, Any] | None, rows_per_file: int = ROWS_PER_FILE
    ) -> None:
        self._schema = arrow_schema(labelled)
        self._folder = folder
        self._taking = Taking(folder)
        self._labelled = labelled
        self._rows_per_file = rows_per_file
        self._tasks: dict[str, _Task] = {}
        make_folder(folder)
        if state is not None:
            self._rows_per_file = state_number(state, "rows_per_file")
            for name, one in dict(state.get("tasks", {})).items():
                self._tasks[name] = _Task(folder, name, self._schema, one)
            self._remove_beyond()
        self._committed = self._state()

    def _remove_beyond(self) -> None:
        """Remove what was written after the commit; the rows will be written again."""
        kept = {part_file(self._folder, name, n) for name, task in self._tasks.items() for n in range(task.parts)}
        kept |= {task.spool.path for task in self._tasks.values() if task.spool is not None}
        for file in written_files(self._folder):
            if file not in kept:
                file.unlink()

    def write(self, answer: Answer) -> None:
        """Write the rows of one input."""
        with self._taking:
            for row in answer.rows:
                self._add(row)

    def _add(self, row: Row) -> None:
        name = self._partition(row)
        task = self._tasks.get(name)
        if task is None:
            task = self._tasks[name] = _Task(self._folder, name, self._schema)
        if name == OTHER:
            row = dataclasses.replace(row, error=f"task {row.task!r}: {row.error}")
        task.add(_line(row, self._labelled))
        if task.rows == self._rows_per_file:
            task.complete()

    def _partition(self, row: Row) -> str:
        name = partition(row.task)
        if name in self._tasks or row.task_version is not None:
            return name
        fits = 0 < len(name) <= _LONGEST_NAME and len(self._tasks) < MOST_PARTITIONS
        return name if fits else OTHER

    def commit(self) -> Mapping[str, Any]:
        """Write the rows to the disk; return each task's number of files and of rows in the spool.

        Raises:
            DataError: an error occurred in the middle of an input.
        """
        self._taking.check()
        parts = [part for task in self._tasks.values() for part in task.sync()]
        self._committed = self._state()
        return {**self._committed, PARTS: parts}

    def _state(self) -> dict[str, Any]:
        tasks = {name: task.state() for name, task in self._tasks.items()}
        return {"rows_per_file": self._rows_per_file, "tasks": tasks}

    def finish(self) -> None:
        """Write the last, smaller files and remove the spool."""
        self._taking.check()
        for task in self._tasks.values():
            if task.rows:
                task.complete()
        shutil.rmtree(self._folder / SPOOL, ignore_errors=True)
        self._committed = self._state()

    def close(self) -> None:
        """Do nothing: no file is open between two writes."""

    def rows(self) -> Iterator[Row]:
        """Every committed row: task after task, the rows of each task in order."""
        committed = dict(self._committed["tasks"])
        for name, state in committed.items():
            for number in range(state["parts"]):
                yield from _rows_of(part_file(self._folder, name, number), name)
            yield from islice(_waiting_rows(self._folder, name, state), state["rows"])


class _Task:
    """The rows of one task: complete files, and a spool named after the next file."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema, state: Mapping[str, Any] | None = None) -> None:
        self._folder = folder
        self._name = name
        self._schema = schema
        self.parts = 0
        self.rows = 0
        self.spool: AppendedFile | None = None
        self._files: list[Part] = []
        if state is not None:
            self.parts, self.rows = state_number(state, "parts"), state_number(state, "rows")
            self._restore(state_number(state, "bytes"))

    def _restore(self, size: int) -> None:
        for number in range(self.parts):
            if not part_file(self._folder, self._name, number).exists():
                raise gone(part_file(self._folder, self._name, number))
        if self.rows == 0:
            return
        spool, part = self._spool_file(), part_file(self._folder, self._name, self.parts)
        if not spool.exists() and part.exists():  # it was turned into that file after the commit
            labelled = "target" in self._schema.names
            make_folder(spool.parent)
            with replacing(spool) as temporary, temporary.open("wb") as stream:
                for row in islice(_rows_of(part, self._name), self.rows):
                    stream.write(_line(row, labelled))
        self.spool = AppendedFile(spool, size, _SPOOL_BUFFER, passing=True)

    def _spool_file(self) -> Path:
        return spool_file(self._folder, self._name, self.parts)

    def add(self, line: bytes) -> None:
        """Add a row."""
        if self.spool is None:
            make_folder(self._spool_file().parent)
            self.spool = AppendedFile(self._spool_file(), buffer=_SPOOL_BUFFER, passing=True)
        self.spool.append(line)
        self.rows += 1

    def sync(self) -> list[Part]:
        """Write the spool to the disk; return the parts written since the last call."""
        files, self._files = self._files, []
        if self.spool is not None:
            self.spool.sync()
            files += self.spool.new_parts()
        return files

    def state(self) -> dict[str, int]:
        """State to resume from."""
        return {"parts": self.parts, "rows": self.rows, "bytes": 0 if self.spool is None else self.spool.size}

    def complete(self) -> None:
        """Turn the spool into a Parquet file."""
        assert self.spool is not None
        self.spool.flush()
        path = part_file(self._folder, self._name, self.parts)
        make_folder(path.parent)
        with replacing(path) as temporary:
            _write_part(temporary, committed_lines(self.spool.path, self.spool.size), self._schema)
        self._files.append(whole_file(path))
        self.spool.path.unlink()
        self.parts, self.rows, self.spool = self.parts + 1, 0, None


def _line(row: Row, labelled: bool) -> bytes:
    values = row.to_dict(labelled)
    del values["task"]
    line = json.dumps(values, ensure_ascii=False) + "\n"
    if not encodable(line):
        values = {key: escaped(value) if isinstance(value, str) else value for key, value in values.items()}
        line = json.dumps(values, ensure_ascii=False) + "\n"
    return line.encode("utf-8", "replace")


def _write_part(path: Path, lines: Iterator[bytes], schema: pa.Schema) -> None:
    arrow = pyarrow()
    with arrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := [json.loads(line) for line in islice(lines, ROWS_PER_GROUP)]:
            writer.write_table(arrow.Table.from_pylist(batch, schema=schema), row_group_size=ROWS_PER_GROUP)


def _rows_of(path: Path, name: str) -> Iterator[Row]:
    arrow = pyarrow()
    try:
        with arrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from _rows(batch.to_pylist(), name)
    except FileNotFoundError:
        raise gone(path) from None
    except (arrow.ArrowException, KeyError, TypeError) as problem:
        raise DataError(f"{path} was changed: {problem}") from None


def _waiting_rows(folder: Path, name: str, state: Mapping[str, int]) -> Iterator[Row]:
    """Rows of the incomplete file at the commit, from its spool or from the file that replaced it."""
    spool = spool_file(folder, name, state["parts"])
    if state["rows"] and spool.exists():
        yield from _rows(map(json.loads, committed_lines(spool, state["bytes"])), name)
    elif state["rows"]:
        yield from _rows_of(part_file(folder, name, state["parts"]), name)


def _rows(values: Iterable[dict[str, Any]], name: str) -> Iterator[Row]:
    for one in values:
        yield Row.from_dict({"task": unquote(name), **one})
