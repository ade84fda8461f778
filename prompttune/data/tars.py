"""WebDataset shards: tar files in which the members of a sample are adjacent and share a name.

The convention is that of https://github.com/webdataset/webdataset: a sample's key is the member's path up to the first
dot of its base name, and the text after that dot is the kind of member. Members are looked up once and read in place.
"""

from __future__ import annotations

import io
import json
import lzma
import posixpath
import re
import tarfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from prompttune.data.text import text_of
from prompttune.errors import PrompttuneError, UsageError, first_line
from prompttune.images import is_image

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
"""Suffixes of shards, in upper or lower case."""
TEXT_BYTES = 2**24
"""Largest size in bytes of a text member that is read."""
MOST_NAMES = 10**6
"""Largest number of names from braces."""
JSON_PREFIX = "json:"
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")

_DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError)
"""Errors of ``tarfile`` and the decompressors for a damaged file."""


class DamagedShardError(PrompttuneError):
    """The shard is damaged or cut short, or is not a tar file; the message is the reason, without the shard's name."""


def is_shard(name: str) -> bool:
    """Whether a file name is a shard's."""
    return name.lower().endswith(SHARD_SUFFIXES)


def expand_braces(text: str) -> list[str]:
    """Expand a pattern with braces into names, in a shell's order: ``shard-{000..009}.tar``, ``{train,val}.tar``.

    A range counts up or down and keeps the width of numbers with leading zeros. Braces may be nested; braces without a
    comma or a range, and unclosed ones, are ordinary characters.

    Raises:
        UsageError: the pattern stands for more than a million names.
    """
    opened: list[list[list[str]]] = [[[""]]]  # for the text and each open brace, the names of every alternative

    def append(ends: list[str]) -> None:
        if len(names := opened[-1][-1]) * len(ends) > MOST_NAMES:
            raise UsageError(f"{text} stands for more than {MOST_NAMES} names")
        opened[-1][-1] = [f"{name}{end}" for name in names for end in ends]

    for token in re.split("([{},])", text):
        if token == "{":
            opened.append([[""]])
        elif token == "," and len(opened) > 1:
            opened[-1].append([""])
        elif token == "}" and len(opened) > 1:
            append(_alternatives(opened.pop()))
        else:
            append([token])
    while len(opened) > 1:
        for number, names in enumerate(opened.pop()):
            append(["," if number else "{"])
            append(names)
    return opened[0][0]


def _alternatives(inside: list[list[str]]) -> list[str]:
    """The names that a closed pair of braces stands for."""
    if len(inside) > 1:
        return [name for names in inside for name in names]
    found = _RANGE.fullmatch(inside[0][0]) if len(inside[0]) == 1 else None
    if found is None:
        return [f"{{{name}}}" for name in inside[0]]
    first, last = map(int, found.groups())
    if abs(last - first) >= MOST_NAMES:
        raise UsageError(f"{{{found[0]}}} stands for more than {MOST_NAMES} names")
    width = max(map(len, found.groups())) if re.search(r"\b0\d", found[0]) else 0
    step = 1 if first <= last else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a sample."""

    key: str
    name: str
    kind: str
    """Text after the first dot, in lower case."""
    size: int
    offset: int | None = None
    """Offset of its bytes in the file; None in a compressed shard, and for a link."""
    content: bytes | None = None
    """Content of a requested text member, and of an image without an offset."""

    @property
    def is_image(self) -> bool:
        """Whether its last extension is an image's."""
        return is_image(f"_.{self.kind}")


def samples(shard: Path, texts: Collection[str] = ()) -> Iterator[list[Member]]:
    """The members of each sample, in order.

    Args:
        shard: the file, in any compression that Python's ``tarfile`` reads.
        texts: kinds of members whose content is also read.

    Raises:
        DamagedShardError: the shard cannot be read any further; all samples before the damage have been returned.
    """
    damage: Exception | None = None
    members: list[Member] = []
    try:
        for member in _members(shard, texts):
            if members and member.key != members[0].key:
                yield members
                members = []
            members.append(member)
    except _DAMAGE as problem:
        damage = problem
    if members:
        yield members
    if damage is not None:
        raise DamagedShardError(first_line(damage))


def image_of(members: Collection[Member]) -> Member | None:
    """The image of a sample: the first member whose kind is an image's (``jpg``), else by extension (``left.jpg``)."""
    images = [member for member in members if member.is_image]
    return next((member for member in images if "." not in member.kind), next(iter(images), None))


def read_member(shard: Path, offset: int, size: int) -> bytes:
    """The bytes of a member; raises :class:`OSError` with the reason if they cannot be read."""
    try:
        with shard.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
    except OSError as problem:
        raise OSError(f"cannot read the shard: {problem.strerror or first_line(problem)}") from None
    if len(data) < size:
        raise OSError("the shard is cut short inside this member")
    return data


def _members(shard: Path, texts: Collection[str]) -> Iterator[Member]:
    with tarfile.open(shard, "r:*", tarinfo=_Header) as archive:
        while (header := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile would hold the header of every member
            if header.size < 0:
                raise tarfile.ReadError("a member of negative size")
            folder, base = posixpath.split(header.name)
            stem, dot, kind = base.partition(".")
            if stem and dot and (header.isreg() or header.islnk() or header.issym()):
                yield _member(archive, header, posixpath.join(folder, stem), kind.lower(), texts)


def _member(archive: tarfile.TarFile, header: tarfile.TarInfo, key: str, kind: str, texts: Collection[str]) -> Member:
    bare = Member(key, header.name, kind, header.size)
    if not header.isreg():
        return bare
    offset = header.offset_data if isinstance(archive.fileobj, io.BufferedReader) and not header.issparse() else None
    most = TEXT_BYTES if kind in texts else header.size if bare.is_image and offset is None else None
    content = None if most is None else _content(archive, header, most)
    return Member(key, header.name, kind, header.size, offset, content)


def _content(archive: tarfile.TarFile, header: tarfile.TarInfo, most: int) -> bytes:
    stream = archive.extractfile(header)
    return b"" if stream is None else stream.read(most)


@dataclass(frozen=True)
class TextKey:
    """The place of a text, such as a label, in a sample."""

    kind: str
    field: str | None = None
    """Field of a JSON member; None for a text member."""

    @classmethod
    def parse(cls, text: str) -> TextKey:
        """Read ``cls`` or ``json:FIELD``; raises :class:`UsageError` for an empty name."""
        is_json = text.startswith(JSON_PREFIX)
        kind, field = ("json", text.removeprefix(JSON_PREFIX)) if is_json else (text.removeprefix(".").lower(), None)
        if not (field if is_json else kind):
            raise UsageError(f"{text!r} names no member of a sample; give one such as cls, or {JSON_PREFIX}FIELD")
        return cls(kind, field)

    def of(self, members: Collection[Member]) -> str | None:
        """The text, if its kind was read; None if the sample does not have it or it cannot be read."""
        try:
            found = next(one.content for one in members if one.kind == self.kind and one.content is not None)
            content = found.decode("utf-8-sig")
            return text_of(content.strip() if self.field is None else _scalar(json.loads(content)[self.field]))
        except (StopIteration, KeyError, TypeError, ValueError, RecursionError):
            return None


def _scalar(value: object) -> object:
    """The value, unless it is a list or an object, which cannot be a label."""
    return None if isinstance(value, list | dict) else value


class _Header(tarfile.TarInfo):
    """A header that tells a damaged end from a proper one; ``tarfile`` treats each unreadable header as the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it is cut short: the end mark is missing")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError:
            if not any(buf):  # the end mark
                raise
            raise tarfile.ReadError("the header of a member is damaged") from None
