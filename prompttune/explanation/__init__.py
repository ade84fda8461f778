"""Explanations of runs, next to their plain backbone: pictures, and one page that shows them."""

from prompttune.explanation.result import Explanation
from prompttune.explanation.run import explain
from prompttune.explanation.settings import PARTS, ExplainSettings

__all__ = ["PARTS", "ExplainSettings", "Explanation", "explain"]
