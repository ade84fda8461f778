"""Image states of a run's images: kept from one pass over them, after which epochs run the task's part alone.

What is kept lies in memory or in a file without a name, so nothing outlives the run that a later one could take for its
own. The pass goes in the order of the data: a resumed run keeps the same bits.
"""

from __future__ import annotations

import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prompttune.data import Batch, EpochLoader
from prompttune.methods.base import State
from prompttune.model import KnownImages
from prompttune.training.launch import gather_lines, on_rank_zero

if TYPE_CHECKING:
    from lightning.fabric import Fabric

MIB = 2**20
_ALIGNED = 64
"""Bytes between whose multiples each tensor begins."""
_FILE = ".image_states."
"""Beginning of the name that a file has until every process has opened it."""
_TARGET = "(target)"
_LOG = logging.getLogger("prompttune.training")


class StateBatches:
    """The batches of a loader, with :class:`KnownImages` in place of images: computed for each, or read from a cache.

    States are computed in batches of one size, filled up with black images: with few rows, libraries round otherwise.

    Args:
        loader: the loader.
        image_state: function from images [B, 3, S, S] on the device of ``fabric`` to their image state.
        fabric: the processes, which share the work and the cache; its autocast holds for the states.
    """

    def __init__(self, loader: EpochLoader, image_state: Callable[[Tensor], State], fabric: Fabric) -> None:
        self.loader, self._image_state, self._fabric = loader, image_state, fabric
        self._columns: State = {}
        """What is kept: image states and targets by name, a row for each image of the source."""
        self._corrupt: dict[int, str] = {}
        """Line of each image that could not be read, by index."""

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """See :meth:`EpochLoader.set_epoch`."""
        self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        if self._columns:
            yield from map(self._kept, self.loader.indices())
            return
        for batch in self.loader:
            batch.images = KnownImages(self._computed(batch.images)) if len(batch.targets) else batch.images
            yield batch

    def _kept(self, indices: list[int]) -> Batch:
        places = [place for place, index in enumerate(indices) if index not in self._corrupt]
        rows = torch.tensor([indices[place] for place in places], dtype=torch.int64)
        state = {name: column[rows] for name, column in self._columns.items()}
        targets, corrupt = state.pop(_TARGET).long(), [self._corrupt[one] for one in indices if one in self._corrupt]
        return Batch(KnownImages(state), targets, corrupt, places)

    @torch.no_grad()
    def _computed(self, images: Tensor) -> State:
        images = images.to(self._fabric.device, non_blocking=True)
        black = images.new_zeros(self.loader.largest - len(images), *images.shape[1:])
        with self._fabric.autocast():
            state = self._image_state(torch.cat((images, black)))
        return {name: values[: len(images)] for name, values in state.items()}

    def keep(self, room: Room, tell: Callable[[str], None], on_batch: Callable[[int, int], None]) -> None:
        """Compute all states once and keep them, where the images stay the same, the state says more and there is room.

        Args:
            room: room that is left.
            tell: called with one line about what is kept, and where, or that it does not fit.
            on_batch: called with the number of finished batches of this process, and of all.
        """
        loader = self.loader
        if not loader.is_exact:
            _LOG.info("image states are not kept: augmentation makes other images in each epoch")
            return
        image, target = loader.blank()
        like = self._computed(image[None])
        if like.keys() == {"image"}:
            return  # all work on an image is the task's
        like[_TARGET] = target[None].to(torch.uint8 if target.ndim else torch.int64)  # a mask has at most 256 values
        size = sum(_bytes(loader.size, one) for one in like.values())
        words = f"the image states of {loader.size:,} images, {size / MIB:,.1f} MiB,"
        if (taken := room.take(self._fabric, size)) is None:
            tell(f"{words} do not fit and are computed in every epoch; see --cache-memory and --cache-disk")
            return
        tell(f"{words} are computed once and kept {taken[1]}")
        columns, ordered, corrupt = _columns(taken[0], loader.size, like), loader.in_order(), list[tuple[int, str]]()
        for done, (indices, batch) in enumerate(zip(ordered.indices(), ordered, strict=True), 1):
            rows = [indices[place] for place in batch.places]
            corrupt += zip((one for one in indices if one not in rows), batch.corrupt, strict=True)
            if rows:
                for name, values in {**self._computed(batch.images), _TARGET: batch.targets}.items():
                    columns[name][rows] = values.to(columns[name])
            on_batch(done, len(ordered))
        self._corrupt = dict(gather_lines(self._fabric, corrupt))  # waits until all processes have written
        self._columns = columns


@dataclass
class Room:
    """Where image states may be kept, and how many bytes of them: smaller with each that is kept."""

    memory: int
    disk: int
    folder: Path

    def take(self, fabric: Fabric, size: int) -> tuple[mmap.mmap, str] | None:
        """Memory of ``size`` bytes that all processes share, and where it is, for people; None without room for it.

        Several processes share a file, which the system holds in memory while it can.
        """
        if fabric.world_size == 1 and size <= self.memory:
            self.memory -= size
            return mmap.mmap(-1, size), "in memory"
        file = on_rank_zero(fabric, lambda: self._make_file(size))
        if file is None:
            return None
        self.disk -= size
        with file.open("r+b") as stream:
            memory = mmap.mmap(stream.fileno(), size)
        fabric.barrier()  # all have opened it
        on_rank_zero(fabric, file.unlink)
        return memory, f"in a file in {self.folder}"

    def _make_file(self, size: int) -> Path | None:
        for left in self.folder.glob(f"{_FILE}*"):
            left.unlink()
        if size > min(self.disk, shutil.disk_usage(self.folder).free // 2):
            return None
        descriptor, name = tempfile.mkstemp(prefix=_FILE, dir=self.folder)
        try:
            os.posix_fallocate(descriptor, 0, size)  # a full disk is found here, not in the middle of an epoch
        except OSError:
            Path(name).unlink()
            return None
        finally:
            os.close(descriptor)
        return Path(name)


def _bytes(count: int, like: Tensor) -> int:
    return -(-count * like.nbytes // _ALIGNED) * _ALIGNED


def _columns(memory: mmap.mmap, count: int, likes: State) -> State:
    """Tensors [count, ...] in ``memory``, each like one of ``likes`` [1, ...]."""
    columns, begin = {}, 0
    for name, like in likes.items():
        flat = torch.frombuffer(memory, dtype=like.dtype, count=count * like.numel(), offset=begin)
        columns[name], begin = flat.view(count, *like.shape[1:]), begin + _bytes(count, like)
    return columns
