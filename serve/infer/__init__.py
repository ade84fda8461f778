"""Batch and stream inference: sources of images, sinks of rows, and the pipeline between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompttune.lazy import lazy_names

if TYPE_CHECKING:
    from prompttune.serve.infer.job import InferSummary
    from prompttune.serve.infer.rows import Row
    from prompttune.serve.infer.running import infer
    from prompttune.serve.infer.settings import InferSettings

_LAZY = {
    "InferSettings": "prompttune.serve.infer.settings",
    "Row": "prompttune.serve.infer.rows",
    "InferSummary": "prompttune.serve.infer.job",
    "infer": "prompttune.serve.infer.running",
}

__all__ = ["InferSettings", "InferSummary", "Row", "infer"]

__getattr__ = lazy_names(__name__, _LAZY)
