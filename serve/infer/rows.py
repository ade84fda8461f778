"""The rows that inference writes: one for each input and task, with an answer or an error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prompttune.serve.answers import Score
from prompttune.serve.infer.traces import Trace

COLUMNS = (
    "source",
    "row",
    "frame",
    "timestamp",
    "task",
    "task_version",
    "label",
    "probability",
    "top_k",
    "error",
)
"""Columns of every output, in this order."""

LABELLED_COLUMNS = (*COLUMNS, "target", "target_probability")
"""Columns of every output if true labels are given."""


PIXEL_SHARES = "pixel_shares"
"""Additional key in the rows of segmentations."""
_LOGGED = (*(name for name in LABELLED_COLUMNS if name != "top_k"), "top_k", PIXEL_SHARES)


class Share(NamedTuple):
    """A class and its share of the pixels."""

    label: str
    share: float


@dataclass(frozen=True, slots=True)
class Row:
    """The answer for one input and one task, or the reason for an error."""

    source: str
    task: str
    task_version: str | None
    """Version of the task; None if the task is unknown."""
    row: int | None = None
    frame: int | None = None
    timestamp: float | None = None
    label: str | None = None
    """Likeliest class, or the class with most pixels of a segmentation; None if there is an ``error``."""
    probability: float | None = None
    top_k: tuple[Score, ...] = ()
    """The likeliest classes, best first."""
    error: str | None = None
    target: str | None = None
    """True label."""
    target_probability: float | None = None
    """Probability of the true label."""
    pixel_shares: tuple[Share, ...] | None = None
    """Classes of a segmentation that occur, the largest share first; None if there is an ``error``."""
    mask: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    """Mask of a segmentation: class index of each pixel of the model's input, [S, S]; not written to row files."""

    def to_dict(self, labelled: bool = False) -> dict[str, Any]:
        """Plain values under :data:`COLUMNS` or :data:`LABELLED_COLUMNS`; every row has the same keys."""
        values: dict[str, Any] = {name: getattr(self, name) for name in (LABELLED_COLUMNS if labelled else COLUMNS)}
        values["top_k"] = [score._asdict() for score in self.top_k]
        if self.pixel_shares is not None:
            values[PIXEL_SHARES] = [share._asdict() for share in self.pixel_shares]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of :meth:`to_dict`."""
        scores = tuple(Score(one["label"], one["probability"]) for one in values["top_k"])
        shares = values.get(PIXEL_SHARES)
        told = None if shares is None else tuple(Share(one["label"], one["share"]) for one in shares)
        return cls(**{**values, "top_k": scores, PIXEL_SHARES: told})

    def to_values(self) -> list[Any]:
        """Plain values without names, for the row log."""
        return [getattr(self, name) for name in _LOGGED]

    @classmethod
    def from_values(cls, values: Sequence[Any]) -> Row:
        """The inverse of :meth:`to_values`, also after JSON."""
        *plain, scores, shares = values
        told = None if shares is None else tuple(Share(*one) for one in shares)
        return cls(**dict(zip(_LOGGED, (*plain, tuple(Score(*one) for one in scores), told), strict=True)))


def json_text(values: object) -> str:
    """Values as JSON on one line; an array becomes a list.

    A file name that is not valid Unicode holds surrogates, which UTF-8 cannot hold. Its text is ASCII with escapes and
    still reads back exactly.
    """
    text = json.dumps(values, ensure_ascii=False, default=np.ndarray.tolist)
    return text if escaped(text) == text else json.dumps(values, default=np.ndarray.tolist)


def escaped(text: str, encoding: str = "utf-8") -> str:
    """The text with an escape for each character that the encoding cannot hold."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


@dataclass(frozen=True, slots=True)
class InputAnswer:
    """All rows of one input, in the order of its tasks."""

    rows: tuple[Row, ...]
    picture: Image.Image | None = field(default=None, compare=False)
    """The image, no larger than the sinks need; None if no sink needs it or it could not be read."""
    arrived: float | None = None
    """Arrival time, see :class:`~prompttune.serve.infer.items.Item`."""
    trace: Trace | None = field(default=None, compare=False, repr=False)
    """State of the input when it was answered."""
    smoothing: Any = field(default=None, compare=False, repr=False)
    """State of the smoothing after this input, see :meth:`~prompttune.serve.infer.smoothing.Smoother.state`."""
