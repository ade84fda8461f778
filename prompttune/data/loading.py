"""Batches of an epoch: the same for the same seed and epoch, whatever the workers and earlier epochs."""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from prompttune.data.base import ImageSource
from prompttune.data.rng import derive_seed, generators_kept, seed_generators
from prompttune.errors import DataError, UsageError
from prompttune.images.augment import Transform, is_exact
from prompttune.images.joint import JointTransform
from prompttune.images.preprocess import UnresizableError

Key = tuple[int, int]
"""Epoch and index of an image: the epoch is sent along because worker processes outlive an epoch."""
Sample = tuple[Tensor, Tensor] | str
"""An image [3, S, S] with its class index [] or mask [S, S], or a line about an image that cannot be read."""


@dataclass
class Batch:
    """Images of one step. A batch without a readable image has B = 0 and still counts as a step."""

    images: Any
    """float32 [B, 3, S, S], or what a model takes in their place."""
    targets: Tensor
    """Class indices, int64 [B], or masks of them, int64 [B, S, S]."""
    corrupt: list[str]
    """One line, ``path: reason``, for each image that could not be read."""
    places: list[int] = field(default_factory=list)
    """Place of each readable image among all images of the batch."""

    def to(self, device: torch.device) -> tuple[Any, Tensor]:
        """Images and targets on a device."""
        return self.images.to(device, non_blocking=True), self.targets.to(device, non_blocking=True)

    def pin_memory(self) -> Batch:
        """Move the batch to page-locked memory."""
        return Batch(self.images.pin_memory(), self.targets.pin_memory(), self.corrupt, self.places)

    def __reduce__(self) -> tuple[Any, ...]:
        # torch would send tensors from worker processes through /dev/shm, 64 MB in a container: once it is full,
        # the process that waits for the batch never wakes up
        return _received, (_sent(self.images), _sent(self.targets), self.corrupt, self.places)


def _sent(tensor: Tensor) -> tuple[Any, ...]:
    """Pickled form of a tensor for another process: in anonymous memory if the system has it, else as bytes."""
    array = tensor.numpy()
    if not array.nbytes or not hasattr(os, "memfd_create"):
        return (array,)
    descriptor = os.memfd_create("batch")
    try:
        with open(descriptor, "wb", closefd=False) as stream:
            array.tofile(stream)
        return DupFd(descriptor), array.dtype.str, array.shape
    finally:
        os.close(descriptor)


def _received(images: tuple[Any, ...], targets: tuple[Any, ...], *told: Any) -> Batch:
    return Batch(_tensor(*images), _tensor(*targets), *told)


def _tensor(source: Any, dtype: str | None = None, shape: tuple[int, ...] = ()) -> Tensor:
    if dtype is None:
        return torch.from_numpy(source)
    descriptor = source.detach()
    try:
        memory = mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
    return torch.from_numpy(np.frombuffer(memory, dtype).reshape(shape))


_DEAD_WORKER = re.compile(r"DataLoader worker \(pid\S* (?P<pid>[\d, ]+)\) (?P<fate>[^.\n]*)")
_FAILED_WORKER = re.compile(r"Caught (?P<kind>\w+) in (?:DataLoader worker process|pin memory thread)")


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """A block that takes batches: the failure of a worker process becomes a one-line error.

    torch raises it when it detects the failure, which may be in the middle of a training step.

    Raises:
        DataError: a worker process was killed, ended by itself, or ran out of memory or another resource.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as problem:
        if (dead := _DEAD_WORKER.search(str(problem))) is not None:
            what = f"a loading worker (pid {dead['pid']}) {dead['fate'].strip()}"
        elif (failed := _FAILED_WORKER.search(str(problem))) is not None:
            reason = str(problem).strip().splitlines()[-1]
            what = f"a loading worker failed: {reason or failed['kind']}"
        else:
            raise
        raise DataError(
            f"{what}; the usual cause is too little memory: give fewer --workers (0 loads without workers), and "
            "--resume continues a run that was training"
        ) from None


def on_device(
    batches: Iterable[Batch], device: torch.device, corrupt: CorruptImages | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and targets of every batch with a readable image; ``corrupt`` counts the unreadable ones."""
    for batch in batches:
        if corrupt is not None:
            corrupt.add(batch.corrupt)
        if len(batch.targets):
            yield batch.to(device)


class CorruptImages:
    """Counts the images that cannot be read, each once, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lines: list[str] = []
        self._seen: set[str] = set()

    @property
    def count(self) -> int:
        """Number of unreadable images so far."""
        return len(self.lines)

    def add(self, lines: Iterable[str]) -> None:
        """Add the lines of a batch.

        Raises:
            DataError: the limit is exceeded; the message names the first image.
        """
        for line in lines:
            path = line.rpartition(": ")[0]
            if path not in self._seen:
                self._seen.add(path)
                self.lines.append(line)
        if self.count > self.limit:
            raise DataError(f"{self.count} images cannot be read (limit {self.limit}), first: {self.lines[0]}; "
                            "raise --max-corrupt or remove them")  # fmt: skip


class TransformedSamples(Dataset[Sample]):
    """A source's images, transformed; random draws depend only on ``seed``, epoch and index."""

    def __init__(self, source: Any, transform: Any, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.is_exact = is_exact(transform)

    def __getitem__(self, key: Key) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """The samples of a batch. The loader calls this, so the random generators are saved once per batch."""
        if self.is_exact:
            return [self._read(index) for _, index in keys]
        with generators_kept():
            return [self._draw(epoch, index) for epoch, index in keys]

    def _draw(self, epoch: int, index: int) -> Sample:
        seed_generators(derive_seed("augment", self.seed, epoch, index))
        return self._read(index)

    def _read(self, index: int) -> Sample:
        try:
            loaded = self.source.load(index)
        except (OSError, ValueError, DataError) as problem:
            return self._told(index, problem)
        try:
            return self._transformed(*loaded)
        except UnresizableError as problem:
            return self._told(index, problem)

    def _told(self, index: int, problem: Exception) -> str:
        # with ": " removed from the reason, the text before the last one is the path
        reason = " ".join(str(problem).split()).replace(": ", ", ") or type(problem).__name__
        return f"{self.source.describe(index)}: {reason}"

    def _transformed(self, image: Image.Image, target: Any) -> tuple[Tensor, Tensor]:
        """An image [3, S, S] and its target: a class index, or a mask [S, S], which follows the image's geometry."""
        if isinstance(self.transform, JointTransform):
            return self.transform(image, target)
        return self.transform(image), torch.as_tensor(target, dtype=torch.int64)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack the readable samples and list the lines of the others."""
        readable = [sample for sample in samples if not isinstance(sample, str)]
        corrupt = [sample for sample in samples if isinstance(sample, str)]
        places = [place for place, sample in enumerate(samples) if not isinstance(sample, str)]
        images, targets = (torch.stack(part) for part in zip(*(readable or [self.blank()]), strict=True))
        return Batch(images[: len(readable)], targets[: len(readable)], corrupt, places)

    def blank(self) -> tuple[Tensor, Tensor]:
        """A sample of a black image, for the shapes of an empty batch."""
        target = np.zeros((32, 32), np.uint8) if isinstance(self.transform, JointTransform) else 0
        with generators_kept():
            return self._transformed(Image.new("RGB", (32, 32)), target)


class _EpochBatches(Sampler[list[Key]]):
    """The keys of each batch of one process, in the current epoch."""

    def __init__(
        self, size: int, batch_size: int, *, shuffle: bool, seed: int, drop_last: bool, rank: int, world_size: int
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def indices(self) -> list[int]:
        """Images of this process, in the order of the epoch."""
        if not self.shuffle:
            return list(range(self.rank, self.size, self.world_size))
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        # processes of a training step wait for one another, so each gets the same number: the first images are repeated
        total = math.ceil(self.size / self.world_size) * self.world_size
        return [order[position % self.size] for position in range(self.rank, total, self.world_size)]

    def _images(self) -> int:
        if self.shuffle:
            return math.ceil(self.size / self.world_size)
        return len(range(self.rank, self.size, self.world_size))

    def __len__(self) -> int:
        batches = self._images() / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[list[Key]]:
        keys = [(self.epoch, index) for index in self.indices()]
        for batch in range(len(self)):
            yield keys[batch * self.batch_size : (batch + 1) * self.batch_size]


class EpochLoader:
    """Batches of one epoch after another; call :meth:`set_epoch` before each iteration."""

    def __init__(self, samples: TransformedSamples, batches: _EpochBatches, workers: int, pin_memory: bool) -> None:
        self._samples, self._batches, self._settings = samples, batches, (workers, pin_memory)
        self._loader: DataLoader[Sample] = DataLoader(
            samples,
            batch_sampler=batches,
            collate_fn=samples.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            # the loader draws a seed for the workers, by default from the global generator
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self._batches)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; epochs may be in any order."""
        self._batches.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        with loading():
            yield from self._loader

    @property
    def size(self) -> int:
        """Number of images of the source."""
        return self._batches.size

    @property
    def largest(self) -> int:
        """Number of images in the largest batch, the same in all processes."""
        return min(self._batches.batch_size, math.ceil(self.size / self._batches.world_size))

    @property
    def is_exact(self) -> bool:
        """Whether an image is the same in every epoch."""
        return self._samples.is_exact

    def blank(self) -> tuple[Tensor, Tensor]:
        """A black image [3, S, S] with a target, of the shapes of all images."""
        return self._samples.blank()

    def indices(self) -> Iterator[list[int]]:
        """The images of each batch in the current epoch."""
        return ([index for _, index in keys] for keys in self._batches)

    def in_order(self) -> EpochLoader:
        """The same images in the order of the source, each in one process."""
        batches = copy.copy(self._batches)
        batches.shuffle = False
        return EpochLoader(self._samples, batches, *self._settings)


def make_loader(
    source: ImageSource,
    transform: Transform | JointTransform,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    workers: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> EpochLoader:
    """Create the loader of a source for one of ``world_size`` processes.

    The order and every draw of the transform depend only on ``seed``, the epoch and the image's index, not on
    ``workers``, earlier epochs or the global random generators, which iterating does not change. An image that cannot
    be read or resized is left out of its batch and listed there; a batch may become empty.

    Args:
        source: the images.
        transform: function from an RGB image to a float32 tensor [3, S, S]; or, for masks, a joint transform.
        batch_size: number of images in a batch.
        shuffle: use a new order in each epoch, in which every process gets the same number of images by repeating a
            few; otherwise keep the source's order, with each image in exactly one process, so that the last may get one
            fewer.
        seed: seed of the order and of the transform.
        workers: number of loader processes, kept from one epoch to the next; 0 loads in this process.
        drop_last: whether to skip a last batch that is not full.
        rank: number of this process.
        world_size: number of processes.
        pin_memory: whether to put batches into page-locked memory.

    Raises:
        UsageError: a number is out of range.
    """
    if batch_size < 1 or workers < 0 or not 0 <= rank < world_size:
        raise UsageError(f"batch_size must be at least 1, workers at least 0 and rank below world_size, not "
                         f"{batch_size}, {workers} and {rank} of {world_size}")  # fmt: skip
    batches = _EpochBatches(
        len(source), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size
    )
    return EpochLoader(TransformedSamples(source, transform, seed), batches, workers, pin_memory)
