"""A run that starts from the parameters of another checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prompttune.checkpoints.format import read_config, read_tensors
from prompttune.checkpoints.io import segmentation_of
from prompttune.data.base import shortened
from prompttune.errors import CheckpointError, UsageError
from prompttune.methods import config_from_dict
from prompttune.methods.base import CLASSES
from prompttune.model import PromptModel


@torch.no_grad()
def take_parameters(model: PromptModel, folder: Path) -> str:
    """Copy a checkpoint's parameters into a new model; rows of the head go to the class of the same name.

    A class that the checkpoint does not have keeps its fresh row.

    Args:
        model: freshly made.
        folder: the checkpoint's.

    Returns:
        One line on what was taken.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or has another method, backbone, head or another
            setting that shapes a parameter; the line names both sides.
    """
    stored = read_config(folder)
    _check(_described(stored, folder), _own(model), folder)
    tensors = read_tensors(folder, stored)
    model.take_sizes(tensors)
    layout, parameters = model.state_layout(), model.task_parameters()
    rows = [(stored["labels"].index(label), row) for row, label in enumerate(model.labels) if label in stored["labels"]]
    theirs, ours = [there for there, _ in rows], [here for _, here in rows]
    for name, parameter in parameters.items():
        by_class = name.startswith("head.") and layout[name][0] == CLASSES
        _check_shape(name, tensors.get(name), parameter, by_class, folder, stored, model)
        if by_class:
            parameter[ours] = tensors[name][theirs].to(parameter)
        else:
            parameter.copy_(tensors[name])
    model.method.start_from_loaded()
    return _told(folder, model.labels, {model.labels[row] for row in ours})


def _own(model: PromptModel) -> dict[str, Any]:
    """What a checkpoint must have in common with the model, by the words that an error uses."""
    backbone, head = model.backbone, model.segmentation
    return {
        "method": model.config.method,
        "backbone": backbone.name,
        "image size": backbone.image_size,
        "fingerprint": backbone.fingerprint[:12],
        "task": model.task,
        **({} if head is None else head.graph_settings()),
        **model.config.graph_settings(),
    }


def _described(stored: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same of a checkpoint's config."""
    backbone = stored["backbone"]
    try:
        head = segmentation_of(stored)
        method = config_from_dict(stored["method"], stored["settings"])
    except (UsageError, TypeError) as problem:
        raise CheckpointError(f"{folder} does not fit this prompttune: {problem}") from None
    return {
        "method": method.method,
        "backbone": backbone["name"],
        "image size": backbone["image_size"],
        "fingerprint": backbone["fingerprint"][:12],
        "task": "classification" if head is None else "segmentation",
        **({} if head is None else head.graph_settings()),
        **method.graph_settings(),
    }


def _check(theirs: dict[str, Any], ours: dict[str, Any], folder: Path) -> None:
    names = [name for name in ours if theirs.get(name) != ours[name]]
    if theirs["fingerprint"] == ours["fingerprint"] and "backbone" in names:
        names.remove("backbone")  # the same weights by another name
    if names:
        words = "; ".join(f"{name} is {theirs.get(name)} there, {ours[name]} here" for name in names[:3])
        raise CheckpointError(f"cannot start from {folder}: {words}; start from a checkpoint that agrees")


def _check_shape(
    name: str,
    stored: Tensor | None,
    parameter: Tensor,
    by_class: bool,
    folder: Path,
    config: dict[str, Any],
    model: PromptModel,
) -> None:
    shape = None if stored is None else tuple(stored.shape)
    if shape is not None and shape[by_class:] == tuple(parameter.shape)[by_class:]:
        return
    own = model.config.to_dict()
    differ = [f"{key} is {config['settings'].get(key)} there, {own[key]} here" for key in own
              if config["settings"].get(key) != own[key]]  # fmt: skip
    reason = f"; {', '.join(differ)}" if differ else ""
    raise CheckpointError(
        f"cannot start from {folder}: {name} is {shape or 'missing'} there, {tuple(parameter.shape)} here{reason}"
    )


def _told(folder: Path, labels: list[str], known: set[str]) -> str:
    new = [label for label in labels if label not in known]
    fresh = f", {len(new)} are new: {shortened(new)}" if new else ""
    return f"starting from {folder}: {len(known)} of {len(labels)} classes have a row there{fresh}"
