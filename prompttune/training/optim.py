"""Loss, optimiser and the course of the learning rate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prompttune.errors import UsageError

if TYPE_CHECKING:
    from prompttune.model import PromptModel
    from prompttune.training.config import TrainConfig

WARMUP_SHARE = 0.1
ONECYCLE_WARMUP_SHARE = 0.3
ONECYCLE_START = 1 / 25
"""Where the one-cycle schedule starts, as a share of the highest learning rate (torch's ``OneCycleLR`` does so)."""


class Objective(nn.Module):
    """Model and loss as one module, so that data parallelism, autocast and torch.compile see the whole step."""

    def __init__(self, model: PromptModel, class_weights: Tensor | None, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.base_weight = model.config.base_loss_weight
        self.criterion: nn.Module = nn.CrossEntropyLoss(weight=class_weights, label_smoothing=label_smoothing)
        if model.segmentation is not None:
            from prompttune.training.segmenting import PixelCriterion

            self.criterion = PixelCriterion(label_smoothing)

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and base logits of a batch.

        Args:
            images: normalised [B, 3, S, S].
            targets: class indices [B], or masks of them [B, S, S].

        Returns:
            ``λ CE(base) + (1 - λ) CE(prompt pathway)``, a scalar, and the logits [B, C] or [B, C, h, w] of the
            base pathway.
        """
        output = self.model(images)
        loss: Tensor = self.criterion(output.logits.float(), targets)
        if output.aux_logits is not None:
            aux = self.criterion(output.aux_logits.float(), targets)
            loss = self.base_weight * loss + (1.0 - self.base_weight) * aux
        return loss, output.logits.detach()


def balanced_weights(labels: Sequence[int] | None, classes: int) -> Tensor:
    """Weights n / (C n_c) [C] of classes that occur n_c times among n labels; 0 for one that does not occur.

    Raises:
        UsageError: the data set cannot tell its labels without reading every image.
    """
    if labels is None:
        raise UsageError("class_weights balanced needs the labels in advance, which this data set does not give")
    counts = Counter(labels)
    weights = [len(labels) / (classes * counts[index]) if counts[index] else 0.0 for index in range(classes)]
    return torch.tensor(weights, dtype=torch.float32)


def make_optimizer(config: TrainConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser over a task's trained parameters, in their order, one group.

    Weight decay falls on every tensor, biases and norms too; SA²VP's and VPT's released code leave biases and most
    vectors out, at 1e-4 a small difference.
    """
    values = list(parameters.values())
    if config.optimizer == "sgd":
        return torch.optim.SGD(values, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(values, lr=config.lr, weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int, epochs: int | None = None) -> float:
    """Learning rate of ``step``, counted from 0 over the whole run, or over its last ``epochs`` epochs.

    A pure function of the settings, so there is no scheduler state to keep: ``cosine`` climbs in a line for the
    warm-up, then falls to ``min_lr`` at the last step; ``onecycle`` climbs along a cosine and falls along another;
    ``constant`` stays after the warm-up.
    """
    epochs = config.epochs if epochs is None else epochs
    total = epochs * steps_per_epoch
    share = ONECYCLE_WARMUP_SHARE if config.schedule == "onecycle" else WARMUP_SHARE
    warmup_epochs = epochs * share if config.warmup_epochs is None else config.warmup_epochs
    warmup = min(round(warmup_epochs * steps_per_epoch), total)
    if step < warmup:
        done = (step + 1) / warmup
        if config.schedule == "onecycle":
            return _cosine(config.lr * ONECYCLE_START, config.lr, done)
        return config.lr * done
    if config.schedule == "constant":
        return config.lr
    return _cosine(config.lr, min(config.min_lr, config.lr), (step + 1 - warmup) / (total - warmup))


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of the optimiser this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flatten an optimiser's state: tensors by ``key/parameter name``, and what is no tensor the same way."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            where: dict[str, Any] = tensors if isinstance(value, Tensor) else scalars
            where[f"{key}/{names[index]}"] = value
    return tensors, scalars


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], values: Mapping[str, Any]) -> None:
    """The inverse of :func:`optimizer_tensors`, tensors and others in one mapping."""
    state: dict[int, dict[str, Any]] = {}
    index = {name: position for position, name in enumerate(names)}
    for path, value in values.items():
        key, _, name = path.partition("/")
        state.setdefault(index[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
