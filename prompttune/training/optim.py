"""Loss, optimiser and learning rate schedule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prompttune.errors import UsageError
from prompttune.model import Output

if TYPE_CHECKING:
    from prompttune.model import PromptModel
    from prompttune.training.config import TrainConfig

WARMUP_SHARE = 0.1
ONECYCLE_WARMUP_SHARE = 0.3
ONECYCLE_START = 1 / 25
"""Initial learning rate of the one-cycle schedule as a share of the highest, as in torch's ``OneCycleLR``."""


def loss(
    output: Output, targets: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """The training loss: ``λ L(base) + (1 - λ) L(prompt pathway)``, with the method's λ and the task type's loss L.

    The second term exists if the model computed the prompt pathway, as it does in training mode.

    Args:
        output: output of a model, for B images.
        targets: class indices int64 [B]; for a segmentation, masks of them [B, H, W].
        class_weights: weight of each class, [C]; not supported for a segmentation.
        label_smoothing: share of the target that is spread over all classes.

    Returns:
        A scalar, in nats.

    Raises:
        UsageError: the targets have another type or shape.
    """
    _check_kinds(output, targets)
    kind = output.task_type
    kind.check_targets(targets, len(output.logits))
    base = kind.loss(output.logits, targets, class_weights, label_smoothing)
    if output.aux_logits is None:
        return base
    aux, weight = kind.loss(output.aux_logits, targets, class_weights, label_smoothing), output.base_loss_weight
    return weight * base + (1.0 - weight) * aux


def _check_kinds(output: object, targets: object) -> None:
    if not isinstance(output, Output) or not isinstance(targets, Tensor):
        kinds = f"{type(output).__name__} and {type(targets).__name__}"
        raise UsageError(f"the loss takes what a model returns and a tensor of class indices, not {kinds}")


class Objective(nn.Module):
    """Model and loss as one module, so that data parallelism, autocast and torch.compile see the whole step."""

    def __init__(self, model: PromptModel, class_weights: Tensor | None, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights)

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and base logits of a batch.

        Args:
            images: normalised [B, 3, S, S].
            targets: class indices [B], or masks of them [B, S, S].

        Returns:
            :func:`loss`, a scalar, and the logits [B, C] or [B, C, h, w] of the base pathway.
        """
        output = self.model(images)
        total = loss(output, targets, class_weights=self.class_weights, label_smoothing=self.label_smoothing)
        return total, output.logits.detach()


def balanced_weights(labels: Sequence[int] | None, classes: int) -> Tensor:
    """Weights n / (C n_c) [C] of classes that occur n_c times among n labels; 0 for a class that does not occur.

    Raises:
        UsageError: the data set cannot list its labels without reading every image.
    """
    if labels is None:
        raise UsageError("class_weights balanced needs the labels in advance, which this data set does not give")
    counts = Counter(labels)
    weights = [len(labels) / (classes * counts[index]) if counts[index] else 0.0 for index in range(classes)]
    return torch.tensor(weights, dtype=torch.float32)


def make_optimizer(config: TrainConfig, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a task's trained parameters, in their order, in one group.

    Weight decay applies to every tensor, including biases and norms; the released code of SA²VP and VPT excludes biases
    and most vectors, at 1e-4 a small difference.
    """
    values = list(parameters.values())
    # fp16's scaler makes the CPU wait in every step of any other optimiser; Fabric clips gradients of no fused one
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    shared["fused"] = True if config.precision == "fp16" and config.grad_clip is None else None
    if config.optimizer == "sgd":
        return torch.optim.SGD(values, momentum=config.momentum, **shared)
    return torch.optim.AdamW(values, **shared)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int, epochs: int | None = None) -> float:
    """Learning rate of ``step``, counted from 0 over the whole run, or over its last ``epochs`` epochs.

    It is a pure function of the settings, without scheduler state: ``cosine`` rises linearly during the
    warm-up, then falls to ``min_lr`` at the last step; ``onecycle`` rises along a cosine and falls along another;
    ``constant`` stays the same after the warm-up.
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
    """Set the learning rate of every group of the optimiser."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flatten an optimiser's state into tensors by ``key/parameter name``, and other values by the same names."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            where: dict[str, Any] = tensors if isinstance(value, Tensor) else scalars
            where[f"{key}/{names[index]}"] = value
    return tensors, scalars


def restore_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str], values: Mapping[str, Any]) -> None:
    """The inverse of :func:`optimizer_tensors`, with tensors and other values in one mapping."""
    state: dict[int, dict[str, Any]] = {}
    index = {name: position for position, name in enumerate(names)}
    for path, value in values.items():
        key, _, name = path.partition("/")
        state.setdefault(index[name], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
