"""WebDataset shards on a local disk, read by index.

timm's reader streams shards: the order it shuffles them into depends on the number of workers, and an image that cannot
be read is dropped without a word. Here timm says which shards a split has and where the labels are; the members of
the tar files are then looked up once and read where they stand, so that shards behave like any other data set.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from prompttune.data.base import ImageSource, Parts
from prompttune.data.split_names import ALL, TEST, split_of, splits_in
from prompttune.data.timm_factory import numbered
from prompttune.errors import DataError, MissingExtraError
from prompttune.images import EXTENSIONS, read_image

logger = logging.getLogger("prompttune")

INFO_FILES = ("_info.json", "info.json")
"""timm's description of the splits."""


@dataclass(frozen=True)
class _Member:
    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with self.shard.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


@dataclass(frozen=True)
class _Split:
    shards: list[Path]
    label_key: str
    """Field of the JSON member that holds the label; empty if a ``.cls`` member holds it."""


class ShardSource(ImageSource):
    """Images inside tar files."""

    def __init__(self, images: Sequence[_Member], labels: Sequence[int], classes: Sequence[str]) -> None:
        self.images = list(images)
        self.classes = list(classes)
        self._labels = list(labels)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`ImageSource`."""
        return read_image(self.images[index].read()), self._labels[index]

    def describe(self, index: int) -> str:
        """Path of the shard, and the name inside it."""
        return f"{self.images[index].shard}/{self.images[index].name}"

    def labels(self) -> list[int]:
        """See :class:`ImageSource`."""
        return list(self._labels)


def load_wds(name: str, root: str | None) -> Parts:
    """Load local shards from the folder ``root``/``name``, from ``root`` if there is no such folder.

    Splits are those of timm's ``_info.json``; without that file, a shard belongs to the split whose name stands in its
    own, and all of them are one if none is named. Classes are numbered; images with a negative label are left out, as
    timm does. A test split that has no labels is left out, with a warning.

    Raises:
        MissingExtraError: webdataset is not installed.
        DataError: there is no such folder, or a shard cannot be read or lacks images or labels.
    """
    try:
        import webdataset  # noqa: F401  # timm's reader needs it
    except ImportError:
        raise MissingExtraError("webdataset", "data") from None
    folder = _folder(name, root)
    splits = _described_splits(name, folder) or _named_splits(folder)
    found: dict[str, list[tuple[_Member, int]]] = {}
    for split, part in splits.items():
        try:
            found[split] = list(_samples(part))
        except DataError as problem:
            if split != TEST or len(splits) < 2:
                raise
            logger.warning("the split %s of %s is not used: %s", split, folder, problem)
    classes = numbered([label for samples in found.values() for _, label in samples])
    named = {
        split: ShardSource([image for image, _ in samples], [label for _, label in samples], classes)
        for split, samples in found.items()
    }
    return Parts(named, str(folder))


def _folder(name: str, root: str | None) -> Path:
    base = Path(root or "").expanduser()
    for folder in (base / name, *([base] if root else [])):
        if folder.is_dir():
            return folder
    raise DataError(f"no folder {base / name}; wds/ reads shards from a local folder: download them and give it as "
                    "--data-root")  # fmt: skip


def _described_splits(name: str, folder: Path) -> dict[str, _Split]:
    """The splits of the description file; none if there is no such file."""
    file = next((folder / known for known in INFO_FILES if (folder / known).is_file()), None)
    if file is None:
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))["splits"]
        return {split: _timm_split(name, folder, theirs) for theirs in known if (split := split_of(theirs))}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{file} does not describe splits as timm wants it: {problem!r}") from None


def _timm_split(name: str, folder: Path, split: str) -> _Split:
    from timm.data.dataset_factory import create_dataset

    info: Any = create_dataset(f"wds/{name}", root=str(folder), split=split).reader.split_info
    return _Split([folder / file for file in info.filenames], info.alt_label)


def _named_splits(folder: Path) -> dict[str, _Split]:
    """Splits by the names of the shards."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"{folder} holds no .tar shards")
    found: dict[str, list[Path]] = {}
    for shard in shards:
        splits = splits_in(shard.name)
        if len(splits) > 1:
            raise DataError(f"the name of the shard {shard} has several splits in it: {' and '.join(sorted(splits))}")
        found.setdefault(next(iter(splits), ALL), []).append(shard)
    if ALL in found and len(found) > 1:
        raise DataError(f"the name of the shard {found[ALL][0]} tells no split, those of others do: rename it")
    return {split: _Split(part, "") for split, part in found.items()}


def _samples(split: _Split) -> Iterator[tuple[_Member, int]]:
    """The image and the label of each sample of a split."""
    for shard in split.shards:
        for key, members in _grouped(shard):
            image = next((member for extension, member in members.items() if f".{extension}" in EXTENSIONS), None)
            if image is None:
                raise DataError(f"sample {key} in {shard} has no image")
            if (label := _label(key, members, split.label_key, shard)) >= 0:
                yield image, label


def _grouped(shard: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Members of a shard that follow one another and share a name: the name, and the members by extension."""
    from webdataset.tariterators import base_plus_ext

    key: str | None = None
    members: dict[str, _Member] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                base, extension = base_plus_ext(entry.name) if entry.isfile() else (None, None)
                if base is None or extension is None:
                    continue
                if base != key:
                    if members:
                        yield str(key), members
                    key, members = base, {}
                members[extension.lower()] = _Member(shard, entry.name, entry.offset_data, entry.size)
    except (OSError, tarfile.TarError) as problem:
        raise DataError(f"cannot read the shard {shard}: {problem}; shards are uncompressed tar files") from None
    if members:
        yield str(key), members


def _label(key: str, members: dict[str, _Member], field: str, shard: Path) -> int:
    member = members.get("json" if field else "cls")
    where = f"sample {key} in {shard}"
    if member is None:
        raise DataError(f"{where} has no .{'json' if field else 'cls'} member for its label")
    try:
        content = member.read()
        return int(json.loads(content)[field]) if field else int(content)
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(f"the label of {where} is not a class index: {problem!r}") from None
