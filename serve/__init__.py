"""Serving: open an engine and answer requests for any mix of its tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompttune.lazy import lazy_names

if TYPE_CHECKING:
    from prompttune.serve.answers import Score
    from prompttune.serve.engine import Engine, Prediction, TaskLogits

_LAZY = {
    "Engine": "prompttune.serve.engine",
    "Prediction": "prompttune.serve.engine",
    "Score": "prompttune.serve.answers",
    "TaskLogits": "prompttune.serve.engine",
}

__all__ = [
    "Engine",
    "Prediction",
    "Score",
    "TaskLogits",
]

__getattr__ = lazy_names(__name__, _LAZY)
