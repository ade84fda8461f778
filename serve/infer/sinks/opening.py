"""From the names in ``--output`` to sinks: the kind of each output, and what already exists at its path."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

from prompttune.errors import UsageError
from prompttune.files import visible
from prompttune.serve.infer.settings import STANDARD_OUTPUTS
from prompttune.serve.infer.settings import journal_path as journal_path
from prompttune.serve.infer.sinks.base import Sink
from prompttune.serve.infer.sinks.text import CsvRows, JsonLines, StandardOutput
from prompttune.serve.infer.work import TaskFacts

KNOWN = (
    "- (standard output, JSON lines), csv:- (standard output, CSV), .jsonl or .ndjson, .csv, "
    "a folder of Parquet files (its name ends in / or .parquet), .mp4, .mov, .mkv, .avi or .webm (annotated video), "
    ".png, .jpg or .jpeg (contact sheets)"
)
"""List of outputs for messages and help texts."""
_OURS = {"source", "task", "task_version"}

State = Mapping[str, Any]


@dataclass(frozen=True)
class _Settings:
    labelled: bool
    rate: Fraction | float | None
    tasks: Mapping[str, TaskFacts] | None = None
    csv_bom: bool = False


@dataclass(frozen=True)
class _Kind:
    """A kind of file output. Its functions import the libraries that it needs."""

    suffixes: tuple[str, ...]
    open: Callable[[Path, _Settings, State | None], Sink]
    foreign: Callable[[Path], Path | None]
    """Finds a file at or below the path that prompttune did not write."""
    clear: Callable[[Path], None]
    """Removes files of an earlier run that a new run would not replace."""
    standing: Callable[[Path], bool] = os.path.lexists
    """Tells whether something exists at the path."""
    resumable: bool = True


def _foreign_text(path: Path) -> Path | None:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        line = stream.readline(2**20)
    try:
        columns = set(json.loads(line)) if line.startswith("{") else set(next(csv.reader([line]), ()))
    except (ValueError, csv.Error):
        columns = set()
    return None if not line or columns >= _OURS else path


def _foreign_video(path: Path) -> Path | None:
    from prompttune.serve.infer.sinks.video import is_annotated

    return None if is_annotated(path) else path


def _foreign_in_folder(path: Path) -> Path | None:
    from prompttune.serve.infer.sinks.parquet_folder import foreign_file

    return foreign_file(path)


def _foreign_page(path: Path) -> Path | None:
    from prompttune.serve.infer.sinks.sheet import is_page, pages

    return next((page for page in pages(path) if not is_page(page)), None)


def _has_entries(path: Path) -> bool:
    return any(visible(path)) if path.is_dir() else os.path.lexists(path)


def _has_pages(path: Path) -> bool:
    from prompttune.serve.infer.sinks.sheet import pages

    return any(True for _ in pages(path))


def _clear_folder(path: Path) -> None:
    from prompttune.serve.infer.sinks.parquet_folder import clear

    clear(path)


def _clear_pages(path: Path) -> None:
    from prompttune.serve.infer.sinks.sheet import clear

    clear(path)


def _open_parquet(path: Path, settings: _Settings, state: State | None) -> Sink:
    from prompttune.serve.infer.sinks.parquet import ParquetParts

    return ParquetParts(path, settings.labelled, state)


def _open_video(path: Path, settings: _Settings, state: State | None) -> Sink:
    from prompttune.serve.infer.sinks.video import AnnotatedVideo

    return AnnotatedVideo(path, settings.rate, state)


def _open_sheet(path: Path, settings: _Settings, state: State | None) -> Sink:  # noqa: ARG001
    from prompttune.serve.infer.sinks.sheet import ContactSheet

    return ContactSheet(path, state)


def _foreign_overlay(path: Path) -> Path | None:
    from prompttune.serve.infer.sinks.overlays import foreign_file

    return foreign_file(path)


def _clear_overlays(path: Path) -> None:
    from prompttune.serve.infer.sinks.overlays import clear

    clear(path)


def _open_overlays(path: Path, settings: _Settings, state: State | None) -> Sink:
    from prompttune.serve.infer.sinks.overlays import OverlayFolder

    return OverlayFolder(path, settings.tasks or {}, state)


def _nothing(path: Path) -> None:
    """Do nothing: opening the file empties it."""


_FOLDER = _Kind((".parquet",), _open_parquet, _foreign_in_folder, _clear_folder, _has_entries)
_KINDS = (
    _Kind((".jsonl", ".ndjson"), lambda p, s, state: JsonLines(p, s.labelled, state), _foreign_text, _nothing),
    _Kind((".csv",), lambda p, s, state: CsvRows(p, s.labelled, state, s.csv_bom), _foreign_text, _nothing),
    _FOLDER,
    _Kind((".mp4", ".mov", ".mkv", ".avi", ".webm"), _open_video, _foreign_video, _nothing, resumable=False),
    _Kind((".png", ".jpg", ".jpeg"), _open_sheet, _foreign_page, _clear_pages, _has_pages),
)


_OVERLAYS = _Kind((), _open_overlays, _foreign_overlay, _clear_overlays, _has_entries)
_FOLDERS = (_FOLDER, _OVERLAYS)
KNOWN_OF_SEGMENTATION = "- (standard output, JSON lines), .jsonl or .ndjson, a folder of overlays (its name ends in /)"


def _kind_of(output: str, segments: bool) -> _Kind:
    """The kind of a file output, for segmentations or for classifications."""
    if not segments:
        return _kind(output)
    if output.endswith(("/", os.sep)):
        return _OVERLAYS
    if Path(output).suffix.lower() in _KINDS[0].suffixes:
        return _KINDS[0]
    raise UsageError(f"a segmentation cannot be written to {output!r}; known: {KNOWN_OF_SEGMENTATION}")


def _kind(output: str) -> _Kind:
    if output.endswith(("/", os.sep)):
        return _FOLDER
    suffix = Path(output).suffix.lower()
    for kind in _KINDS:
        if suffix in kind.suffixes:
            return kind
    hint = " (for one object a line write .jsonl)" if suffix == ".json" else ""
    raise UsageError(f"cannot tell what to write to {output!r}{hint}; known: {KNOWN}")


def check_outputs(
    outputs: Sequence[str], *, overwrite: bool = False, resume: bool = False, segments: bool = False
) -> None:
    """Refuse outputs that cannot be written; no file is changed.

    Args:
        outputs: see :func:`open_sinks`.
        overwrite: whether files of an earlier run may be replaced.
        resume: whether to resume from existing outputs.
        segments: whether the tasks are segmentations.

    Raises:
        UsageError: an output is of an unknown kind, is given twice, lies in another one, exists already, was not
            written by prompttune, or cannot be resumed.
        MissingExtraError: the library that reads an output to be replaced is not installed.
    """
    if sum(output in STANDARD_OUTPUTS for output in outputs) > 1:
        raise UsageError("standard output is given twice: leave one out")
    if segments and "csv:-" in outputs:
        raise UsageError(f"a segmentation cannot be written to 'csv:-'; known: {KNOWN_OF_SEGMENTATION}")
    files = [output for output in outputs if output not in STANDARD_OUTPUTS]
    kinds = [_kind_of(output, segments) for output in files]
    _check_apart(files)
    for output, kind in zip(files, kinds, strict=True):
        path = Path(output)
        if kind not in _FOLDERS and path.is_dir():
            raise UsageError(f"{output} is a folder; known outputs: {KNOWN}")
        if kind in _FOLDERS and path.exists() and not path.is_dir():
            what = "Parquet files" if kind is _FOLDER else "overlays"
            raise UsageError(f"{output} is a file: {what} are written into a folder; choose another name")
        if resume and not kind.resumable:
            raise UsageError(f"{output} cannot be resumed: a video is made in one run; give --overwrite")
        if resume or not kind.standing(path):
            continue
        if not overwrite:
            raise UsageError(f"{output} exists: choose another output, or give --overwrite or --resume")
        _check_ours(path, kind)


def check_unfinished(outputs: Sequence[str], states: Sequence[State]) -> None:
    """Refuse a finished output that cannot take further inputs; no file is changed.

    Raises:
        UsageError: the output is a contact sheet in JPEG, whose last page would lose detail each time.
    """
    for output, state in zip(outputs, states, strict=False):
        path = Path(output)
        if path.suffix.lower() in (".jpg", ".jpeg") and state.get("tiles"):
            from prompttune.serve.infer.sinks.sheet import unfinished_folder

            if not unfinished_folder(path).is_dir():
                raise UsageError(
                    f"{output} is finished and JPEG pages take no further inputs: choose a .png, or begin again with "
                    "--overwrite"
                )


def _check_apart(outputs: Sequence[str]) -> None:
    seen: dict[Path, str] = {}
    for output in outputs:
        path = Path(output).resolve()
        if path in seen:
            raise UsageError(f"{output} is given twice as an output")
        seen[path] = output
    for path, output in seen.items():
        for folder in path.parents:
            if folder in seen:
                raise UsageError(f"{output} is inside the output {seen[folder]}: choose another place")


def _check_ours(path: Path, kind: _Kind) -> None:
    foreign = kind.foreign(path)
    if foreign is not None:
        raise UsageError(f"{foreign} was not written by prompttune, so --overwrite leaves it: choose another output")


def open_sinks(
    outputs: Sequence[str],
    *,
    labelled: bool,
    overwrite: bool,
    states: Sequence[Mapping[str, Any]] | None,
    stdout: TextIO,
    rate: Fraction | float | None = None,
    tasks: Mapping[str, TaskFacts] | None = None,
    csv_bom: bool = False,
) -> list[Sink]:
    """Open a sink for each output.

    Args:
        outputs: names of the outputs, see :data:`KNOWN`.
        labelled: whether there are true labels.
        overwrite: whether to replace files of an earlier run; other files are never replaced.
        states: states of the sinks at the last recorded commit, in the order of ``outputs``, to resume from; empty if
            an interrupted run recorded none, which then starts again over its own files. None for a new run.
        stdout: the standard output.
        rate: frames per second of a video, for inputs without timestamps.
        tasks: facts about the tasks if they are segmentations, else None.
        csv_bom: whether CSV starts with a byte order mark.

    Raises:
        UsageError: see :func:`check_outputs`; or an output cannot be opened.
        DataError: an output was changed after that commit.
        MissingExtraError: a library that an output needs is not installed.
    """
    resume = bool(states)
    afresh = states is not None and not resume
    check_outputs(outputs, overwrite=overwrite or afresh, resume=resume, segments=tasks is not None)
    if resume and states is not None and len(states) != len(outputs):
        raise UsageError(f"the interrupted run had {len(states)} outputs, not {len(outputs)}: give the same ones")
    settings = _Settings(labelled, rate, tasks, csv_bom)
    begun: list[State | None] = list(states) if states else [None] * len(outputs)
    sinks: list[Sink] = []
    try:
        for output, state in zip(outputs, begun, strict=True):
            sinks.append(_open(output, settings, state, stdout))
    except BaseException:
        for sink in sinks:
            sink.close()
        raise
    return sinks


def _open(output: str, settings: _Settings, state: State | None, stdout: TextIO) -> Sink:
    if output in STANDARD_OUTPUTS:
        return StandardOutput(stdout, settings.labelled, STANDARD_OUTPUTS[output], settings.csv_bom)
    kind, path = _kind_of(output, settings.tasks is not None), Path(output)
    try:
        if state is None:
            kind.clear(path)
        return kind.open(path, settings, state)
    except OSError as problem:
        raise UsageError(f"cannot write {output}: {problem.strerror or problem}") from problem
