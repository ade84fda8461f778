"""From the names on the command line to a source: the kind of each input."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from prompttune.data.files import find_images, matches
from prompttune.data.tars import is_shard
from prompttune.errors import UsageError
from prompttune.serve.infer.items import Item, Source
from prompttune.serve.infer.settings import SourceSettings
from prompttune.serve.infer.sources.common import Bounded
from prompttune.serve.infer.sources.files import FileSource, ListSource
from prompttune.serve.infer.sources.live import LiveSource, is_stream
from prompttune.serve.infer.sources.raw import RawFrames
from prompttune.serve.infer.sources.shards import ShardSource, expand_braces
from prompttune.serve.infer.sources.stdin import JsonReader, ListReader
from prompttune.serve.infer.sources.tables import TABLE_SUFFIXES, TableSource
from prompttune.serve.infer.sources.video import VideoSource, is_video
from prompttune.serve.infer.sources.watch import WatchedFolder

STANDARD_INPUT = "-"
LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})
CLASS_INDEX = "cls"
"""Member of a shard with a class index as text, by WebDataset's convention."""


@dataclass(frozen=True)
class Opened:
    """A source and its properties."""

    source: Source
    frames: bool = False
    """Whether its inputs are frames of a video or a stream."""
    rate: Fraction | None = None
    """Selected frames per second of video, if known."""
    label_is_index: bool = False
    """Whether a true label that is not a class name may be a class index."""


class Chain(Bounded):
    """Bounded sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__()
        self._sources = sources

    @property
    def total(self) -> int | None:
        """Sum of the totals; None if one of them is unknown."""
        totals = [source.total for source in self._sources]
        return None if None in totals else sum(total for total in totals if total is not None)

    def counts(self) -> Mapping[str, int]:
        """Sum of the counts."""
        sums: Counter[str] = Counter()
        for source in self._sources:
            sums.update(source.counts())
        return dict(sums)

    def close(self) -> None:
        """Close all of them."""
        super().close()
        for source in self._sources:
            source.close()

    def _items(self) -> Iterator[Item]:
        for source in self._sources:
            yield from source.items()


def open_source(
    inputs: Sequence[str],
    settings: SourceSettings,
    *,
    stdin: Callable[[], BinaryIO],
    done: Callable[[Item], bool] = lambda _: False,
) -> Opened:
    """Open the named inputs: files, folders, quoted globs, lists, tables, shards, videos; or one stream; or ``-``.

    Args:
        inputs: names of the inputs.
        settings: settings for reading them.
        stdin: opens standard input.
        done: tells, for a watched folder, whether an earlier run has answered an image in its current state.

    Raises:
        UsageError: an input does not exist, or options contradict each other.
        DataError: an input cannot be read.
        MissingExtraError: a library for reading it is not installed.
    """
    if not inputs:
        raise UsageError("name the inputs: files, folders, tables, shards, videos, a stream, or - to read a list")
    alone = [one for one in inputs if one == STANDARD_INPUT or _is_stream(one, settings) or settings.watch]
    if alone and len(inputs) > 1:
        raise UsageError(f"{alone[0]} never ends by itself: give it as the only input")
    if alone:
        return _open_endless(alone[0], settings, stdin, done)
    kinds = [(_kind(one, settings), one) for text in inputs for one in _expanded(text)]
    _check(kinds, settings)
    sources = [
        source
        for kind, group in groupby(kinds, key=lambda pair: pair[0])
        for source in _open(kind, [name for _, name in group], settings)
    ]
    videos = [source for source in sources if isinstance(source, VideoSource)]
    return Opened(
        sources[0] if len(sources) == 1 else Chain(sources),
        frames=len(videos) == len(sources),
        rate=_taken(next((video.rate for video in videos if video.rate), None), settings) if videos else None,
        label_is_index=settings.label_column == CLASS_INDEX and any(kind == "shards" for kind, _ in kinds),
    )


def _is_stream(text: str, settings: SourceSettings) -> bool:
    return settings.input_format == "stream" or (settings.input_format == "auto" and is_stream(text))


def _expanded(text: str) -> list[str]:
    """Expand the braces of shards, and globs; other names stay as they are."""
    found = expand_braces(text) if is_shard(text) and not Path(text).exists() else [text]
    return [match for one in found for match in _matches(one)]


def _matches(text: str) -> list[str]:
    if Path(text).exists() or not glob.has_magic(text):
        return [text]
    return [str(path) for path in matches(text)]


def _kind(name: str, settings: SourceSettings) -> str:
    if settings.input_format != "auto":
        return settings.input_format
    suffix = Path(name).suffix.lower()
    if Path(name).is_dir():
        return "images"
    if suffix in LIST_SUFFIXES:
        return "list"
    if suffix in TABLE_SUFFIXES:
        return "table"
    if is_shard(name):
        return "shards"
    return "video" if is_video(name) else "images"


def _check(kinds: Sequence[tuple[str, str]], settings: SourceSettings) -> None:
    for kind, name in kinds:
        columns = kind in ("table", "shards")
        if settings.task_column is not None and not columns:
            raise UsageError(f"--task-column: {name} has no columns; use a table, shards or JSON lines")
        if settings.image_column is not None and kind != "table":
            raise UsageError(f"--image-column: {name} is not a table")
        if settings.labels is not None and kind == "video":
            raise UsageError(f"--labels: the frames of {name} have no labels")
        if settings.label_column is not None and not columns:
            raise UsageError(f"--labels {settings.label_column}: {name} has no columns; use folder or a .csv file")
        if settings.labels is not None and settings.label_column is None and columns:
            raise UsageError(f"--labels: name the column of {name} that holds the labels")


def _open(kind: str, names: Sequence[str], settings: SourceSettings) -> list[Source]:
    if kind == "images":
        return [FileSource(find_images(names), settings.truth)]
    if kind == "list":
        return [ListSource(Path(name), settings.truth) for name in names]
    columns = (settings.task_column, settings.label_column)
    if kind == "table":
        return [TableSource(Path(name), settings.image_column, *columns) for name in names]
    if kind == "shards":
        return [ShardSource(Path(name), columns[1], columns[0]) for name in names]
    return [VideoSource(name, stride=settings.stride, fps=settings.fps) for name in names]


def _open_endless(
    name: str, settings: SourceSettings, stdin: Callable[[], BinaryIO], done: Callable[[Item], bool]
) -> Opened:
    """A source that is read once and may be endless."""
    if settings.watch:
        _check([("images", name)], settings)
        if not Path(name).is_dir():
            raise UsageError(f"--watch: {name} is not a folder")
        return Opened(WatchedFolder(name, done=done, limit=settings.limit))
    if name != STANDARD_INPUT:
        _check([("video", name)], settings)
        live = LiveSource(
            name,
            stride=settings.stride,
            fps=settings.fps,
            drop=settings.drop or "oldest",
            buffer=settings.buffer,
            reconnects=settings.reconnects,
            limit=settings.limit,
        )
        return Opened(live, frames=True, rate=_taken(None, settings))
    if settings.stdin == "list":
        _check([("list", "a list")], settings)
        return Opened(ListReader(stdin(), labels=settings.truth, limit=settings.limit))
    if settings.stdin == "jsonl":
        return Opened(
            JsonReader(
                stdin(),
                label_key=settings.label_column,
                task_key=settings.task_column or "task",
                limit=settings.limit,
            )
        )
    if settings.frame_size is None:
        raise UsageError("raw frames do not state their size: give --frame-size WIDTHxHEIGHT")
    _check([("video", "standard input")], settings)
    frames = RawFrames(
        stdin(),
        *settings.frame_size,
        settings.stdin,
        stride=settings.stride,
        fps=settings.fps,
        drop=settings.drop or "none",
        buffer=settings.buffer,
        limit=settings.limit,
    )
    return Opened(frames, frames=True, rate=_taken(None, settings))


def _taken(rate: Fraction | None, settings: SourceSettings) -> Fraction | None:
    """Frames per second after the stride and the frame rate limit."""
    strided = None if rate is None else rate / settings.stride
    wanted = None if settings.fps is None else Fraction(settings.fps).limit_denominator(1000)
    return min((one for one in (strided, wanted) if one is not None), default=None)
