"""The type of a task as an object: targets, head, loss, scores, answers. Nothing else asks which type a task has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prompttune.axes import CLASSES, Layout, State
from prompttune.data import DataSplits, Parts, load_data, load_parts
from prompttune.errors import PrompttuneError, UsageError
from prompttune.evaluation.result import Table
from prompttune.images.augment import Augment, Transform
from prompttune.images.joint import JointTransform
from prompttune.images.preprocess import Preprocess

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from prompttune.backbones.base import Backbone
    from prompttune.evaluation.scored import Chosen, Matched

PREFIX = "head."
"""Prefix of the state keys of a head."""


@dataclass(frozen=True)
class Measures:
    """Names of a type's figures, as attributes of a result and, after ``train_`` or ``val_``, as keys of a record."""

    score: str
    """Score that chooses the best epoch, on the validation images; the higher the better."""
    score_title: str
    second: str
    """Second figure of the best epoch."""
    train: str
    """Figure of the training batches, see :meth:`TaskType.hits`."""
    train_title: str
    second_title: str | None = None
    """Title of the second figure in the line of an epoch; None leaves it out."""


class Head(nn.Module):
    """Logits of one task; a subclass names its parameters like its state keys without :data:`PREFIX`.

    A head is split like a method: ``task_state()`` holds its tensors with leading dimension 1, and ``forward`` reads a
    state of leading dimension 1 (one task) or B (one task per row), so that each row of a batch may have its own head.
    ``weight`` [C, D] and ``bias`` [C] have a row for each class.

    Args:
        width: channels D of what the last layer reads.
        classes: number of classes C of the task.
    """

    size: tuple[int, ...] = ()
    """Dimensions of the logits after the classes."""
    apart = False
    """Whether each row is to be a product of its own where rows are single features, so that its rounding does not
    depend on the rows beside it."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def task_state(self) -> State:
        """All parameters with leading dimension 1."""
        return {f"{PREFIX}{name}": parameter.unsqueeze(0) for name, parameter in self.named_parameters()}

    def state_layout(self) -> Layout:
        """Shape of each state tensor; ``head.weight`` and ``head.bias`` have the axis ``classes``."""
        layout: Layout = {f"{PREFIX}{name}": tuple(one.shape) for name, one in self.named_parameters()}
        return layout | {f"{PREFIX}weight": (CLASSES, self.weight.shape[1]), f"{PREFIX}bias": (CLASSES,)}

    def forward(self, features: Tensor, maps: tuple[Tensor, ...], state: State) -> Tensor:
        """Logits [B, C, *size] from pooled features [B, D] and patch tokens [B, R C, D], one tensor per level."""
        raise NotImplementedError


class Result(Protocol):
    """The figures of one evaluation; the attributes that :class:`Measures` names are among its own."""

    @property
    def n(self) -> int:
        """Number of scored images."""

    @property
    def loss(self) -> float | None:
        """Mean loss; None if it is unknown."""

    @property
    def corrupt(self) -> tuple[str, ...] | None:
        """One line for each image that could not be read; None if this is not known."""

    @property
    def chosen(self) -> Chosen | None:
        """Which images were scored; None during a training."""

    @property
    def notes(self) -> list[str]:
        """Remarks about the images and their classes, one line each."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""

    def tables(self) -> list[Table]:
        """The figures for a terminal."""


class Scores(ABC):
    """Sums over batches, from which the figures come; those of several processes can be added."""

    @abstractmethod
    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: the model's logits, and targets whose classes are numbered as in ``labels`` below."""

    @abstractmethod
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The sums by name; names and shapes depend only on the number of classes. They are changed in place."""

    @abstractmethod
    def result(self, labels: Sequence[str], corrupt: Sequence[str] | None = None) -> Any:
        """The figures, a :class:`Result`.

        Args:
            labels: the model's classes, then those that only the data have.
            corrupt: one line for each image that could not be read; None if this is not known.

        Raises:
            DataError: there was nothing to score.
        """

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace each sum by its ``total`` over the processes."""
        for array in self.arrays().values():
            array[...] = total(torch.from_numpy(array.copy())).cpu().numpy()


@dataclass(frozen=True)
class TaskType(ABC):
    """One type of task. An instance holds the settings of its head; it is immutable and checked on creation."""

    name: ClassVar[str]
    """The type's name on the command line."""
    summary: ClassVar[str] = ""
    """What a task of this type answers, in a few words."""
    measures: ClassVar[Measures]
    heads: ClassVar[tuple[str, ...]] = ("linear",)
    """Names of the heads that a training may choose."""
    format_version: ClassVar[int] = 2
    """Version of checkpoints and manifests that hold such a task, which earlier releases must refuse."""
    target: ClassVar[Literal["class", "mask"]] = "class"
    """What the data give for each image, see :func:`prompttune.data.load_data`."""
    target_axes: ClassVar[tuple[str, ...]] = ()
    """Names of the axes of a target after the batch."""
    rounding_ties: ClassVar[bool] = False
    """Whether rounding makes ties in fp32 too: among the many places of a map, some lie on a border of two classes."""
    label_weights: ClassVar[bool] = False
    """Whether an image has one class, by whose frequency the loss can be weighted."""
    refused: ClassVar[Mapping[str, str]] = {
        "segment": "Engine.segment gives a class to each pixel; call predict()",
        "report": "--report is for classifications; use --output for the figures",
    }
    """What cannot take such tasks, with one line that says what to do: ``predict`` (a class for an image) and
    ``segment`` (a class for each pixel), of which ``infer`` needs one; ``server``, ``triton`` and ``bench``; ``report``
    of ``evaluate``; ``labels``, ``smooth`` and ``ray`` of ``infer``."""
    formats: ClassVar[tuple[str, ...] | None] = None
    """Formats of engines whose parity is proven; None for all."""
    entry: ClassVar[str] = ""
    """Key of a type that configs had before ``task_type``."""

    # settings and files

    @classmethod
    def chosen(cls, head: str, channels: int) -> TaskType:  # noqa: ARG003
        """The type with the head that a training's settings name.

        Raises:
            UsageError: the type has no such head.
        """
        if head not in cls.heads:
            raise UsageError(f"head {head} is not for a {cls.name}, which has {', '.join(cls.heads)}")
        return cls()

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, ready for JSON."""
        return asdict(self)

    def graph_settings(self) -> dict[str, Any]:
        """The settings that all tasks of an engine must share."""
        return self.to_dict()

    def to_config(self) -> dict[str, Any]:
        """The entry of this type in a checkpoint's config and in an engine's manifest; see :func:`read_task_type`."""
        return {"task_type": {"name": self.name, **self.to_dict()}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TaskType:
        """The inverse of :meth:`to_config`."""
        return cls(**{name: value for name, value in config["task_type"].items() if name != "name"})

    def takes(self, what: str) -> bool:
        """Whether ``what`` takes such tasks, see :attr:`refused`."""
        return what not in self.refused

    def refuse(self, what: str, error: type[PrompttuneError] = UsageError) -> None:
        """Raise ``error`` unless ``what`` takes such tasks."""
        if not self.takes(what):
            raise error(f"{self.name}: {self.refused[what]}")

    # data

    def read_parts(self, data: Any, *, root: str | None = None, reduce_zero_label: bool = True) -> Parts:
        """The splits that a data set defines itself, to score."""
        return load_parts(data, target=self.target, root=root, reduce_zero_label=reduce_zero_label)

    def read_splits(self, data: Any, settings: Mapping[str, Any]) -> DataSplits:
        """A data set to train on, by the settings of a run."""
        taken = {name: settings[name] for name in ("val_fraction", "reduce_zero_label", "seed", "limit")}
        return load_data(data, target=self.target, root=settings["data_root"], **taken)

    def transform(self, preprocess: Preprocess, augment: Augment | None = None) -> Transform | JointTransform:
        """The transform of an image, or of an image with its target."""
        return preprocess.transform() if augment is None else augment.transform(preprocess)

    def pair(self, preprocess: Preprocess) -> Callable[[Any, Any], tuple[Any, Any]]:
        """The evaluation transform of an image with its target."""
        made: Any = self.transform(preprocess)
        return lambda image, target: (made(image), target)

    @abstractmethod
    def columns(self, matched: Matched) -> list[NDArray[np.int64]]:
        """For each source, the class that a value of its targets counts as, see :class:`Scores`."""

    # model

    def check_method(self, method: Any, name: str, backbone: Backbone) -> None:  # noqa: B027
        """Raise :class:`BackboneError` unless a method gives on ``backbone`` what the head reads."""

    def levels(self, depth: int) -> tuple[int, ...]:  # noqa: ARG002
        """Blocks whose patch tokens the head reads; none of them if it reads pooled features."""
        return ()

    @abstractmethod
    def make_head(self, backbone: Backbone, classes: int, width: int) -> Head:
        """The module of a new task's head; ``width`` is the number of channels of the pooled features."""

    # training

    @abstractmethod
    def loss(
        self, logits: Tensor, targets: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        """The loss of a batch, a scalar."""

    @abstractmethod
    def hits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum over the batch of each image's share of right answers, a scalar."""

    def check_targets(self, targets: Tensor, images: int) -> None:
        """Raise :class:`UsageError` unless the targets have the type and shape for so many images."""
        if targets.is_floating_point() or targets.dim() != 1 + len(self.target_axes) or len(targets) != images:
            wanted = ", ".join((str(images), *self.target_axes))
            raise UsageError(
                f"the loss takes class indices int64 [{wanted}], not {targets.dtype} {list(targets.shape)}"
            )

    def check_data(self, data: Any) -> None:  # noqa: B027
        """Raise :class:`UsageError` for data that a task of this type cannot be trained on."""

    # figures

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probability of each class [..., C], in double precision, from logits [..., C]; by default they sum to 1."""
        wide = logits.astype(np.float64)
        powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
        shares: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
        return shares

    @abstractmethod
    def figure(self, result: Any) -> Figure:
        """The picture of a result, such as a confusion matrix."""

    @abstractmethod
    def scores(self, classes: int, unseen: int = 0) -> Scores:
        """A new counter of answers; ``unseen`` more classes are in the targets alone, and count as wrong."""
