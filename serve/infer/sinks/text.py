"""Rows as text: JSON lines and CSV, to a file or to standard output."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, TextIO

from prompttune.serve.infer.rows import COLUMNS, LABELLED_COLUMNS, InputAnswer, Row, escaped, json_text
from prompttune.serve.infer.sinks.base import Sink, SinkSettings
from prompttune.spreadsheets import BOM, guarded

_OURS = {"source", "task", "task_version"}
_CSV_END = "\r\n"
"""Line end for the csv writer only: it quotes the characters of its line end, and a cell may hold either of them."""


def json_lines(rows: Sequence[Row], labelled: bool) -> str:
    """Rows as lines of JSON."""
    return "".join(json_text(row.to_dict(labelled)) + "\n" for row in rows)


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


def csv_header(settings: SinkSettings) -> str:
    """The header line, after a byte order mark if the settings ask for it."""
    return BOM * settings.csv_bom + ",".join(LABELLED_COLUMNS if settings.labelled else COLUMNS) + "\n"


class _TextFile(Sink):
    """A text file in UTF-8."""

    def __init__(self, path: Path, settings: SinkSettings) -> None:
        self._labelled = settings.labelled
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("w", encoding="utf-8", newline="")

    def write(self, answer: InputAnswer) -> None:
        """Write the rows of one input."""
        self._stream.write(self._text(answer.rows))

    def _text(self, rows: Sequence[Row]) -> str:
        raise NotImplementedError

    def flush(self) -> None:
        """Pass the rows to the operating system."""
        self._stream.flush()

    def finish(self) -> None:
        """Write the rows to the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    @classmethod
    def foreign_file(cls, path: Path) -> Path | None:
        """The file itself if its first line does not have the columns of rows."""
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            line = stream.readline(2**20)
        try:
            columns = set(json.loads(line)) if line.startswith("{") else set(next(csv.reader([line]), ()))
        except (ValueError, csv.Error):
            columns = set()
        return None if not line or columns >= _OURS else path


class JsonLines(_TextFile):
    """One JSON object per line; see :func:`json_lines`."""

    content = "JSON lines"
    suffixes = (".jsonl", ".ndjson")
    writes: ClassVar = ("predict", "segment")

    def _text(self, rows: Sequence[Row]) -> str:
        return json_lines(rows, self._labelled)


class CsvRows(_TextFile):
    """CSV with a header; see :func:`csv_lines`."""

    content = "CSV"
    suffixes = (".csv",)

    def __init__(self, path: Path, settings: SinkSettings) -> None:
        super().__init__(path, settings)
        self._stream.write(csv_header(settings))

    def _text(self, rows: Sequence[Row]) -> str:
        return csv_lines(rows, self._labelled)


class StandardOutput(Sink):
    """Rows to a stream whose reader sees them at once.

    Args:
        stream: output stream, which stays open.
        settings: settings of the run.
        form: JSON lines, or CSV with a header.
    """

    def __init__(self, stream: TextIO, settings: SinkSettings, form: Literal["jsonl", "csv"] = "jsonl") -> None:
        self._stream = stream
        self._labelled = settings.labelled
        self._form = form
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._header = csv_header(settings) if form == "csv" else ""

    def write(self, answer: InputAnswer) -> None:
        """Write the rows of one input.

        Raises:
            BrokenPipeError: the reader has closed the pipe.
        """
        self._begin()
        if self._form == "csv":
            text = escaped(csv_lines(answer.rows, self._labelled), self._encoding)
        else:
            # JSON has the same escapes as Python's backslashreplace up to U+FFFF, but not beyond
            lines = (json_lines([row], self._labelled) for row in answer.rows)
            text = "".join(line if self._holds(line) else json.dumps(json.loads(line)) + "\n" for line in lines)
        self._stream.write(text)

    def _holds(self, line: str) -> bool:
        return line.isascii() or escaped(line, self._encoding) == line

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def finish(self) -> None:
        """Flush the stream, which has a header even without rows."""
        self._begin()
        self._stream.flush()

    def _begin(self) -> None:
        header, self._header = self._header, ""
        self._stream.write(header)
