"""Standard input: a list of paths or JSON lines."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from prompttune.errors import DataError, first_line
from prompttune.serve.infer.items import BytesPayload, Item, Payload
from prompttune.serve.infer.settings import SourceSettings
from prompttune.serve.infer.sources.base import SourceContext, file_of, printable
from prompttune.serve.infer.sources.files import COMMENT
from prompttune.serve.infer.sources.labels import Labels
from prompttune.serve.infer.sources.waiting import Unbounded

NAME = "-"
LONGEST_LINE = 64 * 2**20
"""Longest JSON line, in bytes."""
LONGEST_PATH = 2**16
"""Longest line of a list, in bytes."""
BUFFER = 64
"""Largest number of waiting lines."""


def standard_input() -> BinaryIO:
    """Standard input through its own buffer.

    Python aborts if it exits while a thread still waits in ``sys.stdin``.

    Raises:
        DataError: standard input is closed.
    """
    try:
        return os.fdopen(os.dup(0), "rb")
    except OSError:
        raise DataError("standard input is closed") from None


class _Lines(Unbounded):
    """One item for each line that is not blank; ``row`` is the line's number, counted from 0."""

    form: ClassVar[str]
    """Value of ``--stdin``."""

    def __init__(self, stream: BinaryIO, limit: int | None, buffer: int, longest: int) -> None:
        super().__init__(buffer, "none", limit)
        self._stream = stream
        self._longest = longest

    @classmethod
    def takes(cls, name: str, settings: SourceSettings) -> bool:
        """See :class:`Source`."""
        return name == NAME and settings.stdin == cls.form

    @abstractmethod
    def _item(self, line: bytes, row: int) -> Item | None:
        """The item of a line; None for a blank line."""

    def _read(self) -> None:
        for row, line in enumerate(self._lines()):
            if self._stopping.is_set():
                return
            if line is None:
                self._waiting.put(Item(NAME, row=row, error=f"a line of more than {self._longest} bytes"))
            elif line.strip():
                item = self._item(line.removesuffix(b"\n").removesuffix(b"\r"), row)
                if item is not None:
                    self._waiting.put(item)

    def _lines(self) -> Iterator[bytes | None]:
        """Each line without a leading byte order mark; None for a line that is too long."""
        first = True
        while line := self._line():
            if len(line) > self._longest and not line.endswith(b"\n"):
                while (rest := self._line()) and not rest.endswith(b"\n"):
                    pass
                yield None
            else:
                yield line.removeprefix(b"\xef\xbb\xbf") if first else line
            first = False

    def _line(self) -> bytes:
        with reading():
            return self._stream.readline(self._longest + 1)


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Turn the errors of a broken or closed stream into a :class:`DataError`."""
    try:
        yield
    except (OSError, ValueError) as problem:  # ValueError: the stream is closed
        raise DataError(f"cannot read standard input: {first_line(problem)}") from problem


class ListReader(_Lines):
    """A list of image files, one path per line; ``source`` is the path.

    Lines have the form of a :class:`~prompttune.serve.infer.sources.files.ImageList`, but relative paths always start
    from the current folder.

    Args:
        stream: binary stream, such as :func:`standard_input`.
        labels: source of the true labels.
        limit: largest number of items.
        buffer: largest number of waiting items.
    """

    form = "list"

    def __init__(
        self, stream: BinaryIO, *, labels: Labels | None = None, limit: int | None = None, buffer: int = BUFFER
    ) -> None:
        super().__init__(stream, limit, buffer, longest=LONGEST_PATH)
        self._labels = labels

    @classmethod
    def open(cls, name: str, context: SourceContext) -> ListReader:  # noqa: ARG003
        """See :class:`Source`."""
        return cls(context.stdin(), labels=context.settings.truth, limit=context.settings.limit)

    def _item(self, line: bytes, row: int) -> Item | None:
        written = os.fsdecode(line)
        if written.startswith(COMMENT):
            return None
        if "\0" in written:
            shown = written.replace("\0", "")
            return Item(
                printable(shown), row=row, error="the line holds a zero byte: write one path per line, in UTF-8"
            )
        payload, error = file_of(Path(), written)
        target = self._labels.of(payload.path, written=written) if self._labels and payload else None
        return Item(printable(written), payload, row, target=target, error=error)


class JsonReader(_Lines):
    """JSON lines: one object with an image per line.

    An object has ``path`` (a file) or ``image`` (an encoded image in base64, also as a ``data:`` URL). It may have
    ``id`` (a text or a number, which becomes ``source``), the task of this image, and its true label. Without ``id``
    the path is the ``source``. A line that is not such an object gives an item with an error.

    Args:
        stream: binary stream, such as :func:`standard_input`.
        label_key: key of the true label; None without labels.
        task_key: key of the task.
        limit: largest number of items.
        buffer: largest number of waiting items; their images are in memory.
        longest: longest line, in bytes.
    """

    form = "jsonl"
    has_columns = True

    def __init__(
        self,
        stream: BinaryIO,
        *,
        label_key: str | None = None,
        task_key: str = "task",
        limit: int | None = None,
        buffer: int = BUFFER,
        longest: int = LONGEST_LINE,
    ) -> None:
        super().__init__(stream, limit, buffer, longest)
        self._label_key = label_key
        self._task_key = task_key

    @classmethod
    def open(cls, name: str, context: SourceContext) -> JsonReader:  # noqa: ARG003
        """See :class:`Source`."""
        settings = context.settings
        return cls(
            context.stdin(),
            label_key=settings.label_column,
            task_key=settings.task_column or "task",
            limit=settings.limit,
        )

    def _item(self, line: bytes, row: int) -> Item:
        source, task, target = NAME, None, None
        try:
            values = _object(line)
            path = values.get("path")
            source = _word(values, "id") or (_writable(path) if isinstance(path, str) else NAME)
            task = _word(values, self._task_key)
            target = None if self._label_key is None else _word(values, self._label_key)
            return Item(source, _payload(values), row, task=task, target=target)
        except _LineError as problem:
            return Item(source, row=row, task=task, target=target, error=str(problem))


class _LineError(Exception):
    """Error in a line."""


def _object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise _LineError(f"not JSON: {first_line(problem)}") from None
    if not isinstance(values, dict):
        raise _LineError("not a JSON object")
    return values


def _word(values: dict[str, Any], key: str) -> str | None:
    """A text or a number as text; None if the key is missing."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _LineError(f"{key} is neither a text nor a number")
    return _writable(str(value))


def _writable(text: str) -> str:
    """A text that every output can hold; JSON can express code points that UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()


def _payload(values: dict[str, Any]) -> Payload:
    path, image = values.get("path"), values.get("image")
    if (path is None) == (image is None):
        raise _LineError("needs either path or image")
    if path is not None:
        if not isinstance(path, str):
            raise _LineError("path is not a text")
        file, error = file_of(Path(), path)
        if file is None:
            raise _LineError(str(error))
        return file
    if not isinstance(image, str):
        raise _LineError("image is not base64 text")
    if image.startswith("data:"):
        image = image.partition(",")[2]
    try:
        return BytesPayload(base64.b64decode(image, validate=True))
    except (binascii.Error, ValueError):
        raise _LineError("image is not base64") from None
