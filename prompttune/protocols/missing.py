"""Whether the data of a protocol are there, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from prompttune.errors import DataError, UsageError
from prompttune.protocols.recipe import Recipe
from prompttune.training.data.benchmarks import KINDS, download, missing_files

LAYOUTS = {
    "vtab": "DATA_ROOT/NAME/train800.txt, val200.txt, train800val200.txt and test.txt with lines 'path label'",
    "fgvc": "DATA_ROOT/NAME/train.json, val.json and test.json of image path to class id",
    "tv": "torchvision's folders below DATA_ROOT",
}


def available_tasks(
    recipe: Recipe, tasks: Sequence[str], root: str | None, *, skip: bool, fetch: bool = False
) -> list[str]:
    """The tasks whose data are there.

    Args:
        recipe: the protocol.
        tasks: those that were asked for.
        root: ``--data-root``.
        skip: leave out what is missing.
        fetch: download the data sets of torchvision that are missing, into the folder ``root``.

    Raises:
        UsageError: a task needs ``--data-root`` and there is none, or it is no folder to download into.
        DataError: data are missing; the message lists all of them and the layout. With ``skip``, only if all are.
    """
    specs = {task: [one for one in (recipe.tasks[task].search, recipe.tasks[task].data) if one] for task in tasks}
    kinds = {spec.partition("/")[0] for found in specs.values() for spec in found} & set(KINDS)
    if kinds and root is None:
        raise UsageError(f"{recipe.protocol} needs the folder of its data: give --data-root ({_layouts(kinds)})")
    if fetch:
        for spec in dict.fromkeys(spec for found in specs.values() for spec in found):
            download(spec, root)
    absent = {
        task: list(dict.fromkeys(path for spec in found for path in missing_files(spec, root)))
        for task, found in specs.items()
    }
    missing = {task: paths for task, paths in absent.items() if paths}
    if missing and (not skip or len(missing) == len(tasks)):
        lines = [f"  {task}: {', '.join(paths)}" for task, paths in missing.items()]
        hint = "" if len(missing) == len(tasks) else "; --skip-missing goes on without"
        head = f"{len(missing)} of {len(tasks)} data sets are missing (expected: {_layouts(kinds)}){hint}"
        raise DataError("\n".join([head, *lines]))
    return [task for task in tasks if task not in missing]


def _layouts(kinds: set[str]) -> str:
    return "; ".join(LAYOUTS[kind] for kind in KINDS if kind in kinds)
