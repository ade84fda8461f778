"""WebDataset shards: tar files in which the members of a sample follow one another and share a name.

The convention is that of https://github.com/webdataset/webdataset: a sample's key is the member's path up to the first
dot of its base name, and what follows that dot is the kind of member.
"""

from __future__ import annotations

import io
import itertools
import json
import lzma
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from prompttune.errors import UsageError, first_line
from prompttune.images import EXTENSIONS
from prompttune.serve.infer.items import BytesPayload, Encoded, Item, Payload
from prompttune.serve.infer.sources.common import NO_TASK, Bounded, printable, text_of

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
"""Files with these endings, in upper or lower case, are shards."""
JSON_PREFIX = "json:"
TEXT_BYTES = 2**24
"""A member that holds a label or a task is read up to this size."""
NAMED_MEMBERS = 5
"""Members of a sample that an error names at most."""
MOST_NAMES = 10**6
"""What braces may stand for at most."""

_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError)
"""What ``tarfile`` and the decompressors raise about a damaged file."""
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


def is_shard(name: str) -> bool:
    """Whether a file name is that of a shard."""
    return name.lower().endswith(SHARD_SUFFIXES)


@dataclass(frozen=True, slots=True)
class MemberPayload(Encoded):
    """An encoded image inside a tar file that is not compressed."""

    shard: Path
    offset: int
    """Where its bytes begin."""
    size: int

    def stream(self) -> BinaryIO:
        """Read the member."""
        try:
            with self.shard.open("rb") as stream:
                stream.seek(self.offset)
                data = stream.read(self.size)
        except OSError as problem:
            raise OSError(f"cannot read the shard: {problem.strerror or first_line(problem)}") from None
        if len(data) < self.size:
            raise OSError("the shard is cut short inside this member")
        return io.BytesIO(data)


class ShardSource(Bounded):
    """A sample of a tar file is an item; its number, counted from 0, is the item's row.

    The image is the first member whose kind is that of an image (``jpg``); where there is none, the first whose last
    extension is (``left.jpg``). Further ones are counted as ``further_images``. An item's source is the path of the
    shard, a slash and the name of the member. Images of a compressed shard are read while the items are; those of
    others stay where they are until their payload is opened.

    A shard that is damaged or cut short gives the samples before the damage and then one item with an error, which
    names the shard; other sources go on.

    Args:
        path: the shard, whatever compression Python's ``tarfile`` knows.
        label_key: kind of the text member that holds the true label, such as ``cls`` or ``txt``, or ``json:FIELD`` for
            a field of the JSON member. A sample may have none.
        task_key: the same for the task of a sample; one without it is an item with an error.

    Raises:
        UsageError: there is no such file, or a key is empty.
    """

    def __init__(self, path: Path, label_key: str | None = None, task_key: str | None = None) -> None:
        super().__init__()
        if not path.is_file():
            raise UsageError(f"no shard {path}")
        self._path = path
        self._label = None if label_key is None else _Key.parse(label_key)
        self._task = None if task_key is None else _Key.parse(task_key)
        self._further = 0

    def counts(self) -> Mapping[str, int]:
        """``further_images``: images of samples that have another one already."""
        return {"further_images": self._further} if self._further else {}

    def _items(self) -> Iterator[Item]:
        samples = itertools.groupby(self._members(), key=lambda member: member.key)
        for row, (key, members) in enumerate(samples):
            if key is None:
                reason = next(members).name
                where = f"damaged behind sample {row - 1}" if row else "not a tar file, or damaged at its beginning"
                error = f"the shard is {where}: {reason}"
                yield Item(printable(str(self._path)), row=row, error=error, container=self._path)
                return
            yield self._sample(key, row, members)

    def _sample(self, key: str, row: int, members: Iterator[_Member]) -> Item:
        whole: _Member | None = None
        partly: _Member | None = None
        images = 0
        texts: dict[str, bytes] = {}
        names: list[str] = []
        for member in members:
            images += member.is_image
            if f".{member.kind}" in EXTENSIONS:
                whole = whole or member
            elif member.is_image:
                partly = partly or member
            elif len(names) <= NAMED_MEMBERS:
                names.append(member.kind)
            if member.text is not None:
                texts.setdefault(member.kind, member.text)
        image = whole or partly
        self._further += max(images - 1, 0)
        target = self._label.of(texts) if self._label else None
        task = self._task.of(texts) if self._task else None
        source = printable(f"{self._path}/{image.name if image else key}")
        if image is None:
            more = ", …" if len(names) > NAMED_MEMBERS else ""
            error: str | None = f"the sample has no image; its members: {', '.join(names[:NAMED_MEMBERS])}{more}"
        elif image.payload is None:
            error = "the image is a link inside the shard: store it as a file"
        else:
            error = NO_TASK if self._task and task is None else None
        payload = image.payload if image and error is None else None
        return Item(source, payload, row=row, task=task, target=target, error=error, container=self._path)

    def _members(self) -> Iterator[_Member]:
        """The members in order; where the file is damaged, one without a key whose name is the reason."""
        try:
            with tarfile.open(self._path, "r:*", tarinfo=_Header) as archive:
                while (header := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # tarfile would hold the header of every member
                    if header.size < 0:
                        raise tarfile.ReadError("a member of negative size")
                    folder, base = posixpath.split(header.name)
                    stem, dot, kind = base.partition(".")
                    if stem and dot and (header.isreg() or header.islnk() or header.issym()):
                        yield self._member(archive, header, posixpath.join(folder, stem), kind.lower())
        except _DAMAGE as problem:
            yield _Member(None, first_line(problem), "")

    def _member(self, archive: tarfile.TarFile, header: tarfile.TarInfo, key: str, kind: str) -> _Member:
        if not header.isreg():
            return _Member(key, header.name, kind)
        if any(wanted and wanted.kind == kind for wanted in (self._label, self._task)):
            return _Member(key, header.name, kind, text=_content(archive, header, TEXT_BYTES))
        member = _Member(key, header.name, kind)
        if not member.is_image:
            return member
        payload: Payload
        if isinstance(archive.fileobj, io.BufferedReader) and not header.issparse():
            payload = MemberPayload(self._path, header.offset_data, header.size)
        else:
            payload = BytesPayload(_content(archive, header, header.size))
        return _Member(key, header.name, kind, payload)


@dataclass(frozen=True, slots=True)
class _Member:
    key: str | None
    name: str
    kind: str
    """What follows the first dot, in lower case."""
    payload: Payload | None = None
    """Of an image that is a file."""
    text: bytes | None = None
    """Of a member that holds a label or a task."""

    @property
    def is_image(self) -> bool:
        return posixpath.splitext(f"_.{self.kind}")[1] in EXTENSIONS


@dataclass(frozen=True)
class _Key:
    """Where in a sample a text stands."""

    kind: str
    field: str | None

    @classmethod
    def parse(cls, text: str) -> _Key:
        is_json = text.startswith(JSON_PREFIX)
        kind, field = ("json", text.removeprefix(JSON_PREFIX)) if is_json else (text.removeprefix(".").lower(), None)
        if not (field if is_json else kind):
            raise UsageError(f"{text!r} names no member of a sample; give one such as cls, or {JSON_PREFIX}FIELD")
        return cls(kind, field)

    def of(self, texts: Mapping[str, bytes]) -> str | None:
        """The text, None if the sample has none or it cannot be read."""
        try:
            content = texts[self.kind].decode("utf-8-sig")
            return text_of(content.strip() if self.field is None else _scalar(json.loads(content)[self.field]))
        except (KeyError, TypeError, ValueError, RecursionError):
            return None


def _scalar(value: object) -> object:
    """A list or an object is no label."""
    return None if isinstance(value, list | dict) else value


class _Header(tarfile.TarInfo):
    """Tells a damaged end from a proper one: ``tarfile`` takes each header that it cannot read for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it is cut short: there is no mark of the end")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError:
            if not any(buf):  # the mark of the end
                raise
            raise tarfile.ReadError("the header of a member is damaged") from None


def _content(archive: tarfile.TarFile, header: tarfile.TarInfo, most: int) -> bytes:
    stream = archive.extractfile(header)
    return b"" if stream is None else stream.read(most)


def expand_braces(text: str) -> list[str]:
    """The names that a pattern with braces stands for, in order: ``shard-{000..009}.tar``, ``{train,val}.tar``.

    A range counts up or down and keeps the width of numbers that begin with 0. Braces may be nested; those that hold
    neither a comma nor a range, or are never closed, stand for themselves.

    Raises:
        UsageError: there are more than a million names.
    """
    parts = _first_braces(text)
    if parts is None:
        return [text]
    before, inside, after = parts
    rest = expand_braces(after)
    middles = _alternatives(inside)
    if len(middles) * len(rest) > MOST_NAMES:
        raise UsageError(f"{text} stands for more than {MOST_NAMES} names")
    return [f"{before}{middle}{end}" for middle in middles for end in rest]


def _first_braces(text: str) -> tuple[str, str, str] | None:
    """What stands before, in and after the first pair of braces; None if there is none."""
    for start in (place for place, character in enumerate(text) if character == "{"):
        depth = 0
        for place in range(start, len(text)):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[:start], text[start + 1 : place], text[place + 1 :]
    return None


def _alternatives(inside: str) -> list[str]:
    if found := _RANGE.fullmatch(inside):
        return _numbers(*found.groups())
    parts, depth = [""], 0
    for character in inside:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if len(parts) == 1:
        return [f"{{{one}}}" for one in expand_braces(inside)]
    return [one for part in parts for one in expand_braces(part)]


def _numbers(first: str, last: str) -> list[str]:
    begin, end = int(first), int(last)
    if abs(end - begin) >= MOST_NAMES:
        raise UsageError(f"{{{first}..{last}}} stands for more than {MOST_NAMES} names")
    padded = any(number.lstrip("-").startswith("0") and len(number.lstrip("-")) > 1 for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if begin <= end else -1
    return [f"{number:0{width}d}" for number in range(begin, end + step, step)]
