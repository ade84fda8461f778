"""What a run looks at, beside its plain backbone: pictures, and one page that holds them."""

from prompttune.explanation.run import Explanation, explain
from prompttune.explanation.settings import PARTS, ExplainSettings

__all__ = ["PARTS", "ExplainSettings", "Explanation", "explain"]
