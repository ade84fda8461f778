"""The rows that inference writes: one for each input and task, whatever became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prompttune.serve.answers import Score

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
"""The columns where true labels are given."""


PIXEL_SHARES = "pixel_shares"
"""Further key of the rows of segmentations."""


class Share(NamedTuple):
    """A class and the share of the pixels that are of it."""

    label: str
    share: float


@dataclass(frozen=True, slots=True)
class Row:
    """The answer for one input and one task, or why there is none."""

    source: str
    task: str
    task_version: str | None
    """None where the task is unknown."""
    row: int | None = None
    frame: int | None = None
    timestamp: float | None = None
    label: str | None = None
    """Likeliest class, of a segmentation that of most pixels; None where there is an ``error``."""
    probability: float | None = None
    top_k: tuple[Score, ...] = ()
    """The likeliest classes, best first."""
    error: str | None = None
    target: str | None = None
    """True label."""
    target_probability: float | None = None
    """Probability of the true label."""
    pixel_shares: tuple[Share, ...] | None = None
    """Of a segmentation: the classes that occur, the largest first; none where there is an ``error``."""
    mask: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    """Of a segmentation: class index of each pixel of the model's input, [S, S]; in no file of rows."""

    def to_dict(self, labelled: bool = False) -> dict[str, Any]:
        """Plain values under :data:`COLUMNS`, or :data:`LABELLED_COLUMNS`; the keys are the same in every row."""
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


@dataclass(frozen=True, slots=True)
class Answer:
    """All rows of one input, in the order of its tasks."""

    rows: tuple[Row, ...]
    picture: Image.Image | None = field(default=None, compare=False)
    """The image, no larger than the sinks ask for; None if none does or it could not be read."""
    arrived: float | None = None
    """See :class:`~prompttune.serve.infer.items.Item`."""
    trace: bytes = field(default=b"", compare=False, repr=False)
    """The input as a :mod:`~prompttune.serve.infer.ledger` has it."""
