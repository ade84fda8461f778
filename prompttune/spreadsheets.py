"""CSV that spreadsheets show but do not run: text from outside, such as a file name, may look like a formula.

The rule is OWASP's (https://owasp.org/www-community/attacks/CSV_Injection): a quote mark before the text.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prompttune.files import replacing

BOM = "\ufeff"
"""Byte order mark that tells Excel that a file is UTF-8."""
# Full-width and small forms count as the signs themselves. If ; or a tab separates cells, a cell starts after it.
_FORMULA = "['\\s\0\ufeff]*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b]"
_UNGUARDED = re.compile(rf"(^|[;\t])(?={_FORMULA})")
_GUARDED = re.compile(rf"(^|[;\t])'(?={_FORMULA})")


def guarded(value: Any) -> Any:
    """A cell that spreadsheets do not treat as a formula; values other than text, such as numbers, are unchanged."""
    return _UNGUARDED.sub(r"\1'", value) if isinstance(value, str) else value


def restored(text: str) -> str:
    """The inverse of :func:`guarded`."""
    return _GUARDED.sub(r"\1", text)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV in UTF-8, atomically, with a column for each key; nothing is written without rows."""
    if not rows:
        return
    names = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerows([names, *([*_cells(row, names)] for row in rows)])


def _cells(row: Mapping[str, Any], names: Iterable[str]) -> Iterable[Any]:
    return (guarded(row.get(name, "")) for name in names)
