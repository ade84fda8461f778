"""From the names on the command line to a source."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

from prompttune.data.files import matches
from prompttune.data.tars import expand_braces, is_shard
from prompttune.errors import UsageError
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.settings import SourceSettings
from prompttune.serve.infer.sources.base import Bounded, Source, SourceContext
from prompttune.serve.infer.sources.registry import SOURCES

STANDARD_INPUT = "-"
CLASS_INDEX = "cls"
"""Member of a shard with a class index as text, by WebDataset's convention."""


@dataclass(frozen=True)
class Opened:
    """A source and its properties."""

    source: Source
    rate: Fraction | None = None
    """Selected frames per second of video, if known."""
    label_is_index: bool = False
    """Whether a true label that is not a class name may be a class index."""


class Chain(Bounded):
    """Bounded sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__()
        self._sources = sources
        self.frames = all(source.frames for source in sources)
        self.rate = next((source.rate for source in sources if source.rate), None)
        totals = [source.total for source in sources]
        self.total = None if None in totals else sum(total for total in totals if total is not None)

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
    kinds = [(kind_of(name, settings), name) for text in inputs for name in _expanded(text)]
    for kind, name in kinds:
        if not kind.bounded and len(inputs) > 1:
            raise UsageError(f"{name} never ends by itself: give it as the only input")
        _check(kind, name, settings)
    context = SourceContext(settings, stdin, done)
    sources = [kind.open(name, context) for kind, name in kinds]
    source = sources[0] if len(sources) == 1 else Chain(sources)
    return Opened(
        source,
        rate=_taken(source.rate, settings) if any(one.frames for one in sources) else None,
        label_is_index=settings.label_column == CLASS_INDEX and any(is_shard(name) for _, name in kinds),
    )


def kind_of(name: str, settings: SourceSettings) -> type[Source]:
    """The source that opens an input; raises :class:`UsageError` for an unknown ``--input-format``."""
    if settings.input_format is not None:
        return SOURCES[settings.input_format]
    return next(kind for kind in reversed(list(SOURCES.values())) if kind.takes(name, settings))


def _expanded(text: str) -> list[str]:
    """Expand the braces of shards, and globs; other names stay as they are."""
    found = expand_braces(text) if is_shard(text) and not Path(text).exists() else [text]
    return [match for one in found for match in _matches(one)]


def _matches(text: str) -> list[str]:
    if re.match(r"\w+:", text) or Path(text).exists() or not glob.has_magic(text):
        return [text]
    return [str(path) for path in matches(text)]


def _check(kind: type[Source], name: str, settings: SourceSettings) -> None:
    """Raise :class:`UsageError` for an option that the source does not have."""
    shown = "standard input" if name == STANDARD_INPUT else name
    column = settings.label_column
    if settings.task_column is not None and not kind.has_columns:
        raise UsageError(f"--task-column: {shown} has no columns; use a table, shards or JSON lines")
    if settings.image_column is not None and not kind.has_image_column:
        raise UsageError(f"--image-column: {shown} is not a table")
    if settings.labels is not None and kind.frames:
        raise UsageError(f"--labels: the frames of {shown} have no labels")
    if column is not None and not kind.has_columns:
        raise UsageError(f"--labels {column}: {shown} has no columns; use folder or a .csv file")
    if settings.labels is not None and column is None and kind.has_columns:
        raise UsageError(f"--labels: name the column of {shown} that holds the labels")


def _taken(rate: Fraction | None, settings: SourceSettings) -> Fraction | None:
    """Frames per second after the stride and the frame rate limit."""
    strided = None if rate is None else rate / settings.stride
    wanted = None if settings.fps is None else Fraction(settings.fps).limit_denominator(1000)
    return min((one for one in (strided, wanted) if one is not None), default=None)
