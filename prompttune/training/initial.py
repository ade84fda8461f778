"""Initialisation of a run from the parameters of another checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prompttune.checkpoints.format import read_config, read_tensors
from prompttune.checkpoints.meta_prompt import read_prompt
from prompttune.errors import CheckpointError, UsageError, shortened
from prompttune.methods import config_from_dict
from prompttune.methods.base import CLASSES
from prompttune.model import PromptModel
from prompttune.task_types import read_task_type


def read_start(model: PromptModel) -> torch.Tensor | None:
    """The prompt [3, P] in the file that a method's settings name to start from, None where they name none.

    Raises:
        CheckpointError: the file is missing or damaged, or does not fit the model.
    """
    settings = model.config.to_dict()
    file = settings.get(model.config.start_file or "")
    return None if file is None else read_prompt(file, model.backbone, settings["prompt_size"])


@torch.no_grad()
def take_parameters(model: PromptModel, folder: Path) -> str:
    """Copy a checkpoint's parameters into a new model; rows of the head are matched by class name.

    A class that the checkpoint lacks keeps its new row.

    Args:
        model: a new model.
        folder: the checkpoint's folder.

    Returns:
        One line about the copied parameters.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or has another method, backbone, head or shape-relevant
            setting; the line names both sides.
    """
    stored, own = read_config(folder), model.to_config()
    _check(_facts(stored, folder), _facts(own, folder), folder)
    tensors = read_tensors(folder, stored)
    model.take_sizes(tensors)
    layout = model.state_layout()
    rows = [(stored["labels"].index(label), row) for row, label in enumerate(model.labels) if label in stored["labels"]]
    theirs, ours = [there for there, _ in rows], [here for _, here in rows]
    for name, parameter in model.task_parameters().items():
        by_class = name.startswith("head.") and layout[name][0] == CLASSES
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape is None or shape[by_class:] != tuple(parameter.shape)[by_class:]:
            here = {"shape": tuple(parameter.shape), **own["settings"]}
            _check({"shape": shape, **stored["settings"]}, here, folder, f": {name}")
        if by_class:
            parameter[ours] = tensors[name][theirs].to(parameter)
        else:
            parameter.copy_(tensors[name])
    model.method.start_from_loaded()
    new = [label for label in model.labels if label not in stored["labels"]]
    fresh = f", {len(new)} are new: {shortened(new)}" if new else ""
    return f"starting from {folder}: {len(rows)} of {len(model.labels)} classes have a row there{fresh}"


def _facts(stored: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Facts that two checkpoints must share, from the config of one, named as in error messages."""
    backbone = stored["backbone"]
    try:
        kind = read_task_type(stored)
        method = config_from_dict(stored["method"], stored["settings"])
    except (UsageError, TypeError) as problem:
        raise CheckpointError(f"{folder} does not fit this prompttune: {problem}") from None
    return {
        "method": method.method,
        "backbone": backbone["name"],
        "image size": backbone["image_size"],
        "fingerprint": backbone["fingerprint"][:12],
        "task type": kind.name,
        **kind.graph_settings(),
        **method.graph_settings(),
    }


def _check(theirs: dict[str, Any], ours: dict[str, Any], folder: Path, what: str = "") -> None:
    """Raise :class:`CheckpointError` if the two differ, with both sides of each difference."""
    names = [name for name in ours if theirs.get(name) != ours[name]]
    if "backbone" in names and theirs["fingerprint"] == ours["fingerprint"]:
        names.remove("backbone")  # the same weights under another name
    if names:
        words = "; ".join(f"{name} is {theirs.get(name)} there, {ours[name]} here" for name in names[:3])
        raise CheckpointError(f"cannot start from {folder}{what}: {words}; start from a checkpoint that agrees")
