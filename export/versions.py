"""Version numbers of a task: 1, 2, 3 and so on, counted when the task is written.

``versions/<task>.json`` next to ``tasks/`` records which digest has which number. It outlives the task's folder, so
that the count continues for a task that is removed and added again. A task without this file has the number 1.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from prompttune.errors import EngineError
from prompttune.files import read_json, write_json

VERSIONS = "versions"
LARGEST = 2**63
"""Largest number that Triton's tools read."""


class Numbered(NamedTuple):
    """A version of a task."""

    number: int
    """Number of the version; 0 before the first count."""
    digest: str


def read_number(engine: Path, task: str) -> Numbered:
    """The last counted version of ``task``.

    Raises:
        EngineError: the file is damaged.
    """
    path = _path(engine, task)
    if not path.exists():
        return Numbered(0, "")
    values = read_json(path, EngineError, "version number")
    number, digest = values.get("number"), values.get("version")
    if not isinstance(number, int) or number is True or not 0 < number < LARGEST or not isinstance(digest, str):
        raise EngineError(f"the version number {path} is damaged: delete it to count from 1 again")
    return Numbered(number, digest)


def write_number(engine: Path, task: str, one: Numbered) -> None:
    """Write a version's number atomically."""
    write_json(_path(engine, task), {"number": one.number, "version": one.digest})


def count_version(engine: Path, task: str, digest: str, before: str = "") -> None:
    """Count a version that is about to be written; an existing version keeps its number.

    Args:
        engine: the engine folder.
        task: name of the task.
        digest: digest of the new version.
        before: digest of the existing version, which counts as the first one if none was counted yet.
    """
    last = read_number(engine, task)
    if not last.number and before:
        last = Numbered(1, before)
    write_number(engine, task, last if last.digest == digest else Numbered(last.number + 1, digest))


def carry_over(old: Path, new: Path, tasks: Mapping[str, tuple[str, str]]) -> None:
    """Continue the count in the engine folder ``new``, which is about to replace ``old``.

    ``tasks`` holds two digests for each task of either folder: the old one, empty if the task is new, and the new one.
    """
    if (old / VERSIONS).is_dir():
        shutil.copytree(old / VERSIONS, new / VERSIONS)
    for task, (before, digest) in tasks.items():
        if before or read_number(new, task).number:
            count_version(new, task, digest, before)


def _path(engine: Path, task: str) -> Path:
    return engine / VERSIONS / f"{task}.json"
