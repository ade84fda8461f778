"""Which images an evaluation scores: those of data that are given, or those that a run has held out itself."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompttune.data import Parts, Subset
from prompttune.data.base import DataObject
from prompttune.data.objects import settled
from prompttune.data.splitting import at_most
from prompttune.errors import CheckpointError, DataError, UsageError, choose
from prompttune.evaluation.scored import SPLITS, Chosen, choose_split
from prompttune.settings import Setting, coerce_all, settings_of
from prompttune.task_types import TaskType
from prompttune.training.config import TrainConfig, read_yaml
from prompttune.training.held_out import HeldOut, OnImage
from prompttune.training.state import HELD_OUT_FILE, RunFolder

REMEMBERED = ("data", "data_root", "val_fraction", "reduce_zero_label", "limit", "seed", "max_corrupt")
"""Settings that are taken from the run where no other data is named."""
BUILT_IN = "demo/"
"""Data sets that never change."""


def data_settings(checkpoint: Any, data: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the data: the given ones that are not None, over the run's where its data are meant, over defaults.

    Raises:
        UsageError: one does not fit, or nothing says what to score.
        CheckpointError: the run does not exist.
    """
    known = settings_of(TrainConfig)
    defaults = {name: known[name].default for name in REMEMBERED}
    typed = coerce_all({name: value for name, value in given.items() if value is not None}, known, "setting")
    if data is not None:
        return {**defaults, **typed, "data": data}
    if not isinstance(checkpoint, str | Path):
        raise UsageError("a model does not say what it was trained on: give data, or the run's folder for the model")
    run = Path(checkpoint)
    if not run.is_dir():
        raise CheckpointError(f"no checkpoint folder at {run}")
    return {**defaults, **_remembered(run), **typed}


def _remembered(run: Path) -> dict[str, Any]:
    file = RunFolder(run).settings
    if not file.exists():
        raise UsageError(f"{run} does not say what it was trained on: give --data")
    try:
        found = {name: value for name, value in read_yaml(file).items() if name in REMEMBERED}
        if "data" in found:
            found["data"] = Setting("data", str, None).coerce(found["data"])  # a file names data, it holds none
        return coerce_all(found, settings_of(TrainConfig), "setting")
    except UsageError as problem:
        raise UsageError(f"{file} is damaged: {problem}; give --data") from None


def choose_images(
    checkpoint: Any,
    data: Any,
    split: str | None,
    settings: Mapping[str, Any],
    *,
    task_type: TaskType,
    limit: int | None = None,
    on_image: OnImage | None = None,
) -> Chosen:
    """The images to score.

    Args:
        checkpoint: a model, or the folder of a checkpoint.
        data: a data set's specification or a source; None for those that the run held out.
        split: see :func:`~prompttune.evaluation.scored.choose_split`.
        settings: see :func:`data_settings`.
        task_type: type of the task, which reads the data.
        limit: use at most so many images of each split.
        on_image: called while held-out images are checked.

    Raises:
        UsageError, DataError, CheckpointError: see :func:`prompttune.training.scoring.evaluate`.
    """
    if data is not None and not isinstance(data, str | Path | DataObject):
        return Chosen([data], "all", "the images that were given")
    run = Path(checkpoint) if isinstance(checkpoint, str | Path) else None
    parts = _load_parts(settings, task_type)
    if data is None:
        assert run is not None
        chosen = _held_out(run, choose("split", split or "val", SPLITS), parts, settings, task_type, on_image)
    else:
        chosen = choose_split(parts.named, parts.name, split)
        if run is not None and chosen.split in ("train", "all") and _was_trained_on(run, settings):
            note = "the run was trained on images of these data; without --data, those that it held out are scored"
            chosen = dataclasses.replace(chosen, notes=(note,))
    sources = [at_most(source, limit, settings["seed"]) for source in chosen.sources]
    return dataclasses.replace(chosen, sources=sources)


def _held_out(
    run: Path, split: str, parts: Parts, settings: Mapping[str, Any], task_type: TaskType, on_image: OnImage | None
) -> Chosen:
    """Images of the run's own data as they are now, by its list of those that it held out."""
    if split == "test":
        return choose_split(parts.named, parts.name, split)
    listed = HeldOut.read(run)
    if listed is None:
        return _split_anew(split, settings, task_type)
    found = listed.find(parts.named, parts.name, on_image)
    held = [Subset(parts.named[name], indices) for name, indices in found.items()]
    if split == "val":
        return Chosen(held, split, f"the images that the run held out of {parts.name}")
    train = _trained(listed, parts, found, settings, task_type)
    notes: tuple[str, ...] = ()
    if len(train) != listed.train_images:
        notes = (f"{parts.name} has changed since the run: it was trained on {listed.train_images} images, and now "
                 f"{len(train)} are there that it did not hold out",)  # fmt: skip
    words = f"the images of {parts.name} that the run was trained on"
    if split == "train":
        return Chosen([train], split, words, notes)
    return Chosen([train, *held], split, f"{words} and those that it held out", notes)


def _trained(
    listed: HeldOut, parts: Parts, found: Mapping[str, list[int]], settings: Mapping[str, Any], task_type: TaskType
) -> Any:
    """The training images: those of the same split again, or all that are not held out where it comes out otherwise."""
    with contextlib.suppress(DataError):
        splits = task_type.read_splits(settings["data"], settings)
        if listed.lists(splits.val):
            return splits.train
    name = next((name for name in ("train", "all") if name in parts.named), None)
    if name is None:
        raise DataError(f"{parts.name} has no training images any more")
    source, held = parts.named[name], set(found.get(name, ()))
    return Subset(source, [index for index in range(len(source)) if index not in held])


def _split_anew(split: str, settings: Mapping[str, Any], task_type: TaskType) -> Chosen:
    splits = task_type.read_splits(settings["data"], settings)
    sources = {"val": [splits.val], "train": [splits.train], "all": [splits.train, splits.val]}[split]
    notes: tuple[str, ...] = ()
    if not splits.name.startswith(BUILT_IN):
        notes = (f"the run has no {HELD_OUT_FILE}, an earlier version trained it: its data are split anew, and "
                 "otherwise than in training if images were added or removed since",)  # fmt: skip
    return Chosen(sources, split, f"the split {split} of {splits.name}", notes)


def _load_parts(settings: Mapping[str, Any], task_type: TaskType) -> Parts:
    shared = {"root": settings["data_root"], "reduce_zero_label": settings["reduce_zero_label"]}
    return task_type.read_parts(settled(settings["data"]), **shared)


def _was_trained_on(run: Path, settings: Mapping[str, Any]) -> bool:
    """Whether data are those that a run names as its own."""
    with contextlib.suppress(UsageError, OSError):
        return _place(_remembered(run)) == _place(settings)
    return False


def _place(settings: Mapping[str, Any]) -> Path:
    return (Path(settings.get("data_root") or "").expanduser() / Path(str(settings["data"])).expanduser()).resolve()
