"""From a user's specification to a data set: the splits that it defines, or two splits for training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from prompttune.data.base import OBJECT, DataObject, DataSplits, Parts, Target, check_class_count, with_classes
from prompttune.data.benchmarks import BENCHMARKS
from prompttune.data.folder import read_folder
from prompttune.data.masks import read_mask_folder
from prompttune.data.registry import DATA_SETS
from prompttune.data.roots import HUB_PREFIX
from prompttune.data.split_names import ALL, TEST, TRAIN, VAL
from prompttune.data.splitting import at_most, hold_out
from prompttune.data.table import read_table
from prompttune.errors import DataError, UsageError


def load_data(
    spec: str | DataObject,
    *,
    target: Target = "class",
    val_fraction: float = 0.2,
    seed: int = 0,
    root: str | None = None,
    limit: int | None = None,
    reduce_zero_label: bool = True,
) -> DataSplits:
    """Load a data set for training: its training images, and validation images that choose the epoch.

    The validation images are those of the split ``val``, else ``test``, else a held-out share of each class.

    Args:
        spec: see :func:`load_parts`.
        target: what the task needs of each image.
        val_fraction: share of each class to hold out if the data do not define a validation split.
        seed: seed of that split, and of the selection for ``limit``.
        root: folder that a relative path starts from, and that holds timm's data sets.
        limit: largest number of images in each split, with every class represented if possible.
        reduce_zero_label: whether 0 in a folder's annotations means that a pixel has no class.

    Raises:
        UsageError: the name is unknown, a fraction or a limit is out of range, or the targets are of the other kind.
        DataError: the data are missing, empty or inconsistent, have fewer than two classes, or validation
            images of a class without training images; one line that says what to do.
        MissingExtraError: a library of the extra ``data`` is needed.
    """
    if not 0.0 < val_fraction < 1.0:
        raise UsageError(f"val_fraction must be above 0 and below 1, not {val_fraction}")
    parts = _load(spec, root, target, limit, reduce_zero_label)
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


def load_parts(
    spec: str | DataObject,
    *,
    target: Target = "class",
    root: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    reduce_zero_label: bool = True,
) -> Parts:
    """Load the splits that a data set defines, for scoring or for viewing; no image is held out.

    Args:
        spec: ``PREFIX/NAME`` of a registered data set (:data:`~prompttune.data.registry.DATA_SETS`), such as
            ``demo/digits``; a ``.csv`` file or a folder of images, for masks a folder in ADE20K's layout. Write
            ``./demo/…`` for a folder whose own name starts like that. Or an object, see :mod:`prompttune.data.objects`.
        target: what the task needs of each image.
        root: folder that a relative path starts from, and that holds timm's data sets.
        limit: largest number of images in each split, with every class represented if possible.
        seed: seed of that selection.
        reduce_zero_label: whether 0 in a folder's annotations means that a pixel has no class.

    Raises:
        UsageError: the name is unknown, the limit is out of range, or the targets are of the other kind.
        DataError: the data are missing, empty or inconsistent; one line that says what to do.
        MissingExtraError: a library of the extra ``data`` is needed.
    """
    parts = _load(spec, root, target, limit, reduce_zero_label)
    return dataclasses.replace(
        parts, named={split: at_most(source, limit, seed) for split, source in parts.named.items()}
    )


def _load(
    spec: str | DataObject, root: str | None, target: Target, limit: int | None, reduce_zero_label: bool
) -> Parts:
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    parts = spec.parts if isinstance(spec, DataObject) else _named(spec, root, target, reduce_zero_label)
    if parts.target != target:
        raise UsageError(f"{spec} has a {parts.target} for each image, and the task needs a {target}: give other data")
    return parts


def _named(spec: str, root: str | None, target: Target, reduce_zero_label: bool) -> Parts:
    if spec.startswith(OBJECT):
        raise UsageError(f"{spec} was a Python object, which cannot be loaded by name: give the object or other data")
    prefix, _, name = spec.partition("/")
    if root is not None and root.startswith(HUB_PREFIX) and prefix not in (*BENCHMARKS, "demo"):
        raise UsageError(f"{root}: data of {', '.join(f'{one}/NAME' for one in BENCHMARKS)} are read from there; "
                         f"hfds/OWNER/NAME reads a data set of the hub, {spec} does not")  # fmt: skip
    if name and prefix.lower() in DATA_SETS:
        return DATA_SETS[prefix.lower()](name, root)
    path = Path(root or "").expanduser() / Path(spec).expanduser()
    if target == "mask":
        return read_mask_folder(path, reduce_zero_label)
    if path.suffix.lower() == ".csv":
        return read_table(path)
    if not path.is_dir():
        raise DataError(f"no data at {path}; give a folder of images, a .csv file or one of "
                        f"{', '.join(f'{prefix}/NAME' for prefix in DATA_SETS)}")  # fmt: skip
    return read_folder(path)
