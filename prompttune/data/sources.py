"""From a user's specification to a data set: the splits that it defines, or two splits for training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from prompttune.data.base import OBJECT, DataObject, DataSplits, Parts, check_class_count, with_classes
from prompttune.data.benchmarks import KINDS as BENCHMARK_KINDS
from prompttune.data.benchmarks import load_benchmark
from prompttune.data.builtin import load_builtin
from prompttune.data.folder import read_folder
from prompttune.data.roots import HUB_PREFIX
from prompttune.data.split_names import ALL, TEST, TRAIN, VAL
from prompttune.data.splitting import at_most, hold_out
from prompttune.data.table import read_table
from prompttune.errors import DataError, UsageError


def load_data(
    spec: str | DataObject,
    *,
    val_fraction: float = 0.2,
    seed: int = 0,
    root: str | None = None,
    limit: int | None = None,
) -> DataSplits:
    """Load a data set for training: its training images, and validation images that choose the epoch.

    The validation images are those of the split ``val``, else ``test``, else a held-out share of each class.

    Args:
        spec: see :func:`load_parts`.
        val_fraction: share of each class to hold out if the data do not define a validation split.
        seed: seed of that split, and of the selection for ``limit``.
        root: folder that a relative path starts from, and that holds timm's data sets.
        limit: largest number of images in each split, with every class represented if possible.

    Raises:
        UsageError: the name is unknown, or a fraction or a limit is out of range.
        DataError: the data are missing, empty or inconsistent, have fewer than two classes, or validation
            images of a class without training images; one line that says what to do.
        MissingExtraError: a library of the extra ``data`` is needed.
    """
    if not 0.0 < val_fraction < 1.0:
        raise UsageError(f"val_fraction must be above 0 and below 1, not {val_fraction}")
    _check_limit(limit)
    parts = _load(spec, root)
    trained = next((split for split in (TRAIN, ALL) if split in parts.named), None)
    if trained is None:
        raise DataError(f"{parts.name} has no images to train on, only a split {' and '.join(parts.named)}")
    if parts.unfit:
        raise DataError(parts.unfit)
    train = parts.named[trained]
    check_class_count(train.classes, parts.name)
    held = next((parts.named[split] for split in (VAL, TEST) if split in parts.named), None)
    if held is None:
        splits = hold_out(train, val_fraction, seed, parts.name)
    else:
        splits = DataSplits(train, with_classes(held, train.classes, parts.name), train.classes, parts.name)
    return dataclasses.replace(
        splits, train=at_most(splits.train, limit, seed), val=at_most(splits.val, limit, seed), name=str(spec)
    )


def load_parts(spec: str | DataObject, *, root: str | None = None, limit: int | None = None, seed: int = 0) -> Parts:
    """Load the splits that a data set defines, for scoring or for viewing; no image is held out.

    Args:
        spec: ``demo/NAME`` (built in), ``torch/NAME``, ``hfds/NAME`` or ``wds/NAME`` (timm's data set factory),
            ``vtab/…``, ``fgvc/…`` or ``tv/…`` (see :mod:`prompttune.data.benchmarks`), a ``.csv`` file or a
            folder of images. Write ``./demo/…`` for a folder whose own name starts like that. Or an object, see
            :mod:`prompttune.data.objects`.
        root: folder that a relative path starts from, and that holds timm's data sets.
        limit: largest number of images in each split, with every class represented if possible.
        seed: seed of that selection.

    Raises:
        UsageError: the name is unknown, or the limit is out of range.
        DataError: the data are missing, empty or inconsistent; one line that says what to do.
        MissingExtraError: a library of the extra ``data`` is needed.
    """
    _check_limit(limit)
    parts = _load(spec, root)
    return dataclasses.replace(
        parts, named={split: at_most(source, limit, seed) for split, source in parts.named.items()}
    )


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")


def _load(spec: str | DataObject, root: str | None) -> Parts:
    if isinstance(spec, DataObject):
        return spec.parts
    if spec.startswith(OBJECT):
        raise UsageError(f"{spec} was a Python object, which cannot be loaded by name: give the object or other data")
    kind, _, name = spec.partition("/")
    if kind == "demo":
        return load_builtin(name)
    if root is not None and root.startswith(HUB_PREFIX) and kind not in BENCHMARK_KINDS:
        raise UsageError(f"{root}: data of {', '.join(f'{one}/NAME' for one in BENCHMARK_KINDS)} are read from there; "
                         f"hfds/OWNER/NAME reads a data set of the hub, {spec} does not")  # fmt: skip
    if kind.lower() in _FACTORY and name:
        return _FACTORY[kind.lower()](name, root)
    path = Path(root or "").expanduser() / Path(spec).expanduser()
    if path.suffix.lower() == ".csv":
        return read_table(path)
    if not path.is_dir():
        raise DataError(f"no data at {path}; give a folder of images, a .csv file, demo/NAME, "
                        f"{', '.join(f'{kind}/NAME' for kind in _FACTORY)}")  # fmt: skip
    return read_folder(path)


def _load_torch(name: str, root: str | None) -> Parts:
    from prompttune.data.timm_factory import load_torch

    return load_torch(name, root)


def _load_hfds(name: str, root: str | None) -> Parts:
    from prompttune.data.timm_factory import load_hfds

    return load_hfds(name, root)


def _load_wds(name: str, root: str | None) -> Parts:
    from prompttune.data.shards import load_wds

    return load_wds(name, root)


def _load_benchmark(kind: str) -> Callable[[str, str | None], Parts]:
    return lambda name, root: load_benchmark(kind, name, root)


_FACTORY: dict[str, Callable[[str, str | None], Parts]] = {
    "torch": _load_torch,
    "hfds": _load_hfds,
    "wds": _load_wds,
    **{kind: _load_benchmark(kind) for kind in BENCHMARK_KINDS},
}
