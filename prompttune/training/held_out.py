"""The list of a run's validation images, ``held_out.json``: names relative to the data, labels and digests.

A folder that has grown is split differently with the same seed, so validation images may be among the trained ones. An
evaluation of a run therefore reads which images it held out, and checks that they have not changed.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prompttune.data.base import file_at, files_at
from prompttune.errors import CheckpointError, DataError, shortened
from prompttune.files import read_json, write_json
from prompttune.training.state import HELD_OUT_FILE

FORMAT_VERSION = 1
READERS = 4
"""Number of threads that read files to compute digests."""

OnImage = Callable[[int, int], None]
"""Called with the number of finished images and of all images."""


@dataclass(frozen=True)
class HeldImage:
    """One held-out image."""

    image: str
    """Path relative to the data's folder, or a name such as ``demo/digits/val[17]``."""
    label: str | None
    """Name of its class; None for a mask, and if only reading the image would tell."""
    sha256: str | None
    """Digest of its file and of its annotation after it; None without an own or a readable file."""


@dataclass(frozen=True)
class HeldOut:
    """The images that a run held out, in their order."""

    images: tuple[HeldImage, ...]
    train_images: int
    """Number of images that the run trained on."""

    @classmethod
    def of(cls, source: Any, train_images: int, on_image: OnImage | None = None) -> HeldOut:
        """List the images of a source, reading each file once."""
        return cls(tuple(_listed(source, range(len(source)), on_image)), train_images)

    def write(self, folder: Path, data: str) -> None:
        """Write the file atomically."""
        head = {"format_version": FORMAT_VERSION, "data": data, "train_images": self.train_images}
        write_json(folder / HELD_OUT_FILE, {**head, "images": [asdict(one) for one in self.images]})

    @classmethod
    def read(cls, folder: Path) -> HeldOut | None:
        """Read the file; None for a run of a version that did not write it.

        Raises:
            CheckpointError: the file is damaged, or of another version.
        """
        file = folder / HELD_OUT_FILE
        if not file.exists():
            return None
        values = read_json(file, CheckpointError, "list of held-out images")
        if (version := values.get("format_version")) != FORMAT_VERSION:
            raise CheckpointError(f"{file} has format {version!r}, this prompttune reads {FORMAT_VERSION}")
        try:
            return cls(tuple(HeldImage(**one) for one in values["images"]), int(values["train_images"]))
        except (KeyError, TypeError, ValueError) as problem:
            raise CheckpointError(f"{file} is damaged ({problem!r}); give --data to score other images") from None

    def lists(self, source: Any) -> bool:
        """Whether these are the images of a source, by name and order."""
        return [one.image for one in self.images] == [image_name(source, index) for index in range(len(source))]

    def find(self, named: Mapping[str, Any], where: str, on_image: OnImage | None = None) -> dict[str, list[int]]:
        """Find the images among the current splits of the data.

        Args:
            named: sources by split.
            where: name of the data in messages.
            on_image: called while the files are checked.

        Returns:
            Indices by split, for the splits with some of the images.

        Raises:
            DataError: an image is missing, or its file or label has changed.
        """
        places = {image_name(source, index): (split, index) for split, source in named.items()
                  for index in range(len(source))}  # fmt: skip
        self._refuse([one for one in self.images if one.image not in places], "missing", where)
        found: dict[str, list[int]] = {}
        for split, index in (places[one.image] for one in self.images):
            found.setdefault(split, []).append(index)
        now = {one.image: one for split, indices in found.items() for one in _listed(named[split], indices, on_image)}
        pairs = [(one, now[one.image]) for one in self.images]
        self._refuse([one for one, new in pairs if one.sha256 not in (None, new.sha256)], "changed", where)
        self._refuse([one for one, new in pairs if one.label not in (None, new.label)], "labelled anew", where)
        return found

    def _refuse(self, bad: Sequence[HeldImage], how: str, where: str) -> None:
        if bad:
            raise DataError(
                f"{len(bad)} of the {len(self.images)} images that the run held out are {how} in {where}: "
                f"{shortened([one.image for one in bad])}; restore them, or score other images with --data"
            )


def image_name(source: Any, index: int) -> str:
    """Path of an image relative to the data's folder, or its description if it does not have its own file."""
    file = file_at(source, index)
    return str(source.describe(index)) if file is None else str(file[-1])


def _listed(source: Any, indices: Sequence[int], on_image: OnImage | None) -> list[HeldImage]:
    labels = source.labels()
    images = []
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(lambda index: _digest(source, index), indices)
        for index, digest in zip(indices, digests, strict=True):
            label = None if labels is None else source.classes[labels[index]]
            images.append(HeldImage(image_name(source, index), label, digest))
            if on_image is not None:
                on_image(len(images), len(indices))
    return images


def _digest(source: Any, index: int) -> str | None:
    files = files_at(source, index)
    digest = hashlib.sha256()
    with contextlib.suppress(OSError):
        for file in files:
            digest.update(Path(file).read_bytes())
        return digest.hexdigest() if files else None
    return None
