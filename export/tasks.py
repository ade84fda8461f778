"""Folding checkpoints into an engine's tasks, and refusing checkpoints that do not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prompttune.backbones import Backbone, load_backbone
from prompttune.checkpoints import read_config
from prompttune.errors import CheckpointError, EngineError, UsageError
from prompttune.export.folder import EngineTask, Manifest, check_task_name
from prompttune.methods import METHODS, config_from_dict
from prompttune.model import PromptModel
from prompttune.task_types import TaskType, read_task_type

Checkpoints = Mapping[str, str | Path] | Iterable[str | Path]


@dataclass(frozen=True)
class Fit:
    """Properties that the tasks of one engine share."""

    backbone: Mapping[str, Any]
    """Name, fingerprint, weights_source and image_size."""
    method: str
    graph_settings: dict[str, Any]
    shares_backbone: bool
    task_type: TaskType

    @classmethod
    def of_checkpoint(cls, folder: Path, config: Mapping[str, Any]) -> Fit:
        """The fit of a checkpoint's config; settings unknown to this version raise CheckpointError."""
        try:
            settings = config_from_dict(config["method"], config["settings"])
            task_type = read_task_type(config)
        except (UsageError, TypeError) as problem:
            raise CheckpointError(f"{folder} does not fit this prompttune: {problem}") from None
        method, graph_settings = settings.method, settings.graph_settings()
        return cls(config["backbone"], method, graph_settings, settings.shares_backbone, task_type)

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Fit:
        """The fit of an engine; settings that its manifest is too old to have are at their defaults."""
        name = manifest.method["name"]
        graph_settings = config_from_dict(name, manifest.method["settings"]).graph_settings()
        return cls(manifest.backbone, name, graph_settings, _shares_backbone(manifest), manifest.task_type)

    def require(self, other: Fit, this: str, that: str) -> None:
        """Raise :class:`EngineError`, which names both sides, unless ``other`` fits ``self``."""
        if not (self.shares_backbone and other.shares_backbone):
            method = self.method if other.shares_backbone else other.method
            raise EngineError(
                f"{that} cannot join {this}: {method} fine-tuning changes the backbone's own weights, "
                "which needs one engine per task; export it by itself"
            )
        if other.backbone["fingerprint"] != self.backbone["fingerprint"]:
            theirs, mine = (
                f"{one['name']} with fingerprint {one['fingerprint'][:12]} ({one['weights_source']})"
                for one in (other.backbone, self.backbone)
            )
            raise EngineError(f"{that} does not fit {this}: it was trained over {theirs}, {this} has {mine}")
        pairs: list[tuple[str, Any, Any]] = [
            ("image size", other.backbone["image_size"], self.backbone["image_size"]),
            ("method", other.method, self.method),
        ]
        pairs.append(("task type", other.task_type.name, self.task_type.name))
        head, own = other.task_type.graph_settings(), self.task_type.graph_settings()
        pairs += [(name, head.get(name), own[name]) for name in own]
        if other.method == self.method:
            names = sorted(self.graph_settings.keys() | other.graph_settings.keys())
            pairs += [(name, other.graph_settings.get(name), self.graph_settings.get(name)) for name in names]
        for name, found, wanted in pairs:
            if found != wanted:
                raise EngineError(f"{that} does not fit {this}: its {name} is {found}, {this} has {wanted}")


def name_checkpoints(checkpoints: Checkpoints) -> dict[str, Path]:
    """Checkpoint folders by task name; by default a task has the name of its folder.

    Raises:
        UsageError: the list is empty, or a name is invalid or occurs twice.
    """
    if isinstance(checkpoints, (str, Path)):
        raise UsageError("give a list of checkpoint folders, or a dict of task name to folder")
    if isinstance(checkpoints, Mapping):
        pairs = [(str(name), Path(checkpoints[name])) for name in checkpoints]
    else:
        pairs = [(Path(path).resolve().name, Path(path)) for path in checkpoints]
    named: dict[str, Path] = {}
    for name, path in pairs:
        if check_task_name(name) in named:
            raise UsageError(f"two tasks are called {name!r}: {named[name]} and {path}; name one with NAME=PATH")
        named[name] = path
    if not named:
        raise UsageError("give at least one checkpoint")
    return named


@dataclass(frozen=True)
class Folded:
    """A checkpoint read for an engine."""

    model: PromptModel
    """The unfolded model in evaluation mode; over its own backbone if the task has one."""
    task: EngineTask


def check_fit(named: Mapping[str, Path], fit: Fit | None = None, engine: str = "the engine") -> Fit:
    """Check that checkpoints share what one engine's tasks must share, before any large file is loaded.

    Args:
        named: checkpoint folders by task name.
        fit: requirements of an engine; None uses the first checkpoint's.
        engine: description of the owner of ``fit``.
    """
    for name, path in named.items():
        found = Fit.of_checkpoint(path, read_config(path))
        if fit is None:
            fit, engine = found, f"task {name!r}"
        else:
            fit.require(found, engine, f"task {name!r}")
    assert fit is not None
    return fit


def fold_checkpoint(path: Path, backbone: Backbone) -> Folded:
    """Read a checkpoint over ``backbone`` and compute everything that does not depend on the image.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another backbone.
    """
    model = _over_own_backbone(PromptModel.load(path, backbone=backbone), path)
    config = read_config(path)
    with torch.no_grad():
        # Copies, because some of the state are the model's own parameters.
        state = {key: np.array(value.cpu(), dtype=np.float32) for key, value in model.task_state().items()}
    source = {
        "checkpoint": path.resolve().name,
        "model_sha256": config["model_sha256"],
        "prompttune_version": config.get("prompttune_version"),
        "metrics": config["metrics"],
    }
    task = EngineTask(
        labels=tuple(model.labels),
        preprocess=model.preprocess,
        state=state,
        settings=model.config.to_dict(),
        source=source,
    )
    return Folded(model, task)


def _over_own_backbone(model: PromptModel, path: Path) -> PromptModel:
    """``model`` over the backbone that it trained itself, if it did, so that a graph gets those weights."""
    own = model.method.own_backbone()
    if own is None:
        return model
    own.weights, own.weights_source = str(path.absolute()), f"tuned in {path.resolve().name}"
    alone = PromptModel(own, model.config, None, model.labels, model.preprocess, model.task_type)
    alone.head.load_state_dict(model.head.state_dict())
    return alone.eval()


def engine_backbone(manifest: Manifest, weights: str | Path | None = None) -> Backbone:
    """Load the backbone that an engine was exported with.

    Args:
        manifest: manifest of the engine.
        weights: source of the weights, if it differs from that of the export; the checkpoint folder, for a task that
            trained them itself.

    Raises:
        EngineError: the loaded weights are not the engine's.
    """
    wanted = manifest.backbone
    source = weights or wanted["weights"]
    if _shares_backbone(manifest):
        backbone = load_backbone(wanted["name"], wanted["image_size"], source)
    else:
        backbone = _checkpoint_backbone(Path(source))
    if backbone.fingerprint != wanted["fingerprint"]:
        raise EngineError(
            f"the engine's backbone is {wanted['name']} with fingerprint {wanted['fingerprint'][:12]} "
            f"({wanted['weights_source']}), found was {backbone.fingerprint[:12]} ({backbone.weights_source}); "
            "give the right file with --weights"
        )
    return backbone


def _shares_backbone(manifest: Manifest) -> bool:
    return METHODS[manifest.method["name"]].shares_backbone


def _checkpoint_backbone(path: Path) -> Backbone:
    """The backbone that the checkpoint at ``path`` trained."""
    try:
        backbone = PromptModel.load(path).method.own_backbone()
    except CheckpointError as problem:
        raise EngineError(f"{problem}; give the checkpoint folder of the engine's task with --weights") from None
    if backbone is None:
        raise EngineError(f"{path} trained no backbone: give the checkpoint folder of the engine's task with --weights")
    return backbone


def engine_model(manifest: Manifest, backbone: Backbone) -> PromptModel:
    """A model whose ``forward_state`` answers for every task of an engine; its own parameters are not used."""
    config = config_from_dict(manifest.method["name"], manifest.method["settings"])
    return PromptModel(backbone, config, num_classes=1, task_type=manifest.task_type).eval()
