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
"""For the writer alone: it quotes what is in a line's end, and a cell may hold either character."""
_FLOATS = ("timestamp", "probability", "target_probability")


def json_line(row: Row, labelled: bool) -> str:
    """A row as a line of JSON, its end included.

    A file name that is no Unicode has surrogates in it, which UTF-8 cannot hold: its line is in ASCII, where they are
    escaped, and still reads back exactly.
    """
    values = row.to_dict(labelled)
    line = json.dumps(values, ensure_ascii=False) + "\n"
    return line if encodable(line) else json.dumps(values) + "\n"


def csv_lines(rows: Sequence[Row], labelled: bool) -> str:
    """Rows as CSV: an empty cell where there is no value, ``top_k`` as the JSON text that a JSON line has.

    Text goes through :func:`~prompttune.spreadsheets.guarded`. Numbers are written so that they read back exactly.
    What is no Unicode in a file's name is written as an escape such as ``\\udcff``.
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
    """The first line, with a byte order mark in front of it if wanted."""
    return BOM * bom + ",".join(_columns(labelled)) + "\n"


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold it."""
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
    """Rows at the end of a text file; :meth:`commit` gives its length, to which resuming cuts it back."""

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
        """Bring the rows to the disk; ``bytes`` and ``rows`` of the file.

        Raises:
            DataError: an error came in the middle of an input.
        """
        self.finish()
        return {"bytes": self._committed, "rows": self._committed_rows, PARTS: self._file.new_parts()}

    def finish(self) -> None:
        """Bring the rows to the disk."""
        self._taking.check()
        self._committed = self._file.sync()
        self._committed_rows = self._rows

    def close(self) -> None:
        """Nothing is open between two writes."""

    def _lines(self) -> Iterator[bytes]:
        return committed_lines(self._file.path, self._committed)

    def _damaged(self, number: int) -> DataError:
        return DataError(f"{self._file.path} was changed: line {number} is none of prompttune's rows")


class JsonLines(_TextRows):
    """A JSON object a line, UTF-8; see :func:`json_line`.

    Args:
        path: the file.
        labelled: whether there are true labels, which have columns of their own.
        state: of an earlier :meth:`commit`, to go on from; None begins a new file.

    Raises:
        DataError: the file is not what it was at that commit.
        OSError: it cannot be written.
    """

    def write(self, answer: Answer) -> None:
        """Add the rows of one input."""
        with self._taking:
            for row in answer.rows:
                self._append(json_line(row, self._labelled), 1)

    def rows(self) -> Iterator[Row]:
        """Every committed row, in order, exactly as it was written.

        Raises:
            DataError: the file was changed meanwhile.
        """
        for number, line in enumerate(self._lines(), 1):
            try:
                row = Row.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise self._damaged(number) from None
            yield row


class CsvRows(_TextRows):
    """CSV in UTF-8 with a header; see :func:`csv_lines`. Arguments and errors as of :class:`JsonLines`.

    Args:
        bom: begin the file with a byte order mark.
    """

    def __init__(self, path: Path, labelled: bool, state: Mapping[str, Any] | None, bom: bool = False) -> None:
        super().__init__(path, labelled, state)
        if state is None:
            self._append(csv_header(labelled, bom), 0)

    def write(self, answer: Answer) -> None:
        """Add the rows of one input."""
        with self._taking:
            self._append(csv_lines(answer.rows, self._labelled), len(answer.rows))

    def rows(self) -> Iterator[Row]:
        """Every committed row, in order; an empty cell is None, apart from the label where there is a probability.

        Raises:
            DataError: the file was changed meanwhile.
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
    """Rows to a stream that somebody reads while they come; it cannot be gone on with.

    Args:
        stream: where to; it is not closed.
        labelled: whether there are true labels.
        form: a JSON object a line, or CSV with a header.
        bom: begin CSV with a byte order mark.
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
        """Add the rows of one input.

        Raises:
            BrokenPipeError: nobody reads any more.
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
        """Flush; empty, since what was printed cannot be taken back."""
        self._stream.flush()
        return {}

    def finish(self) -> None:
        """Flush."""
        self._begin()
        self._stream.flush()

    def _begin(self) -> None:
        if not self._begun:
            self._stream.write(csv_header(self._labelled, self._bom))
            self._begun = True

    def close(self) -> None:
        """The stream stays open."""
