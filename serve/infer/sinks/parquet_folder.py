"""Files in a folder of Parquet files: which ones prompttune wrote, and their paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from prompttune.files import LOCK_FILE, sync_folder
from prompttune.serve.infer import libraries

SPOOL = ".spool"
"""Folder of rows whose file is incomplete; it is hidden, so that readers of the folder skip it."""
# A crash may leave an unfinished file; its name starts with a dot and has a suffix.
_OURS = re.compile(
    r"task=[^/]*/(part-\d{5,}\.parquet|\.part-\d{5,}\.parquet\.\w+)"
    rf"|{re.escape(SPOOL)}/task=[^/]*/(\d{{5,}}\.jsonl|\.\d{{5,}}\.jsonl\.\w+)"
)


pyarrow = partial(libraries.pyarrow, "or write a .jsonl or .csv file")
"""The module ``pyarrow``, with its Parquet part."""


def part_file(folder: Path, name: str, number: int) -> Path:
    """Path of a task's file ``number``; ``name`` is that of its partition."""
    return folder / f"task={name}" / f"part-{number:05}.parquet"


def spool_file(folder: Path, name: str, number: int) -> Path:
    """Path of the spool of that file."""
    return folder / SPOOL / f"task={name}" / f"{number:05}.jsonl"


def written_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder with the name and place of a file that prompttune writes, unfinished ones included."""
    for file in sorted(folder.glob("*/*.parquet*")) + sorted(folder.glob(f"{SPOOL}/*/*")):
        if _OURS.fullmatch(file.relative_to(folder).as_posix()):
            yield file


def foreign_file(folder: Path) -> Path | None:
    """A file below a folder that prompttune did not write, by its name, its place and its columns."""
    arrow = pyarrow()
    ours = {*written_files(folder), folder / LOCK_FILE}
    for file in sorted(one for one in folder.rglob("*") if not one.is_dir()):
        if file not in ours:
            return file
        if file.suffix == ".parquet":
            try:
                columns = arrow.parquet.read_schema(file).names
            except (OSError, arrow.ArrowException):
                return file
            if "task_version" not in columns:
                return file
    return None


def clear(folder: Path) -> None:
    """Remove the files that prompttune wrote, and the subfolders that become empty."""
    for file in list(written_files(folder)):
        file.unlink()
    for one in [*folder.glob("task=*"), *folder.glob(f"{SPOOL}/task=*"), folder / SPOOL]:
        if one.is_dir() and not any(one.iterdir()):
            one.rmdir()


def make_folder(folder: Path) -> None:
    """Create a folder that survives a power failure."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
