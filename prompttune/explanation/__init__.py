"""Explanations of runs, next to their plain backbone: pictures, and one page that shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompttune.explanation.settings import PARTS, ExplainSettings
from prompttune.lazy import lazy_names

if TYPE_CHECKING:
    from prompttune.explanation.result import Explanation
    from prompttune.explanation.run import explain

_LAZY = {"Explanation": "prompttune.explanation.result", "explain": "prompttune.explanation.run"}

__all__ = ["PARTS", "ExplainSettings", "Explanation", "explain"]

__getattr__ = lazy_names(__name__, _LAZY)
