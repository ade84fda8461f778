"""From a row's logits to what people read: probabilities and the likeliest classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float64]


class Score(NamedTuple):
    """A class and its probability among its task's classes."""

    label: str
    probability: float


def ranked(probabilities: Probabilities, count: int) -> NDArray[np.int64]:
    """Indices [..., K] of the ``count`` likeliest classes of rows [..., C], best first; the lower index wins a tie."""
    return np.argsort(-probabilities, kind="stable")[..., :count]


def likeliest(probabilities: Probabilities, labels: Sequence[str], top_k: int) -> tuple[Score, ...]:
    """The ``top_k`` likeliest classes of a row [C], best first; the task's first class wins a tie."""
    best = ranked(probabilities, top_k).tolist()
    return tuple(Score(labels[index], float(probabilities[index])) for index in best)
