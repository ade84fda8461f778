"""Classification: one class for each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from prompttune.axes import State
from prompttune.backbones.base import Backbone
from prompttune.evaluation.result import Evaluation
from prompttune.evaluation.tally import Tally
from prompttune.task_types.base import Head, Measures, Scores, TaskType

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from prompttune.evaluation.scored import Matched


class ClassHead(Head):
    """A linear layer on the pooled features."""

    def __init__(self, width: int, classes: int) -> None:
        nn.Linear(width, classes)  # draws what earlier releases drew, so that a seed still gives the same head
        super().__init__(width, classes)

    def forward(self, features: Tensor, maps: tuple[Tensor, ...], state: State) -> Tensor:  # noqa: ARG002
        """See :class:`Head`: logits [B, C]."""
        weight, bias = state["head.weight"], state["head.bias"]  # [1 or B, C, D], [1 or B, C]
        features = features.to(weight.dtype)
        if self.apart:
            return torch.add((weight @ features.unsqueeze(2)).squeeze(2), bias)
        return torch.add((features.unsqueeze(1) @ weight.transpose(1, 2)).squeeze(1), bias)


class ClassScores(Scores):
    """See :class:`Scores`; targets are class indices [B]."""

    def __init__(self, classes: int, unseen: int = 0) -> None:
        self.tally = Tally(classes, unseen)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count logits [B, C]."""
        self.tally.add_logits(logits.float().cpu().numpy(), targets.cpu().numpy())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """See :class:`Scores`."""
        return self.tally.arrays()

    def result(self, labels: Sequence[str], corrupt: Sequence[str] | None = None) -> Evaluation:
        """See :class:`Scores`."""
        return self.tally.result(labels, corrupt)


@dataclass(frozen=True)
class ClassificationConfig(TaskType):
    """One class for each image, from the pooled features."""

    name: ClassVar[str] = "classification"
    summary: ClassVar[str] = "a class for each image"
    measures: ClassVar[Measures] = Measures("top1", "top-1", "top5", "top1", "top-1")
    format_version: ClassVar[int] = 1
    label_weights: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {"segment": TaskType.refused["segment"]}

    def to_config(self) -> dict[str, Any]:
        """Nothing: a config without an entry is a classification."""
        return {}

    def columns(self, matched: Matched) -> list[NDArray[np.int64]]:
        """See :class:`TaskType`."""
        return matched.columns

    def make_head(self, backbone: Backbone, classes: int, width: int) -> Head:  # noqa: ARG002
        """See :class:`TaskType`."""
        return ClassHead(width, classes)

    def loss(
        self, logits: Tensor, targets: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Mean cross entropy, in nats, of logits [B, C] and class indices [B]."""
        return F.cross_entropy(logits.float(), targets, weight=class_weights, label_smoothing=label_smoothing)

    def hits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Number of images whose likeliest class is right."""
        return (logits.argmax(dim=1) == targets).sum()

    def figure(self, result: Evaluation) -> Figure:
        """The confusion matrix, each row divided by the images of its class."""
        from prompttune.evaluation.plots import confusion_figure

        return confusion_figure(result)

    def scores(self, classes: int, unseen: int = 0) -> ClassScores:
        """See :class:`TaskType`."""
        return ClassScores(classes, unseen)
