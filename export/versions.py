"""Numbers of a task's versions: 1, 2, 3 and so on, counted where the task is written.

``versions/<task>.json`` beside ``tasks/`` says which digest has which number. It outlives the task's folder, so that a
task that is removed and added again goes on counting. A task without such a file has the number 1.
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
"""What Triton's tools read."""


class Numbered(NamedTuple):
    """A version of a task."""

    number: int
    """0 where none was counted."""
    digest: str


def read_number(engine: Path, task: str) -> Numbered:
    """The version of ``task`` that was counted last.

    Raises:
        EngineError: the file is damaged.
    """
    path = _path(engine, task)
    if not path.exists():
        return Numbered(0, "")
    values = read_json(path, EngineError, "version number")
    number, digest = values.get("number"), values.get("version")
    if not isinstance(number, int) or number is True or not 0 < number < LARGEST or not isinstance(digest, str):
        raise EngineError(f"the version number {path} is damaged: delete it, and the task counts from 1 again")
    return Numbered(number, digest)


def write_number(engine: Path, task: str, one: Numbered) -> None:
    """Remember a version, in one step."""
    write_json(_path(engine, task), {"number": one.number, "version": one.digest})


def count_version(engine: Path, task: str, digest: str, before: str = "") -> None:
    """Count a version that is about to be written; one that is there already keeps its number.

    Args:
        engine: the engine folder.
        task: its name.
        digest: what is written.
        before: digest of what is there now, which counts as the first version if none was counted yet.
    """
    last = read_number(engine, task)
    if not last.number and before:
        last = Numbered(1, before)
    write_number(engine, task, last if last.digest == digest else Numbered(last.number + 1, digest))


def carry_over(old: Path, new: Path, tasks: Mapping[str, tuple[str, str]]) -> None:
    """Go on counting in the engine folder ``new``, which is about to take the place of ``old``.

    ``tasks`` names for each task of either its digest there, empty where it is not, and its digest from now on.
    """
    if (old / VERSIONS).is_dir():
        shutil.copytree(old / VERSIONS, new / VERSIONS)
    for task, (before, digest) in tasks.items():
        if before or read_number(new, task).number:
            count_version(new, task, digest, before)


def _path(engine: Path, task: str) -> Path:
    return engine / VERSIONS / f"{task}.json"
