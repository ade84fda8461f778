"""Images of inputs: decoded once, whatever the number of tasks, and brought to the engine's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from PIL import Image

from prompttune.export.runtimes import Array
from prompttune.preprocess import Preprocess
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.work import Work

if TYPE_CHECKING:
    from torch import Tensor

TRANSFORMS = 64
"""Different transforms that a process keeps."""

_transform: Callable[[Preprocess], Callable[[Image.Image], Tensor]] = lru_cache(TRANSFORMS)(Preprocess.transform)


@dataclass(frozen=True, slots=True)
class Decoded:
    """An input through each of the transforms that its tasks ask for, or why it cannot be read."""

    item: Item
    """Without its payload."""
    arrays: Mapping[Preprocess, Array] = field(default_factory=dict)
    """Normalised float32 [3, S, S]."""
    picture: Image.Image | None = None
    error: str | None = None


def decode(item: Item, work: Work) -> Decoded:
    """Open one input and transform it for its tasks; one that cannot be read is told, never raised."""
    bare = dataclasses.replace(item, payload=None)
    if item.payload is None:
        return Decoded(bare, error=item.error or "no image")
    wanted = {work.known[task].preprocess: None for task in work.tasks_of(item.task) if task in work.known}
    if not wanted:
        return Decoded(bare)  # of its rows each says that there is no such task
    try:
        image = item.payload.open()
        arrays = {preprocess: _prepared(image, preprocess) for preprocess in wanted}
    except (OSError, ValueError) as problem:  # ValueError: sides that differ too much to be resized
        return Decoded(bare, error=" ".join(str(problem).split()) or type(problem).__name__)
    return Decoded(bare, arrays, _picture(image, work.picture_side))


def _prepared(image: Image.Image, preprocess: Preprocess) -> Array:
    prepared: Array = _transform(preprocess)(image).numpy()
    return prepared


def _picture(image: Image.Image, side: int | None) -> Image.Image | None:
    if side is None or side == 0 or max(image.size) <= side:
        return None if side is None else image
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
