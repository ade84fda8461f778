"""Images in WebDataset shards, see :mod:`prompttune.data.tars`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from prompttune.data.tars import DamagedShardError, Member, TextKey, image_of, is_shard, read_member, samples
from prompttune.errors import UsageError
from prompttune.serve.infer.items import BytesPayload, Encoded, Item, Payload
from prompttune.serve.infer.settings import SourceSettings
from prompttune.serve.infer.sources.base import NO_TASK, Bounded, SourceContext, printable

NAMED_MEMBERS = 5
"""Largest number of a sample's members in an error message."""


@dataclass(frozen=True, slots=True)
class MemberPayload(Encoded):
    """An encoded image inside an uncompressed tar file."""

    shard: Path
    offset: int
    """Offset of its first byte."""
    size: int

    def stream(self) -> BinaryIO:
        """Read the member."""
        return io.BytesIO(read_member(self.shard, self.offset, self.size))


class ShardSource(Bounded):
    """Each sample of a tar file is an item; its number, counted from 0, is the item's row.

    The image is the first member whose kind is an image format (``jpg``), else the first whose last extension is
    (``left.jpg``). Additional images are counted as ``further_images``. An item's source is the path of the shard, a
    slash and the name of the member. Images of a compressed shard are read together with the items; those of other
    shards are read when their payload is opened.

    A shard that is damaged or cut short gives the samples before the damage and then one item with an error that names
    the shard; the other sources continue.

    Args:
        path: the shard, in any compression that Python's ``tarfile`` reads.
        label_key: kind of the text member with the true label, such as ``cls`` or ``txt``, or ``json:FIELD`` for a
            field of the JSON member. A sample without it has no label.
        task_key: kind of the member with the task, in the same form; a sample without it is an item with an error.

    Raises:
        UsageError: the file does not exist, or a key is empty.
    """

    has_columns = True

    def __init__(self, path: Path, label_key: str | None = None, task_key: str | None = None) -> None:
        super().__init__()
        if not path.is_file():
            raise UsageError(f"no shard {path}")
        self._path = path
        self._label = None if label_key is None else TextKey.parse(label_key)
        self._task = None if task_key is None else TextKey.parse(task_key)
        self._further = 0

    @classmethod
    def takes(cls, name: str, settings: SourceSettings) -> bool:  # noqa: ARG003
        """See :class:`Source`."""
        return is_shard(name) and not Path(name).is_dir()

    @classmethod
    def open(cls, name: str, context: SourceContext) -> ShardSource:
        """See :class:`Source`."""
        return cls(Path(name), context.settings.label_column, context.settings.task_column)

    def counts(self) -> Mapping[str, int]:
        """``further_images``: number of images in samples beyond their first."""
        return {"further_images": self._further} if self._further else {}

    def _items(self) -> Iterator[Item]:
        texts = [key.kind for key in (self._label, self._task) if key is not None]
        row = 0
        try:
            for members in samples(self._path, texts):
                yield self._sample(row, members)
                row += 1
        except DamagedShardError as problem:
            where = f"damaged after sample {row - 1}" if row else "not a tar file, or damaged at its beginning"
            error = f"the shard is {where}: {problem}"
            yield Item(printable(str(self._path)), row=row, error=error, container=self._path)

    def _sample(self, row: int, members: Sequence[Member]) -> Item:
        image = image_of(members)
        self._further += max(sum(member.is_image for member in members) - 1, 0)
        target = self._label.of(members) if self._label else None
        task = self._task.of(members) if self._task else None
        source = printable(f"{self._path}/{image.name if image else members[0].key}")
        payload = None if image is None else self._payload(image)
        if image is None:
            names = [member.kind for member in members]
            more = ", …" if len(names) > NAMED_MEMBERS else ""
            error: str | None = f"the sample has no image; its members: {', '.join(names[:NAMED_MEMBERS])}{more}"
        elif payload is None:
            error = "the image is a link inside the shard: store it as a file"
        else:
            error = NO_TASK if self._task and task is None else None
        payload = payload if error is None else None
        return Item(source, payload, row=row, task=task, target=target, error=error, container=self._path)

    def _payload(self, image: Member) -> Payload | None:
        if image.offset is not None:
            return MemberPayload(self._path, image.offset, image.size)
        return None if image.content is None else BytesPayload(image.content)
