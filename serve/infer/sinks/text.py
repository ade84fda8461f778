"""Rows as text: JSON lines and CSV, to a file or to standard output."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from prompttune.errors import DataError
from prompttune.serve.infer.rows import COLUMNS, LABELLED_COLUMNS, Answer, Row
from prompttune.serve.infer.sinks.appended import PARTS, AppendedFile, Taking, committed_lines, state_number
from prompttune.spreadsheets import BOM, guarded, restored

Form = Literal["jsonl", "csv"]

_INTEGERS = ("row", "frame")
_CSV_END = "\r\n"
"""Line end for the csv writer only: it quotes the characters of its line end, and a cell may hold either of them."""
_FLOATS = ("timestamp", "probability", "target_probability")


def json_line(row: Row, labelled: bool) -> str:
    """A row as a line of JSON, including its line end.

    A file name that is not valid Unicode holds surrogates, which UTF-8 cannot hold. Its line is written in ASCII with
    escapes and still reads back exactly.
    """
    values = row.to_dict(labelled)
    line = json.dumps(values, ensure_ascii=False) + "\n"
    return line if encodable(line) else json.dumps(values) + "\n"


def csv_lines(rows: Sequence[Row], labelled: bool) -> str:
    """Rows as CSV: a missing value is an empty cell, ``top_k`` is the same JSON text as in a JSON line.

    Text goes through :func:`~prompttune.spreadsheets.guarded`. Numbers are written so that they read back exactly.
    Characters of a file name that are not valid Unicode are escaped (``\\udcff``).
    """
    lines = []
    for row in rows:
        values = row.to_dict(labelled)
        values["top_k"] = json.dumps(values["top_k"], ensure_ascii=False)
        text = io.StringIO()
        csv.writer(text, lineterminator=_CSV_END).writerow(map(guarded, values.values()))
        lines.append(text.getvalue().removesuffix(_CSV_END) + "\n")
    return escaped("".join(lines))


def csv_header(labelled: bool, bom: bool = False) -> str:
    """The header line, after a byte order mark if ``bom`` is set."""
    return BOM * bom + ",".join(_columns(labelled)) + "\n"


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold the text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def escaped(text: str, encoding: str = "utf-8") -> str:
    """The text with an escape for each character that the encoding cannot hold."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _columns(labelled: bool) -> tuple[str, ...]:
    return LABELLED_COLUMNS if labelled else COLUMNS


class _TextRows:
    """Rows appended to a text file; :meth:`commit` returns its length, to which resuming cuts it back."""

    picture_side: int | None = None

    def __init__(self, path: Path, labelled: bool, state: Mapping[str, Any] | None) -> None:
        self._labelled = labelled
        self._taking = Taking(path)
        self._file = AppendedFile(path, None if state is None else state_number(state, "bytes"))
        self._rows = 0 if state is None else state_number(state, "rows")
        self._committed = self._file.size
        self._committed_rows = self._rows

    def _append(self, text: str, rows: int) -> None:
        self._file.append(text.encode("utf-8"))
        self._rows += rows

    def commit(self) -> Mapping[str, Any]:
        """Write the rows to the disk; return the ``bytes`` and ``rows`` of the file.

        Raises:
            DataError: an error occurred in the middle of an input.
        """
        self.finish()
        return {"bytes": self._committed, "rows": self._committed_rows, PARTS: self._file.new_parts()}

    def finish(self) -> None:
        """Write the rows to the disk."""
        self._taking.check()
        self._committed = self._file.sync()
        self._committed_rows = self._rows

    def close(self) -> None:
        """Do nothing: no file is open between two writes."""

    def _lines(self) -> Iterator[bytes]:
        return committed_lines(self._file.path, self._committed)

    def _damaged(self, number: int) -> DataError:
        return DataError(f"{self._file.path} was changed: line {number} is not a row that prompttune writes")


class JsonLines(_TextRows):
    """One JSON object per line, UTF-8; see :func:`json_line`.

    Args:
        path: the file.
        labelled: whether there are true labels, which have their own columns.
        state: an earlier :meth:`commit` to resume from; None starts a new file.

    Raises:
        DataError: the file was changed after that commit.
        OSError: the file cannot be written.
    """

    def write(self, answer: Answer) -> None:
        """Write the rows of one input."""
        with self._taking:
            for row in answer.rows:
                self._append(json_line(row, self._labelled), 1)

    def rows(self) -> Iterator[Row]:
        """Every committed row, in order, exactly as written.

        Raises:
            DataError: the file was changed in the meantime.
        """
        for number, line in enumerate(self._lines(), 1):
            try:
                row = Row.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise self._damaged(number) from None
            yield row


class CsvRows(_TextRows):
    """CSV in UTF-8 with a header; see :func:`csv_lines`. :class:`JsonLines` has the other arguments and the errors.

    Args:
        bom: whether to start the file with a byte order mark.
    """

    def __init__(self, path: Path, labelled: bool, state: Mapping[str, Any] | None, bom: bool = False) -> None:
        super().__init__(path, labelled, state)
        if state is None:
            self._append(csv_header(labelled, bom), 0)

    def write(self, answer: Answer) -> None:
        """Write the rows of one input."""
        with self._taking:
            self._append(csv_lines(answer.rows, self._labelled), len(answer.rows))

    def rows(self) -> Iterator[Row]:
        """Every committed row, in order; an empty cell is None, except for an empty label beside a probability.

        Raises:
            DataError: the file was changed in the meantime.
        """
        reader = csv.reader(line.decode("utf-8", "replace") for line in self._lines())
        columns = _columns(self._labelled)
        for cells in reader:
            if reader.line_num == 1:
                continue
            try:
                row = _from_cells(dict(zip(columns, map(restored, cells), strict=True)))
            except (ValueError, KeyError, TypeError):
                raise self._damaged(reader.line_num) from None
            yield row


def _from_cells(cells: dict[str, str]) -> Row:
    values: dict[str, Any] = {name: cell or None for name, cell in cells.items()}
    values |= {name: int(cells[name]) for name in _INTEGERS if cells[name]}
    values |= {name: float(cells[name]) for name in _FLOATS if cells.get(name)}
    if values["probability"] is not None:
        values["label"] = cells["label"]
    return Row.from_dict(
        {**values, "source": cells["source"], "task": cells["task"], "top_k": json.loads(cells["top_k"])}
    )


class StandardOutput:
    """Rows to a stream whose reader sees them at once; it cannot be resumed.

    Args:
        stream: output stream, which stays open.
        labelled: whether there are true labels.
        form: JSON lines, or CSV with a header.
        bom: whether CSV starts with a byte order mark.
    """

    picture_side: int | None = None

    def __init__(self, stream: TextIO, labelled: bool, form: Form = "jsonl", bom: bool = False) -> None:
        self._stream = stream
        self._bom = bom
        self._labelled = labelled
        self._form = form
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._begun = form != "csv"

    def write(self, answer: Answer) -> None:
        """Write the rows of one input.

        Raises:
            BrokenPipeError: the reader has closed the pipe.
        """
        self._begin()
        if self._form == "csv":
            text = escaped(csv_lines(answer.rows, self._labelled), self._encoding)
        else:
            # JSON has the same escapes as Python's backslashreplace up to U+FFFF, but not beyond
            lines = (json_line(row, self._labelled) for row in answer.rows)
            text = "".join(line if self._holds(line) else json.dumps(json.loads(line)) + "\n" for line in lines)
        self._stream.write(text)

    def _holds(self, line: str) -> bool:
        return line.isascii() or escaped(line, self._encoding) == line

    def commit(self) -> Mapping[str, Any]:
        """Flush the stream. The state is empty, since printed rows cannot be taken back."""
        self._stream.flush()
        return {}

    def finish(self) -> None:
        """Flush the stream."""
        self._begin()
        self._stream.flush()

    def _begin(self) -> None:
        if not self._begun:
            self._stream.write(csv_header(self._labelled, self._bom))
            self._begun = True

    def close(self) -> None:
        """Do nothing: the stream stays open."""
