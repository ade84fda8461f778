"""WebDataset shards on a local disk, read by index.

timm's own reader streams shards: their shuffled order depends on the number of workers, and unreadable images are
dropped silently. Here :mod:`prompttune.data.tars` looks the members up, so that shards behave like any other data set.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from prompttune.data.base import LabelledSource, Parts, numbered
from prompttune.data.files import Walk
from prompttune.data.split_names import ALL, TEST, split_of, splits_in
from prompttune.data.tars import DamagedShardError, Member, TextKey, image_of, is_shard, read_member, samples
from prompttune.errors import DataError
from prompttune.images import read_image

logger = logging.getLogger("prompttune")

INFO_FILES = ("_info.json", "info.json")
"""timm's description of the splits."""


@dataclass(frozen=True)
class _Image:
    shard: Path
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Split:
    shards: list[Path]
    label: TextKey


class TarSource(LabelledSource):
    """Images inside tar files."""

    def __init__(self, images: Sequence[_Image], labels: Sequence[int], classes: Sequence[str]) -> None:
        super().__init__(labels, classes)
        self.images = list(images)

    def image(self, index: int) -> Image.Image:
        """See :class:`LabelledSource`."""
        image = self.images[index]
        return read_image(read_member(image.shard, image.offset, image.size))

    def describe(self, index: int) -> str:
        """Path of the shard, with the name inside it."""
        return f"{self.images[index].shard}/{self.images[index].name}"


def load_wds(name: str, root: str | None) -> Parts:
    """Load local shards from the folder ``root``/``name``, else from ``root``.

    Splits come from timm's ``_info.json``. Without this file, a shard belongs to the split that its name contains, and
    all shards are one split if no name contains one. Classes are numbered; images with a negative label are skipped, as
    in timm. A test split without labels is skipped with a warning.

    Raises:
        DataError: the folder does not exist, or a shard cannot be read or lacks images or labels.
    """
    folder = _folder(name, root)
    splits = _described_splits(folder) or _named_splits(folder)
    found: dict[str, list[tuple[_Image, int]]] = {}
    for split, part in splits.items():
        try:
            found[split] = list(_samples(part))
        except DataError as problem:
            if split != TEST or len(splits) < 2:
                raise
            logger.warning("the split %s of %s is not used: %s", split, folder, problem)
    classes = numbered([label for samples in found.values() for _, label in samples])
    named = {
        split: TarSource([image for image, _ in samples], [label for _, label in samples], classes)
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


def _described_splits(folder: Path) -> dict[str, _Split]:
    """The splits in the description file; empty without such a file."""
    file = next((folder / known for known in INFO_FILES if (folder / known).is_file()), None)
    if file is None:
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))["splits"]
        return {split: _described(folder, part) for theirs, part in known.items() if (split := split_of(theirs))}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{file} does not describe splits in timm's form: {problem!r}") from None


def _described(folder: Path, info: Mapping[str, Any]) -> _Split:
    field = info.get("alt_label")
    return _Split([folder / file for file in info["filenames"]], TextKey("json", field) if field else TextKey("cls"))


def _named_splits(folder: Path) -> dict[str, _Split]:
    """Splits by the names of the shards."""
    shards = [path for path in Walk(folder, wanted=is_shard).paths if path.parent == folder]
    if not shards:
        raise DataError(f"{folder} holds no .tar shards")
    found: dict[str, list[Path]] = {}
    for shard in shards:
        splits = splits_in(shard.name)
        if len(splits) > 1:
            raise DataError(f"the name of the shard {shard} has several splits in it: {' and '.join(sorted(splits))}")
        found.setdefault(next(iter(splits), ALL), []).append(shard)
    if ALL in found and len(found) > 1:
        raise DataError(f"the name of the shard {found[ALL][0]} does not name a split, but other names do: rename it")
    return {split: _Split(part, TextKey("cls")) for split, part in found.items()}


def _samples(split: _Split) -> Iterator[tuple[_Image, int]]:
    """The image and the label of each sample in a split."""
    for shard in split.shards:
        try:
            # read all samples first: a sample that damage has cut would lack an image or a label
            for members in list(samples(shard, (split.label.kind,))):
                where = f"sample {members[0].key} in {shard}"
                image = image_of(members)
                if image is None:
                    raise DataError(f"{where} has no image")
                if image.offset is None:
                    raise DataError(f"{where}: its image is a link or compressed: store it as a file, in a plain .tar")
                if (label := _label(members, split.label, where)) >= 0:
                    yield _Image(shard, image.name, image.offset, image.size), label
        except DamagedShardError as problem:
            raise DataError(f"cannot read the shard {shard}: {problem}") from None


def _label(members: Sequence[Member], key: TextKey, where: str) -> int:
    if all(one.kind != key.kind or one.content is None for one in members):
        raise DataError(f"{where} has no .{key.kind} member for its label")
    text = key.of(members)
    try:
        return int(text or "")
    except ValueError:
        raise DataError(f"the label of {where} is not a class index, but {text!r}") from None
