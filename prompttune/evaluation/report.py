"""An evaluation as files: ``evaluation.json``, pictures, and one page with everything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from prompttune.evaluation.page import Cell, page, picture, table
from prompttune.evaluation.plots import NUMBERED_CLASSES, confusion_figure, png_bytes, reliability_figure
from prompttune.evaluation.result import Evaluation, percent
from prompttune.evaluation.rows import TaskEvaluation
from prompttune.files import replacing, write_json, write_text

OPEN_CLASSES = 40
"""Largest number of classes whose table is expanded at first."""
PAIRS = 20
"""Number of confused pairs in the list."""
FIGURES = ("images", "top-1", "top-5", "balanced", "macro F1", "loss", "ECE")


def write_report(
    evaluations: Mapping[str, Evaluation | TaskEvaluation],
    folder: str | Path,
    *,
    title: str = "Evaluation",
    about: Mapping[str, str] | None = None,
) -> None:
    """Write ``evaluation.json``, ``evaluation.html`` and two pictures per task.

    The pictures are ``confusion-TASK.png`` and ``reliability-TASK.png``, with ``/`` in a name as ``%2F``; a task
    without scored images does not have any. Each file is written atomically.

    Args:
        evaluations: task → figures.
        folder: output folder, created if necessary; other files in it stay.
        title: headline of the page.
        about: facts about the evaluation, such as the name of the data, for the page and the JSON file.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for task, one in evaluations.items():
        evaluation = scored(one)
        if evaluation is None:
            continue
        pictures = draw(evaluation)
        for kind, data in pictures.items():
            with replacing(folder / f"{kind}-{_file_part(task)}.png") as temporary:
                temporary.write_bytes(data)
        sections += [f"<h2>{escape(task)}</h2>", section(task, evaluation, pictures)]
    facts = [f'<p class="dim">{escape(name)}: {escape(value)}</p>' for name, value in (about or {}).items()]
    parts = [f"<h1>{escape(title)}</h1>", *facts, _overview(evaluations), *sections]
    write_text(folder / "evaluation.html", page(title, parts))
    values = {task: one.to_dict() for task, one in evaluations.items()}
    write_json(folder / "evaluation.json", {"about": dict(about or {}), "tasks": values})


def _file_part(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")


def scored(one: Evaluation | TaskEvaluation) -> Evaluation | None:
    """The figures; None without scored images."""
    return one.evaluation if isinstance(one, TaskEvaluation) else one


def draw(evaluation: Evaluation) -> dict[str, bytes]:
    """The pictures as PNG files, by kind."""
    return {
        "confusion": png_bytes(confusion_figure(evaluation)),
        "reliability": png_bytes(reliability_figure(evaluation)),
    }


def figure_cells(evaluation: Evaluation | None) -> list[Cell]:
    """A table's cells for :data:`FIGURES`."""
    if evaluation is None:
        return [("0", ""), *[("-", "")] * (len(FIGURES) - 1)]
    loss = evaluation.loss
    return [
        (str(evaluation.n), ""),
        (percent(evaluation.top1), ""),
        (percent(evaluation.top5), ""),
        (percent(evaluation.balanced_accuracy), ""),
        (percent(evaluation.macro_f1), ""),
        ("-" if loss is None else f"{loss:.4f}", ""),
        (percent(evaluation.ece), ""),
    ]


def section(task: str, evaluation: Evaluation, pictures: Mapping[str, bytes]) -> str:
    """Pictures, confused pairs and classes of one task, as markup."""
    broad = len(evaluation.labels) > NUMBERED_CLASSES  # a matrix of many classes needs its full size
    shown = "".join(
        picture(data, f"{kind} of {task}", broad and kind == "confusion") for kind, data in pictures.items()
    )
    bad = int(evaluation.not_finite.sum())
    warning = f'<p class="warning">the logits of {bad} images are not finite; they count as wrong</p>' if bad else ""
    notes = "".join(f'<p class="warning">{escape(note)}</p>' for note in evaluation.notes)
    return f'{warning}{notes}<div class="plots">{shown}</div>' + _pairs(evaluation) + _classes(evaluation)


def _pairs(evaluation: Evaluation) -> str:
    rows = [
        [(true, "text"), (predicted, "text"), (str(images), ""), (percent(share), "")]
        for true, predicted, images, share in evaluation.worst_pairs(PAIRS)
    ]
    if not rows:
        return ""
    return _details("confused most", table(("true", "predicted", "images", "of the class"), rows, 2), False)


def _classes(evaluation: Evaluation) -> str:
    rows = [
        [
            (label, "text"),
            *((percent(value), "") for value in (one.precision, one.recall, one.f1)),
            (str(one.support), ""),
        ]
        for label, one in evaluation.report.items()
    ]
    titles = ("class", "precision", "recall", "F1", "images")
    return _details(f"{len(rows)} classes", table(titles, rows, 1), len(rows) <= OPEN_CLASSES)


def _details(title: str, content: str, is_open: bool) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{content}</details>"


def _overview(evaluations: Mapping[str, Evaluation | TaskEvaluation]) -> str:
    rows = [[(task, "text"), *figure_cells(scored(one)), *_left_out(one)] for task, one in evaluations.items()]
    unknown = [line for task, one in evaluations.items() for line in _unknown(task, one)]
    return table(("task", *FIGURES, "errors", "unlabelled", "unknown class"), rows, 1) + "".join(unknown)


def _left_out(one: Evaluation | TaskEvaluation) -> Sequence[Cell]:
    counts = (one.errors, one.unlabelled, one.unknown) if isinstance(one, TaskEvaluation) else ("-", "-", "-")
    return [(str(count), "") for count in counts]


def _unknown(task: str, one: Evaluation | TaskEvaluation) -> Iterable[str]:
    if isinstance(one, TaskEvaluation) and one.unknown:
        names = ", ".join(one.unknown_labels)
        yield (
            f'<p class="warning">{escape(task)}: {one.unknown} true labels are not among its classes, such as '
            f"{escape(names)}; {one.told_of_unknown}</p>"
        )
