"""Subjects of an explanation: the runs, and each run's plain backbone for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prompttune.backbones.base import Backbone
from prompttune.checkpoints import CONFIG_FILE, read_config
from prompttune.errors import UsageError
from prompttune.images.preprocess import Preprocess
from prompttune.methods import State
from prompttune.model import PromptModel


@dataclass(frozen=True, eq=False)
class ExplainedModel:
    """A run or a plain backbone."""

    name: str
    """Unique name in the pictures."""
    backbone: Backbone
    preprocess: Preprocess
    model: PromptModel | None = None
    """The run's model; None for a plain backbone."""
    state: State | None = None
    """The model's state, computed once."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.backbone.parameters()).device

    @property
    def driven(self) -> Backbone:
        """The backbone that runs: the tuned one for full fine-tuning."""
        return self.backbone if self.model is None else self.model.method.driven

    def leading_keys(self, index: int) -> int:
        """Number of keys before those of the tokens in block ``index``, see :class:`prompttune.methods.base.Method`."""
        return 0 if self.model is None else self.model.method.leading_keys(index)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, D] of normalised images [B, 3, S, S]."""
        if self.model is None:
            plain: Tensor = self.backbone(images)
            return plain
        assert self.state is not None
        return self.model.forward_state(images, self.state).features

    def run(self) -> tuple[PromptModel, State]:
        """Model and state of a run."""
        assert self.model is not None
        assert self.state is not None
        return self.model, self.state


def is_run(path: Path) -> bool:
    """Whether a path is a checkpoint folder."""
    return (path / CONFIG_FILE).is_file()


def load_subjects(
    runs: Sequence[PromptModel | str | Path], device: torch.device, weights: str | None = None
) -> list[ExplainedModel]:
    """Load runs, with each backbone loaded once and its plain form before the first run over it.

    Args:
        runs: models or checkpoint folders.
        device: device to load them to.
        weights: source of the backbones' weights, if it differs from that of the training.

    Raises:
        UsageError: the list of runs is empty.
        CheckpointError, BackboneError: a run cannot be loaded.
    """
    if not runs:
        raise UsageError("give at least one run: the folder of a checkpoint that prompttune train wrote")
    loaded: dict[tuple[str, int], Backbone] = {}
    subjects: list[ExplainedModel] = []
    names = _names(runs)
    for run, name in zip(runs, names, strict=True):
        model = run if isinstance(run, PromptModel) else _load(Path(run), loaded, weights)
        model = model.to(device).eval()
        if not any(one.backbone is model.backbone for one in subjects):
            subjects.append(ExplainedModel(_plain_name(model.backbone, subjects), model.backbone, model.preprocess))
        with torch.no_grad():
            state = model.task_state()
        subjects.append(ExplainedModel(name, model.backbone, model.preprocess, model, state))
    return subjects


def _load(folder: Path, loaded: dict[tuple[str, int], Backbone], weights: str | None) -> PromptModel:
    wanted = read_config(folder)["backbone"]
    key = (wanted["fingerprint"], wanted["image_size"])
    model = PromptModel.load(folder, backbone=loaded.get(key), weights=weights)
    loaded[key] = model.backbone
    return model


def _names(runs: Sequence[PromptModel | str | Path]) -> list[str]:
    """A short name for each run, made longer or numbered if it occurs twice."""
    short = [run.config.method if isinstance(run, PromptModel) else Path(run).resolve().name for run in runs]
    full = [run.config.method if isinstance(run, PromptModel) else str(run) for run in runs]
    names: list[str] = []
    for place, name in enumerate(short):
        name = full[place] if short.count(name) > 1 else name
        names.append(f"{name} ({names.count(name) + 1})" if name in names else name)
    return names


def _plain_name(backbone: Backbone, before: Sequence[ExplainedModel]) -> str:
    if not before:
        return "plain backbone"
    return f"plain {backbone.name} at {backbone.image_size}"
