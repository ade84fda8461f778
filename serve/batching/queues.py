"""What waits for a batch: images, and the rows that ask about them, each a question of one task about one image."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from prompttune.export.runtimes import Array
from prompttune.serve.workers import Key

PADDING = 0.1
"""Largest share of a batch's answers that may be padding: images of a batch are asked about equally many tasks."""
_SAMPLED = 8
"""Rows and columns of pixels by which images that may be equal are found."""


@dataclass(eq=False)
class RowsJob:
    """Rows of one task that arrived together; they may be split over several batches."""

    key: Key
    images: Sequence[Array]
    priority: int
    future: asyncio.Future[None]
    arrived: float
    logits: dict[int, Array] = field(default_factory=dict)
    running: set[asyncio.Task[None]] = field(default_factory=set)
    """Batches with rows of the job that have not ended."""
    begun: float | None = None
    batches: list[tuple[int, float]] = field(default_factory=list)


Row = tuple[RowsJob, int]
"""A job, and the index of one of its images."""
Asked = dict[Key, list[Row]]
"""The tasks that one image of a batch is asked about, and the rows that wait for each answer."""


@dataclass(eq=False)
class _Image:
    """An image that waits, and the rows that ask about it."""

    pixels: Array
    asked: dict[Key, dict[Row, None]] = field(default_factory=dict)
    sample: bytes = b""


class Queues:
    """Waiting rows: the most urgent priority first, a row of each task in turn within it, in order within a task.

    Args:
        images: largest number of images in a batch.
        answers: largest number of answers in a batch of images that rows share; 0 gives each row an image of its own.
    """

    def __init__(self, images: int, answers: int = 0) -> None:
        self._most_images, self._shares = images, answers > 0
        self._most_answers = answers or images
        self._levels: dict[int, OrderedDict[Key, dict[Row, _Image]]] = {}
        self._alike: dict[bytes, dict[_Image, None]] = {}
        """The images by their samples."""
        self.rows = self._images = 0

    @property
    def full(self) -> bool:
        """Whether there is enough for a batch."""
        return self._images >= self._most_images or self.rows >= self._most_answers

    def add(self, job: RowsJob) -> None:
        """Let the rows of a job wait."""
        queue = self._levels.setdefault(job.priority, OrderedDict()).setdefault(job.key, {})
        for row, pixels in enumerate(job.images):
            image = self._image(pixels)
            image.asked.setdefault(job.key, {})[job, row] = None
            queue[job, row] = image
        self.rows += len(job.images)

    def _image(self, pixels: Array) -> _Image:
        """The waiting image of these pixels: the same array, or an equal one of another request."""
        image = _Image(pixels)
        if self._shares:
            across, down = (max(1, side // _SAMPLED) for side in pixels.shape[1:])
            image.sample = pixels[:, ::across, ::down].tobytes()
            alike = self._alike.setdefault(image.sample, {})
            for other in alike:
                if other.pixels is pixels:
                    return other
            # Only one is compared: who sends many that are equal where they are sampled must not hold up the others.
            if alike and np.array_equal((last := next(reversed(alike))).pixels, pixels):
                last.pixels = pixels  # the next rows of this request find it at once
                return last
            alike[image] = None
        self._images += 1
        return image

    def oldest(self) -> float | None:
        """Arrival time of the row that has waited longest."""
        queues = (queue for level in self._levels.values() for queue in level.values())
        return min((next(iter(queue))[0].arrived for queue in queues), default=None)

    def take(self) -> list[tuple[Array, Asked]]:
        """Take the images of one batch: the first in turn, and further ones that keep the padding small."""
        taken: dict[_Image, Row] = {}
        widest = asked = 0
        for row, image in self._in_turn():
            if image in taken:
                continue
            count = min(len(image.asked), self._most_answers)
            images, wide = len(taken) + 1, max(widest, count)
            answers = images * wide
            if answers <= self._most_answers and answers - asked - count <= PADDING * answers:
                taken[image] = row
                widest, asked = wide, asked + count
                if images == self._most_images or asked == self._most_answers:
                    break
        return [(image.pixels, self._take(row, image)) for image, row in taken.items()]

    def _in_turn(self) -> Iterator[tuple[Row, _Image]]:
        for priority in sorted(self._levels):
            for turn in zip_longest(*(queue.items() for queue in self._levels[priority].values())):
                yield from (one for one in turn if one is not None)

    def _take(self, first: Row, image: _Image) -> Asked:
        """Take what waits for an image whose turn ``first`` is, as far as a batch holds it."""
        job, _ = first
        keys = list(dict.fromkeys((job.key, *image.asked)))[: self._most_answers]
        asked = {key: list(image.asked[key]) for key in keys}
        self._levels[job.priority].move_to_end(job.key)
        for rows in asked.values():
            for row in rows:
                self._leave(row, image)
        return asked

    def drop(self, job: RowsJob) -> None:
        """Drop the waiting rows of a job; its task keeps its turn, and the other rows of its images stay."""
        queue = self._levels.get(job.priority, OrderedDict()).get(job.key, {})
        for row in ((job, number) for number in range(len(job.images))):
            if row in queue:
                self._leave(row, queue[row])

    def _leave(self, row: Row, image: _Image) -> None:
        job, _ = row
        level = self._levels[job.priority]
        del level[job.key][row], image.asked[job.key][row]
        self.rows -= 1
        if not level[job.key]:
            del level[job.key]
        if not level:
            del self._levels[job.priority]
        if not image.asked[job.key]:
            del image.asked[job.key]
        if not image.asked:
            self._images -= 1
            if self._shares:
                del self._alike[image.sample][image]
                if not self._alike[image.sample]:
                    del self._alike[image.sample]

    def jobs(self) -> Iterator[RowsJob]:
        """The job of each waiting row."""
        return (job for level in self._levels.values() for queue in level.values() for job, _ in queue)
