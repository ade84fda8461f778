"""Text files that name images: their encoding, the rows of CSV, and words for a missing label."""

from __future__ import annotations

import codecs
import csv
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prompttune.errors import DataError, first_line
from prompttune.spreadsheets import restored

PATH_COLUMN, LABEL_COLUMN, SPLIT_COLUMN = "path", "label", "split"
MISSING = frozenset({"", "nan", "none", "null", "<na>"})
"""Words for a missing label in tables, in any case."""
HEAD = 4096
"""Number of bytes to inspect for UTF-16."""


def nfc(text: str) -> str:
    """Unicode's form NFC of a name, for comparison: macOS stores an accent apart from its letter."""
    return unicodedata.normalize("NFC", text)


def text_lines(file: Path, what: str, *, any_bytes: bool = False) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark, with any line end.

    Args:
        file: the file.
        what: name of the file's kind in messages, such as ``the list``.
        any_bytes: keep bytes that are not UTF-8 as surrogates, since file names may hold any bytes.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: the file cannot be read or has another encoding; the message names the line.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD)
        # every second byte of Western text in UTF-16 is zero
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head.count(0) > len(head) // 4:
            raise DataError(f"{what} {file} is in UTF-16: save it as UTF-8")
        with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if "\0" in line:
                    raise DataError(f"{what} {file} line {number} holds a zero byte: save it as text in UTF-8")
                if not any_bytes and not is_text(line):
                    raise DataError(f"{what} {file} line {number} is not in UTF-8: save it as UTF-8")
                yield line.removesuffix("\n")
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise DataError(f"cannot read {what} {file}: {problem.strerror or first_line(problem)}") from None


def is_text(name: str) -> bool:
    """Whether a name is valid text rather than bytes of another encoding."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_of(value: object) -> str | None:
    """A cell or a JSON value as a label or a task; None if it is missing or empty.

    A whole number is written without a fraction, because tables store integer columns with gaps as floating point.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    elif isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    return None if value is None or value == "" else str(value)


def csv_rows(file: Path, what: str, dialect: str = "excel") -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row, the header first; spaces around a cell are dropped and blank lines skipped.

    A quote mark that :func:`~prompttune.spreadsheets.guarded` put before a formula is removed.

    A cell must not hold a line break: an unclosed quote would swallow the rows after it.

    Raises:
        FileNotFoundError, DataError: see :func:`text_lines`; also for unbalanced quotes.
    """
    reader = csv.reader(text_lines(file, what), dialect, strict=True)
    while True:
        line = reader.line_num + 1
        where = f"{what} {file} line {line}"
        try:
            cells = next(reader, None)
        except csv.Error as problem:
            if reader.line_num == line and "limit" in str(problem):
                raise DataError(
                    f"{where}: a cell of more than {csv.field_size_limit()} characters: {NO_BASE64}"
                ) from None
            raise DataError(f"{where}: the quotes do not match ({problem}); close the quote that opens there") from None
        if cells is None:
            return
        if reader.line_num > line:
            raise DataError(
                f"{where}: the quote that opens there closes on line {reader.line_num}; a cell holds no line break"
            )
        if cells:
            yield line, [restored(cell.strip()) for cell in cells]


def misfit(cells: list[str], width: int) -> str | None:
    """The error in the number of a row's cells; empty cells at the end are ignored.

    A missing or additional comma moves the other cells to a wrong column.
    """
    if len(cells) >= width and not any(cells[width:]):
        return None
    return f"has {len(cells)} cells and the header {width}; put quotes around a cell with a comma"


NO_BASE64 = "images in base64 are not read from there; write paths, or store the bytes of the images in Parquet"
_BASE64 = re.compile(
    r"data:.*|(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/=\s]{32,}|[A-Za-z0-9+/=\s]{256,}", re.DOTALL
)


def is_base64(text: str) -> bool:
    """Whether a path cell holds an encoded image: paths of this length have a dot, a dash or an underscore."""
    return _BASE64.fullmatch(text) is not None


@dataclass(frozen=True)
class LabelledRow:
    """A row of a table of labels."""

    line: int
    path: str
    label: str | None
    """In Unicode's form NFC; None for a word of :data:`MISSING`."""
    written: str
    """The label as written."""
    split: str | None
    """Name of the split; None if the table does not have this column."""


def labelled_rows(file: Path, what: str) -> Iterator[LabelledRow]:
    """The rows of a CSV file whose header has ``path``, ``label`` and optionally ``split``; other columns are ignored.

    Raises:
        FileNotFoundError: the file does not exist.
        DataError: the file cannot be read or lacks a column, or a line has too many or too few cells or no path.
    """
    rows = csv_rows(file, what)
    _, header = next(rows, (1, []))
    names = [name.casefold() for name in header]
    wanted = [name for name in (PATH_COLUMN, LABEL_COLUMN, SPLIT_COLUMN) if name in names or name != SPLIT_COLUMN]
    if missing := [name for name in wanted if name not in names]:
        raise DataError(f"{what} {file} line 1: no column {' and '.join(missing)}{_other(header)}; "
                        "the header must be path,label or path,label,split")  # fmt: skip
    if double := next((name for name in wanted if names.count(name) > 1), None):
        raise DataError(f"{what} {file} line 1: {names.count(double)} columns are called {double}")
    for line, cells in rows:
        if not any(cells):
            continue
        where = f"{what} {file} line {line}"
        if problem := misfit(cells, len(header)):
            raise DataError(f"{where} {problem}")
        path, label, *split = (cells[names.index(name)] for name in wanted)
        if not path:
            raise DataError(f"{where}: no path")
        if is_base64(path):
            raise DataError(f"{where}: the column path holds base64 text: {NO_BASE64}")
        known = None if label.casefold() in MISSING else nfc(label)
        yield LabelledRow(line, path, known, label, split[0] if split else None)


def _other(header: list[str]) -> str:
    """Hint for a header that lacks a required column."""
    return separated(header) or f" (columns: {', '.join(header[:5]) or 'none'})"


def separated(header: list[str]) -> str:
    """Hint for a header of one cell whose columns are separated by another character than a comma; else empty."""
    for name, sign in (("semicolons", ";"), ("tabs", "\t")):
        if len(header) == 1 and sign in header[0]:
            return f", and its columns are separated by {name}: save it with commas"
    return ""
