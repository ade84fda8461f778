"""From the names in ``--output`` to sinks: the kind of each output, and what already exists at its path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from prompttune.errors import UsageError
from prompttune.files import visible
from prompttune.serve.infer.settings import STANDARD_OUTPUTS, row_log_path
from prompttune.serve.infer.sinks import SINKS, Sink, SinkSettings
from prompttune.serve.infer.sinks.base import FOLDER
from prompttune.serve.infer.sinks.text import StandardOutput
from prompttune.task_types import TaskType

_TAKEN = "{} exists: choose another output, or give --overwrite or --resume"


def _writes(sink: type[Sink], task_type: TaskType) -> bool:
    return any(map(task_type.takes, sink.writes))


def _known(task_type: TaskType) -> str:
    """List of outputs for messages."""
    csv = ", csv:- (standard output, CSV)" if task_type.takes("predict") else ""
    kinds = (f"{' '.join(one.suffixes)} ({one.content})" for one in SINKS.values() if _writes(one, task_type))
    return f"- (standard output, JSON lines){csv}, {', '.join(kinds)}"


def _kind(output: str, task_type: TaskType) -> type[Sink]:
    """The kind of a file output."""
    suffix = FOLDER if output.endswith((FOLDER, os.sep)) else Path(output).suffix.lower()
    kinds = [sink for sink in SINKS.values() if suffix in sink.suffixes]
    for sink in reversed(kinds):
        if _writes(sink, task_type):
            return sink
    if kinds:
        raise UsageError(f"a {task_type.name} cannot be written to {output!r}; known: {_known(task_type)}")
    hint = " (for one object a line write .jsonl)" if suffix == ".json" else ""
    raise UsageError(f"cannot tell what to write to {output!r}{hint}; known: {_known(task_type)}")


def check_outputs(
    outputs: Sequence[str], task_type: TaskType, *, overwrite: bool = False, resume: bool = False
) -> None:
    """Refuse outputs that cannot be written; no file is changed.

    Args:
        outputs, task_type: see :func:`open_sinks`.
        overwrite: whether files of an earlier run may be replaced.
        resume: whether a run is resumed, whose outputs may exist.

    Raises:
        UsageError: an output is of an unknown kind, is given twice, lies in another one, exists already, was not
            written by prompttune, or cannot be resumed.
        MissingExtraError: the library that reads an output to be replaced is not installed.
    """
    if sum(output in STANDARD_OUTPUTS for output in outputs) > 1:
        raise UsageError("standard output is given twice: leave one out")
    if not task_type.takes("predict") and "csv:-" in outputs:
        raise UsageError(f"a {task_type.name} cannot be written to 'csv:-'; known: {_known(task_type)}")
    files = [output for output in outputs if output not in STANDARD_OUTPUTS]
    kinds = [_kind(output, task_type) for output in files]
    _check_apart(files)
    for output, kind in zip(files, kinds, strict=True):
        path, is_folder = Path(output), FOLDER in kind.suffixes
        if not is_folder and path.is_dir():
            raise UsageError(f"{output} is a folder; known outputs: {_known(task_type)}")
        if is_folder and path.exists() and not path.is_dir():
            raise UsageError(f"{output} is a file, and {kind.content} need a folder: choose another name")
        if resume and not kind.resumable:
            raise UsageError(f"{output} cannot be resumed: a video is made in one run; give --overwrite")
        if not (any(visible(path)) if path.is_dir() else os.path.lexists(path)):
            continue
        if not overwrite and not resume:
            raise UsageError(_TAKEN.format(output))
        if (foreign := kind.foreign_file(path)) is not None:
            given = "--resume" if resume else "--overwrite"
            raise UsageError(f"{foreign} was not written by prompttune, so {given} leaves it: choose another output")
    log = row_log_path(outputs)
    if log is not None and log.exists() and not overwrite and not resume:
        raise UsageError(_TAKEN.format(log))


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


def open_sinks(
    outputs: Sequence[str], task_type: TaskType, settings: SinkSettings, *, stdout: TextIO, resume: bool
) -> tuple[list[Sink], list[Sink]]:
    """Open a sink for each output that :func:`check_outputs` accepts.

    Args:
        outputs: names of the outputs.
        task_type: type of the engine's tasks.
        settings: settings of the sinks.
        stdout: the standard output.
        resume: whether the answers of earlier runs follow, so that their files stay.

    Returns:
        The sinks of files and folders, and that of standard output.

    Raises:
        UsageError: an output cannot be opened.
        MissingExtraError: a library that an output needs is not installed.
    """
    files: list[Sink] = []
    printed: list[Sink] = []
    try:
        for output in outputs:
            if output in STANDARD_OUTPUTS:
                printed.append(StandardOutput(stdout, settings, STANDARD_OUTPUTS[output]))
                continue
            kind, path = _kind(output, task_type), Path(output)
            try:
                if not resume:
                    kind.clear(path)
                files.append(kind(path, settings))
            except OSError as problem:
                raise UsageError(f"cannot write {output}: {problem.strerror or problem}") from problem
    except BaseException:
        for sink in files:
            sink.close()
        raise
    return files, printed
