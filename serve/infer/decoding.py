"""Images of inputs: each is decoded once, whatever its number of tasks, and transformed to the engine's size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from PIL import Image

from prompttune.export.runtimes import Array
from prompttune.images import read_image
from prompttune.images.preprocess import Preprocess
from prompttune.serve.infer.items import Encoded, Item, Payload
from prompttune.serve.infer.traces import Trace, content_digest
from prompttune.serve.infer.work import Work

if TYPE_CHECKING:
    from torch import Tensor

TRANSFORMS = 64
"""Number of transforms that a process keeps."""

_transform: Callable[[Preprocess], Callable[[Image.Image], Tensor]] = lru_cache(TRANSFORMS)(Preprocess.transform)


@dataclass(frozen=True, slots=True)
class Decoded:
    """An input after each transform that its tasks use."""

    item: Item
    """The input without its payload; ``error`` is the reason if it cannot be read."""
    arrays: Mapping[Preprocess, Array] = field(default_factory=dict)
    """Normalised float32 [3, S, S]."""
    picture: Image.Image | None = None
    trace: Trace | None = None


def decode(item: Item, work: Work) -> Decoded:
    """Open one input and transform it for its tasks. An unreadable input becomes an error row; nothing is raised."""
    bare, trace = replace(item, payload=None), Trace.of(item)
    if item.payload is None:
        return Decoded(replace(bare, error=item.error or "no image"), trace=trace)
    wanted = {work.known[task].preprocess: None for task in work.tasks_of(item.task) if task in work.known}
    if not wanted:
        return Decoded(bare, trace=trace)  # each of its rows reports an unknown task
    try:
        image, trace = _read(item.payload, trace)
        arrays = {preprocess: _prepared(image, preprocess) for preprocess in wanted}
    except (OSError, ValueError) as problem:  # ValueError: sides that differ too much to be resized
        error = " ".join(str(problem).split()) or type(problem).__name__
        return Decoded(replace(bare, error=error), trace=trace)
    return Decoded(bare, arrays, _picture(image, work.picture_side), trace=trace)


def _read(payload: Payload, trace: Trace) -> tuple[Image.Image, Trace]:
    """The image, and the trace with the digest of its encoded bytes."""
    if not isinstance(payload, Encoded):
        return payload.open(), trace
    with payload.stream() as stream:
        image = read_image(stream)
        return image, trace._replace(content=content_digest(stream))


def _prepared(image: Image.Image, preprocess: Preprocess) -> Array:
    prepared: Array = _transform(preprocess)(image).numpy()
    return prepared


def _picture(image: Image.Image, side: int | None) -> Image.Image | None:
    if side is None or side == 0 or max(image.size) <= side:
        return None if side is None else image
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
