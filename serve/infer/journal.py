"""The record of a run: the place and the settings from which ``--resume`` continues.

Every few seconds the sinks are committed, then the journal is replaced. A crash between the two leaves sinks that hold
more than the journal lists; the excess is cut off when they are opened again and is written once more. The other order
would list rows that no sink has. A ledger beside the journal has a line for each answered input and for each written
part of an output, so that a run resumes with the same inputs and outputs only.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from prompttune.errors import DataError, UsageError
from prompttune.files import locked, read_json, write_json
from prompttune.serve.infer.sinks.appended import AppendedFile

FORMAT = 2
"""Version of the record's format."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a run: the content of the sinks' last commit."""

    inputs: int = 0
    """Number of inputs whose rows are written."""
    chunks: int = 0
    rows: int = 0
    errors: int = 0
    """Number of inputs with an error in one of their rows."""
    ledger: int = 0
    """Bytes of the ledger that belong to them."""
    ended: int | None = None
    """Bytes of the ledger after the outputs were finished; None unless the run ended in order."""
    sinks: tuple[Mapping[str, Any], ...] = ()
    """States of the sinks, in the order of the outputs; empty before the first commit."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts of inputs without a row."""
    smoothing: Any = None
    """State of the smoothing over frames, as plain values."""


@dataclass(frozen=True, slots=True)
class Record:
    """Content of a journal."""

    settings: Mapping[str, Any]
    progress: Progress = field(default_factory=Progress)
    finished: bool = False
    summary: Any = None
    """Summary of a finished run."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Compare with the settings of a run that is to be resumed.

        Raises:
            UsageError: the settings differ; the message names the first difference with both values.
        """
        given = _plain(settings)
        for name in dict.fromkeys((*self.settings, *given)):
            before, now = self.settings.get(name), given.get(name)
            if before != now:
                raise UsageError(
                    f"cannot resume with other settings: {name} was {_shown(before)} and is {_shown(now)} now; "
                    "give the same, or begin again with --overwrite"
                )


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they are read back from a file."""
    text = json.dumps(dict(settings), ensure_ascii=False).encode("utf-8", "replace")
    values: dict[str, Any] = json.loads(text)
    return values


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)


class Journal:
    """The record of a run beside its first output. Within ``with`` it is locked against other runs.

    Args:
        path: the file ``<output>.journal.json``; nothing is written before ``with``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = path.with_name(f"{path.name.removesuffix('.json')}.ledger")
        self._lines: AppendedFile | None = None
        self._lock = contextlib.ExitStack()
        self._open = False
        self._record: Record | None = None

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            UsageError: another run holds the lock, or the file cannot be created.
        """
        self._lock.enter_context(locked(self.path.with_name(self.path.name.removesuffix(".journal.json"))))
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self._open = False
        self._lock.close()

    def read(self) -> Record | None:
        """Read the record; None if the file does not exist.

        Raises:
            DataError: the record is damaged.
            UsageError: another version of prompttune wrote the record.
        """
        if not self.path.exists():
            return None
        values = read_json(self.path, DataError, "record of the run")
        if isinstance(version := values.pop("format", None), int) and version != FORMAT:
            raise UsageError(
                f"{'a later' if version > FORMAT else 'an earlier'} version of prompttune wrote {self.path} "
                f"(format {version}): finish the run with that version, or begin again with --overwrite"
            )
        try:
            progress = dict(values.pop("progress"))
            self._record = Record(progress=Progress(**{**progress, "sinks": tuple(progress["sinks"])}), **values)
        except (KeyError, TypeError, ValueError) as problem:
            raise DataError(f"the record of the run {self.path} is damaged: {problem!r}; use --overwrite") from None
        return self._record

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Record a new run, replacing the record of an earlier one.

        Args:
            settings: plain values that must be the same when the run is resumed.
        """
        self._lines = AppendedFile(self.ledger)
        self._replace(Record(_plain(settings)))

    def resume(self, settings: Mapping[str, Any]) -> Record:
        """Read the record of the run to resume with these settings. Call :meth:`go_on` next.

        Raises:
            UsageError: the record does not exist, or its settings differ.
            DataError: the record is damaged.
        """
        record = self.read()
        if record is None:
            raise UsageError(f"nothing to resume: {self.path} does not exist; leave out --resume")
        record.check(settings)
        return record

    def go_on(self) -> None:
        """Mark the run as not ended and resume from the record. Call it before any output is changed.

        Raises:
            DataError: the ledger was changed.
        """
        record = self._record or Record({})
        self._replace(Record(record.settings, replace(record.progress, ended=None)))
        self._lines = AppendedFile(self.ledger, record.progress.ledger)

    def note(self, line: bytes) -> None:
        """Add a line to the ledger; it counts from the next :meth:`write` on."""
        self._begun().append(line)

    def sync(self) -> int:
        """Write the ledger to the disk; return its size in bytes."""
        return self._begun().sync()

    def write(self, progress: Progress) -> None:
        """Record the progress, after the sinks are committed.

        Raises:
            OSError: the file cannot be written; the previous record stays.
        """
        self.end(replace(progress, ledger=self.sync()))

    def end(self, progress: Progress, finished: bool = False, summary: Any = None) -> None:
        """Record the end of the run, after the sinks are finished and committed and before they are closed.

        Args:
            progress: final progress, with its positions in the ledger.
            finished: whether every input was answered.
            summary: plain values that describe the run.
        """
        self._begun()
        self._replace(Record((self._record or Record({})).settings, progress, finished, summary))

    def _begun(self) -> AppendedFile:
        if self._lines is None:
            raise RuntimeError("begin() or go_on() comes first")
        self._lines.new_parts()
        return self._lines

    def _replace(self, record: Record) -> None:
        if not self._open:
            raise RuntimeError("a journal is written within its with statement")
        write_json(self.path, {"format": FORMAT, **asdict(record)})
        self._record = record
