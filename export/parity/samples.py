"""Images for parity: real ones if data are given, seeded noise otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prompttune.data.base import DataObject
from prompttune.errors import DataError, choose
from prompttune.evaluation.scored import Chosen, Matched, choose_split, match_classes
from prompttune.export.folder import EngineTask
from prompttune.export.parity.figures import Array
from prompttune.task_types import ClassificationConfig, TaskType

if TYPE_CHECKING:
    from prompttune.data.objects import Data as DataSet

Data: TypeAlias = "DataSet | Mapping[str, DataSet] | None"
"""One data set for every task, as in ``train``, or one for each task by name, or None."""


class Labelled:
    """Images to score, with their labels as classes of one task.

    Args:
        chosen: the images.
        task_type: type of the task.
        labels: labels of the task.
        own: whether the data belong to this task only, so that one shared class is enough to score them.
        strict: whether to refuse the task's own data if they share no class.

    Raises:
        DataError: see ``strict``.
    """

    def __init__(self, chosen: Chosen, task_type: TaskType, labels: Sequence[str], own: bool, strict: bool) -> None:
        self.sources, self.task_type = chosen.sources, task_type
        self.starts = np.cumsum([0, *map(len, chosen.sources)])
        self.what = chosen.what
        self.matched: tuple[Matched, list[NDArray[np.int64]]] | None = None
        """Matched classes, with :meth:`TaskType.columns`; None for images of other classes, which are not scored."""
        if own or all(set(source.classes) <= set(labels) for source in chosen.sources):
            try:
                matched = match_classes(chosen.sources, labels)
                self.matched = matched, task_type.columns(matched)
            except DataError:
                if own and strict:
                    raise

    def __len__(self) -> int:
        return int(self.starts[-1])

    def load(self, index: int) -> tuple[Any, Any]:
        """Image, and class index or mask in the classes of ``matched``."""
        part, place = self._find(index)
        image, target = self.sources[part].load(place)
        return image, target if self.matched is None else self.matched[1][part][target]

    def describe(self, index: int) -> str:
        """Where the image comes from."""
        part, place = self._find(index)
        return str(self.sources[part].describe(place))

    def _find(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, index - int(self.starts[part])


@dataclass
class Samples:
    """The images of data sets to score, each loaded once.

    Args:
        data: see :data:`Data`.
        task_type: type of the tasks.
        seed: seed of the noise for tasks without data.
        split: split of the data sets, see :func:`~prompttune.evaluation.scored.choose_split`.
        strict: whether data for one task must share a class with it.
    """

    data: Data = None
    task_type: TaskType = field(default_factory=ClassificationConfig)
    seed: int = 0
    split: str | None = None
    strict: bool = False
    _chosen: dict[str, Chosen] = field(default_factory=dict, repr=False)
    _objects: dict[str, str | DataObject] = field(default_factory=dict, repr=False)

    def check(self, tasks: Mapping[str, EngineTask]) -> None:
        """Refuse data that cannot be scored, before any other work.

        Raises:
            UsageError: data are given for an unknown task, or the split is unknown.
            DataError: the data cannot be read or lack the split, or a task shares no class with its own data.
        """
        for task in self.data if isinstance(self.data, Mapping) else ():
            choose("task", task, tasks)
        for name, one in tasks.items():
            self.images(name, one)

    def spec(self, task: str) -> str | None:
        """The name of a task's data set."""
        found = self._settled(task)
        return None if found is None else str(found)

    def _settled(self, task: str) -> str | DataObject | None:
        given = self.data.get(task) if isinstance(self.data, Mapping) else self.data
        if given is None or isinstance(given, str):
            return given
        key = task if isinstance(self.data, Mapping) else ""
        if key not in self._objects:
            from prompttune.data.objects import settled

            self._objects[key] = settled(given)
        return self._objects[key]

    def images(self, name: str, task: EngineTask) -> Labelled | None:
        """The images of a task; None without data."""
        found = self._settled(name)
        if found is None:
            return None
        if (spec := str(found)) not in self._chosen:
            parts = self.task_type.read_parts(found)
            self._chosen[spec] = choose_split(parts.named, parts.name, self.split)
        return Labelled(self._chosen[spec], self.task_type, task.labels, isinstance(self.data, Mapping), self.strict)

    def draw(self, name: str, task: EngineTask, count: int) -> tuple[Array, str]:
        """Up to ``count`` normalised images [N, 3, S, S] for a task, and their description.

        Raises:
            DataError: every image is unreadable.
        """
        source = self.images(name, task)
        size = task.preprocess.image_size
        if source is None:
            noise = np.random.default_rng(self.seed).standard_normal((count, 3, size, size), dtype=np.float32)
            return noise, f"{count} synthetic images (normal noise, seed {self.seed})"
        # Evenly spread, because folders are sorted by class.
        wanted = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
        images = [image for image, _ in read_images(source, task, wanted.tolist()) if image is not None]
        if not images:
            raise DataError(f"none of the images drawn from {self.spec(name)} can be read")
        return np.stack(images), f"{len(images)} images of {self.spec(name)}"


def read_images(source: Labelled, task: EngineTask, indices: Sequence[int]) -> list[tuple[Array | None, Any]]:
    """Images of a data set through a task's transform: [3, S, S] and class index or mask; None if unreadable."""
    transform = source.task_type.pair(task.preprocess)
    read: list[tuple[Array | None, Any]] = []
    for index in indices:
        try:
            image, target = transform(*source.load(index))
            read.append((np.asarray(image, dtype=np.float32), target))
        except (OSError, ValueError):
            read.append((None, -1))
    return read
