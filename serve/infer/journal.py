"""The record of a run: from where ``--resume`` goes on, and with what.

Every few seconds the sinks are committed, then the journal is replaced. In that order: a crash between the two leaves
sinks that hold more than the journal says, which is cut off when they are opened again and written once more. The other
way round it would name rows that nobody has. A ledger beside it has a line for each input that was answered and for
each part of an output that was written, so that a run goes on with the same inputs and outputs and with no others.
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
"""Version of the record."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come: what the sinks' last commit holds."""

    inputs: int = 0
    """Inputs whose rows are written."""
    chunks: int = 0
    rows: int = 0
    errors: int = 0
    """Inputs with an error in one of their rows."""
    ledger: int = 0
    """Bytes of the ledger that tell of them."""
    ended: int | None = None
    """The same after the outputs were finished; None unless the run ended in order."""
    sinks: tuple[Mapping[str, Any], ...] = ()
    """States of the sinks, in the order of the outputs; empty before the first commit."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What became of inputs that gave no row."""
    smoothing: Any = None
    """Plain values of a filter over frames."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a journal holds."""

    settings: Mapping[str, Any]
    progress: Progress = field(default_factory=Progress)
    finished: bool = False
    summary: Any = None
    """Of a finished run."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Compare with the settings of a run that is to go on.

        Raises:
            UsageError: they differ; the first that does is named with both values.
        """
        given = _plain(settings)
        for name in dict.fromkeys((*self.settings, *given)):
            before, now = self.settings.get(name), given.get(name)
            if before != now:
                raise UsageError(
                    f"cannot go on with other settings: {name} was {_shown(before)} and is {_shown(now)} now; "
                    "give the same, or begin again with --overwrite"
                )


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they come back from a file."""
    text = json.dumps(dict(settings), ensure_ascii=False).encode("utf-8", "replace")
    values: dict[str, Any] = json.loads(text)
    return values


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)


class Journal:
    """The record of a run beside its first output. Within ``with`` no other run can write it.

    Args:
        path: the file, ``<output>.journal.json``; nothing is touched before ``with``.
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
            UsageError: another run has it, or there can be no file.
        """
        self._lock.enter_context(locked(self.path.with_name(self.path.name.removesuffix(".journal.json"))))
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the lock."""
        self._open = False
        self._lock.close()

    def read(self) -> Record | None:
        """The record, None where there is none.

        Raises:
            DataError: it is damaged.
            UsageError: another version of prompttune wrote it.
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
        """Record a new run, over that of an earlier one.

        Args:
            settings: plain values that must be the same when it goes on.
        """
        self._lines = AppendedFile(self.ledger)
        self._replace(Record(_plain(settings)))

    def resume(self, settings: Mapping[str, Any]) -> Record:
        """The record of the run that is to go on with these settings; :meth:`go_on` comes next.

        Raises:
            UsageError: there is none, or its settings differ.
            DataError: it is damaged.
        """
        record = self.read()
        if record is None:
            raise UsageError(f"there is nothing to go on from: no record at {self.path}; leave out --resume")
        record.check(settings)
        return record

    def go_on(self) -> None:
        """Go on from the record, before anything of the outputs is touched: the run has not ended any more.

        Raises:
            DataError: the ledger is not what it was.
        """
        record = self._record or Record({})
        self._replace(Record(record.settings, replace(record.progress, ended=None)))
        self._lines = AppendedFile(self.ledger, record.progress.ledger)

    def note(self, line: bytes) -> None:
        """Take a line of the ledger; it counts from the next :meth:`write` on."""
        self._begun().append(line)

    def sync(self) -> int:
        """Bring the ledger to the disk; its size."""
        return self._begun().sync()

    def write(self, progress: Progress) -> None:
        """Record how far the run has come, once the sinks are committed.

        Raises:
            OSError: the file cannot be written; the record before stays.
        """
        self.end(replace(progress, ledger=self.sync()))

    def end(self, progress: Progress, finished: bool = False, summary: Any = None) -> None:
        """Record that the run has ended: after the sinks have finished and committed, before they are closed.

        Args:
            progress: all of it, with its places in the ledger.
            finished: no input is left.
            summary: plain values about the run.
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
