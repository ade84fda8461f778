"""Check of a protocol's data before any training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from prompttune.benchmark.recipe import Recipe
from prompttune.data.benchmarks import BENCHMARKS, download, missing_files
from prompttune.data.roots import HUB_PREFIX
from prompttune.errors import DataError, UsageError, describe_failure

LAYOUTS = {
    "vtab": "DATA_ROOT/NAME/train800.txt, val200.txt, train800val200.txt and test.txt with lines 'path label'",
    "fgvc": "DATA_ROOT/NAME/train.json, val.json and test.json of image path to class id",
    "tv": "torchvision's folders below DATA_ROOT",
}
DOWNLOADED = "tv/"
"""Prefix of the specifications whose data can be downloaded."""


def available_tasks(
    recipe: Recipe,
    tasks: Sequence[str],
    root: str | None,
    *,
    skip: bool,
    fetch: bool = False,
    dry: bool = False,
    tell: Callable[[str], None] | None = None,
) -> list[str]:
    """The tasks whose data exist.

    Args:
        recipe: the protocol.
        tasks: requested tasks.
        root: ``--data-root``.
        skip: whether to leave out tasks with missing data.
        fetch: whether to download missing torchvision data sets into the folder ``root``. Data that cannot be
            downloaded are reported first; a failed download leaves its data set missing.
        dry: whether to treat downloadable data as existing, without downloading them.
        tell: called with a line for each task that is left out.

    Raises:
        UsageError: a task needs ``--data-root`` and it is missing, or it is not a folder to download into.
        DataError: data are missing; the message lists all of them and the layout. With ``skip``, only if all are
            missing.
    """
    specs = {task: [one for one in (recipe.tasks[task].search, recipe.tasks[task].data) if one] for task in tasks}
    kinds = {spec.partition("/")[0] for found in specs.values() for spec in found} & set(BENCHMARKS)
    if kinds and root is None:
        raise UsageError(f"{recipe.protocol} needs the folder of its data: give --data-root ({_layouts(kinds)})")
    if fetch and root is not None and root.startswith(HUB_PREFIX):
        raise UsageError(f"data sets of torchvision are downloaded into a folder, not to {root}")
    absent = {task: {spec: missing_files(spec, root) for spec in found} for task, found in specs.items()}
    expected = _layouts(kinds)
    if fetch:
        fixed = {
            task: {spec: [] if spec.startswith(DOWNLOADED) else paths for spec, paths in found.items()}
            for task, found in absent.items()
        }
        if not dry:
            tried: dict[str, list[str]] = {}
            for task in _there(fixed, expected, skip):
                for spec in (spec for spec, paths in absent[task].items() if paths):
                    name = "/".join(spec.split("/")[:2])
                    if name not in tried:
                        tried[name] = _download(spec, root)
                    fixed[task][spec] = tried[name]
        absent = fixed
    return _there(absent, expected, skip, tell)


def _download(spec: str, root: str | None) -> list[str]:
    """Download a data set; the line about a failure, or nothing."""
    try:
        download(spec, root)
    except Exception as problem:  # a network error, a truncated archive, a full disk
        return [describe_failure(problem)]
    return []


def _there(
    absent: Mapping[str, Mapping[str, Sequence[str]]],
    expected: str,
    skip: bool,
    tell: Callable[[str], None] | None = None,
) -> list[str]:
    """The tasks with complete data; raises :class:`DataError` as :func:`available_tasks` does."""
    lines_of = {task: dict.fromkeys(itertools.chain(*found.values())) for task, found in absent.items()}
    missing = {task: lines for task, lines in lines_of.items() if lines}
    if missing and (not skip or len(missing) == len(absent)):
        lines = [f"  {task}: {', '.join(paths)}" for task, paths in missing.items()]
        hint = "" if len(missing) == len(absent) else "; --skip-missing continues without them"
        head = f"{len(missing)} of {len(absent)} data sets are missing (expected: {expected}){hint}"
        raise DataError("\n".join([head, *lines]))
    for task, paths in missing.items():
        if tell is not None:
            tell(f"{task}: {', '.join(paths)}")
    return [task for task in absent if task not in missing]


def _layouts(kinds: set[str]) -> str:
    return "; ".join(LAYOUTS[kind] for kind in BENCHMARKS if kind in kinds)
