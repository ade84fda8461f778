"""Images for parity: real ones where data is given, seeded noise otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from prompttune.errors import DataError, choose
from prompttune.export.figures import Array
from prompttune.export.folder import Task

if TYPE_CHECKING:
    from prompttune.data import ImageSource
    from prompttune.data.masks import MaskSource

Data = str | Mapping[str, str] | None
"""One data set for every task, or one for each task by name, or none."""


@dataclass
class Samples:
    """The validation images of data sets, each loaded once.

    Args:
        data: see :data:`Data`.
        seed: of the noise for tasks without data.
        masks: the data have a class for each pixel: the tasks are segmentations.
    """

    data: Data = None
    seed: int = 0
    masks: bool = False
    _sources: dict[str, Any] = field(default_factory=dict, repr=False)

    def check(self, tasks: Mapping[str, Task]) -> None:
        """Raise :class:`UsageError` if data is named for a task that there is not."""
        for task in self.data if isinstance(self.data, Mapping) else ():
            choose("task", task, tasks)

    def spec(self, task: str) -> str | None:
        """The data set that belongs to a task."""
        return self.data.get(task) if isinstance(self.data, Mapping) else self.data

    def source(self, task: str) -> ImageSource | MaskSource | None:
        """The validation images that belong to a task, None without data."""
        from prompttune.data import load_data
        from prompttune.data.masks import load_masks

        spec = self.spec(task)
        if spec is None:
            return None
        if spec not in self._sources:
            self._sources[spec] = load_masks(spec).val if self.masks else load_data(spec).val
        found: ImageSource | MaskSource = self._sources[spec]
        return found

    def draw(self, name: str, task: Task, count: int) -> tuple[Array, str]:
        """Up to ``count`` normalised images [N, 3, S, S] for a task, and what they are, in words.

        Raises:
            DataError: none of the data's images can be read.
        """
        source = self.source(name)
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


def read_images(source: ImageSource | MaskSource, task: Task, indices: list[int]) -> list[tuple[Array | None, Any]]:
    """Images of a data set through a task's transform: [3, S, S] and class index or mask; None where unreadable."""
    transform: Callable[..., object] = task.preprocess.transform()
    read: list[tuple[Array | None, Any]] = []
    for index in indices:
        try:
            image, target = source.load(index)
            read.append((np.asarray(transform(image), dtype=np.float32), target))
        except (OSError, ValueError):
            read.append((None, -1))
    return read
