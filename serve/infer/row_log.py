"""The row log: one append-only file from which every output of a run can be written again.

Each line of JSON is the header (format and settings), an answered input (its trace and its rows), or a commit (the
progress and a checksum of the lines since the commit before). Lines after the last whole commit do not count: a resumed
run cuts them off and answers their inputs again. Outputs therefore need no recovery of their own.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prompttune.errors import DataError, UsageError
from prompttune.files import sync_folder
from prompttune.serve.infer.rows import InputAnswer, Row, json_text
from prompttune.serve.infer.traces import Trace

FORMAT = 3
_COMMIT = b'{"commit"'


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Progress of a run and of the runs that it resumes."""

    inputs: int = 0
    """Number of answered inputs."""
    rows: int = 0
    errors: int = 0
    """Number of inputs with an error in one of their rows."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Counts of inputs without a row."""
    smoothing: Any = None
    """State of the smoothing over frames, see :meth:`~prompttune.serve.infer.smoothing.Smoother.state`."""
    finished: bool = False
    """Whether every input was answered and every output written to its end."""


class RowLog:
    """The row log of a run; the caller holds the lock of the run's outputs.

    Args:
        path: the file ``<output>.rowlog``; nothing is written before :meth:`begin` or :meth:`resume`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.progress = RunProgress()
        """Progress at the last commit."""
        self._size = 0  # bytes up to the end of the last commit
        self._waiting: list[bytes] = []

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start the log of a new run, replacing that of an earlier one.

        Args:
            settings: plain values that must be the same when the run is resumed.
        """
        header = json_text({"format": FORMAT, "settings": settings}).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(b"")
        self._append(header)
        sync_folder(self.path.parent)

    def read(self, settings: Mapping[str, Any]) -> RunProgress:
        """Find the last commit of the run to resume; no file is changed.

        Raises:
            UsageError: the log does not exist, its settings differ, or another version of prompttune wrote it.
            DataError: the log is damaged.
        """
        try:
            with self.path.open("rb") as stream:
                _check_header(self.path, stream.readline(), settings)
                self._size = end = stream.tell()
                checksum = 0
                for line in stream:
                    end += len(line)
                    if not line.endswith(b"\n"):
                        break
                    if not line.startswith(_COMMIT):
                        checksum = zlib.crc32(line, checksum)
                        continue
                    commit = json.loads(line)
                    if commit["checksum"] != checksum:
                        break
                    self.progress, self._size, checksum = RunProgress(**commit["commit"]), end, 0
        except FileNotFoundError:
            raise UsageError(f"nothing to resume: {self.path} does not exist; leave out --resume") from None
        except (ValueError, KeyError, TypeError):  # a commit that a crash has cut: the one before it counts
            pass
        return self.progress

    def resume(self) -> None:
        """Cut off what follows the last commit, and record that the run is not finished."""
        self.commit(replace(self.progress, finished=False))

    def append(self, answers: Sequence[InputAnswer]) -> None:
        """Add answered inputs; they count from the next :meth:`commit` on."""
        for answer in answers:
            rows = [row.to_values() for row in answer.rows]
            self._waiting.append(json_text({"input": answer.trace, "rows": rows}).encode() + b"\n")

    def commit(self, progress: RunProgress) -> None:
        """Write everything to the disk.

        Raises:
            OSError: the file cannot be written; the previous commit stays.
        """
        block = b"".join(self._waiting)
        commit = json_text({"commit": asdict(progress), "checksum": zlib.crc32(block)}).encode() + b"\n"
        self._append(block + commit)
        self._waiting, self.progress = [], progress

    def _append(self, data: bytes) -> None:
        with self.path.open("r+b") as stream:
            stream.truncate(self._size)
            stream.seek(self._size)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        self._size += len(data)

    def answers(self) -> Iterator[InputAnswer]:
        """Every committed input, in order, without its picture."""
        for values in self._inputs():
            trace = None if values["input"] is None else Trace(*values["input"])
            yield InputAnswer(tuple(map(Row.from_values, values["rows"])), trace=trace)

    def rows(self) -> Iterator[Row]:
        """Every committed row, in order."""
        return (row for answer in self.answers() for row in answer.rows)

    def traces(self) -> Iterator[Trace]:
        """The traces of the committed inputs that have one."""
        return (Trace(*values["input"]) for values in self._inputs() if values["input"] is not None)

    def _inputs(self) -> Iterator[Any]:
        with self.path.open("rb") as stream:
            left = self._size - len(stream.readline())
            for line in stream:
                left -= len(line)
                if left < 0:
                    return
                if not line.startswith(_COMMIT):
                    yield json.loads(line)


def _check_header(path: Path, line: bytes, settings: Mapping[str, Any]) -> None:
    """Compare the settings of a log with those of a run that is to be resumed."""
    try:
        header = json.loads(line)
        version, recorded = header["format"], header["settings"]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"the row log {path} is damaged; begin again with --overwrite") from None
    if version != FORMAT:
        raise UsageError(
            f"another version of prompttune wrote {path} (format {version}): finish the run with that version, or "
            "begin again with --overwrite"
        )
    given = json.loads(json_text(settings))
    for name in dict.fromkeys((*recorded, *given)):
        before, now = recorded.get(name), given.get(name)
        if before != now:
            raise UsageError(
                f"cannot resume with other settings: {name} was {_shown(before)} and is {_shown(now)} now; "
                "give the same, or begin again with --overwrite"
            )


def _shown(value: Any) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)
