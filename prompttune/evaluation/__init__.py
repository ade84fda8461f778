"""The evaluation of training, validation and inference: counts, figures, pictures and a page. Works without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompttune.lazy import lazy_names

if TYPE_CHECKING:
    from prompttune.evaluation.plots import confusion_figure, reliability_figure, save_png
    from prompttune.evaluation.report import write_report
    from prompttune.evaluation.result import Calibration, ClassFigures, Evaluation
    from prompttune.evaluation.rows import RowScores, TaskEvaluation, evaluation_of_rows
    from prompttune.evaluation.tally import Tally

_LAZY = {
    "Calibration": "prompttune.evaluation.result",
    "ClassFigures": "prompttune.evaluation.result",
    "Evaluation": "prompttune.evaluation.result",
    "RowScores": "prompttune.evaluation.rows",
    "Tally": "prompttune.evaluation.tally",
    "TaskEvaluation": "prompttune.evaluation.rows",
    "confusion_figure": "prompttune.evaluation.plots",
    "evaluation_of_rows": "prompttune.evaluation.rows",
    "reliability_figure": "prompttune.evaluation.plots",
    "save_png": "prompttune.evaluation.plots",
    "write_report": "prompttune.evaluation.report",
}

__all__ = [
    "Calibration",
    "ClassFigures",
    "Evaluation",
    "RowScores",
    "Tally",
    "TaskEvaluation",
    "confusion_figure",
    "evaluation_of_rows",
    "reliability_figure",
    "save_png",
    "write_report",
]

__getattr__ = lazy_names(__name__, _LAZY)
