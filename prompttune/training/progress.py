"""News about the progress of a run, and its display on a terminal."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from prompttune.task_types import ClassificationConfig, Measures

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

Phase = Literal["note", "list", "keep", "train", "validate", "epoch"]
READING: dict[Phase, str] = {"list": "reading validation images", "keep": "computing image states"}
"""What is read in the phases before training."""


@dataclass(frozen=True)
class Progress:
    """One piece of news about a run."""

    phase: Phase
    """``note``: only ``text``; ``list``: after each validation image that is listed before training; ``keep``: after
    each batch of image states that are kept; ``train``, ``validate``: after each batch; ``epoch``: after each epoch."""
    epoch: int = 0
    """Current epoch, counted from 1."""
    epochs: int = 0
    step: int = 0
    """Number of finished batches of this phase, or of listed images."""
    steps: int = 0
    loss: float = 0.0
    """Mean training loss of this epoch so far."""
    accuracy: float = 0.0
    """Training accuracy of this epoch so far, between 0 and 1."""
    measures: Measures = ClassificationConfig.measures
    """Names of the figures, that accuracy included."""
    images_per_second: float = 0.0
    seconds_left: float = 0.0
    """Estimated seconds left of the whole run."""
    record: dict[str, Any] | None = None
    """The epoch's record as in ``metrics.json``, in the phase ``epoch``."""
    best: bool = False
    """Whether this epoch's validation is the best so far, in the phase ``epoch``."""
    text: str = ""


OnProgress = Callable[[Progress], None]


@dataclass
class _Pace:
    batches: int = 0
    images: float = 0.0
    seconds: float = 0.0


class Clock:
    """Speed of the two kinds of batch, and the time left."""

    def __init__(self) -> None:
        self._pace: dict[Phase, _Pace] = {"train": _Pace(), "validate": _Pace()}
        self._mark = time.perf_counter()

    def start(self) -> None:
        """Start a phase; the time before it counts for neither kind."""
        self._mark = time.perf_counter()

    def tick(self, phase: Phase, images: float) -> None:
        """Count a finished batch of ``phase``."""
        now, pace = time.perf_counter(), self._pace[phase]
        pace.batches += 1
        pace.images += images
        pace.seconds += now - self._mark
        self._mark = now

    def images_per_second(self, phase: Phase) -> float:
        """Mean speed of a phase since the run began or was resumed."""
        pace = self._pace.get(phase, self._pace["train"])
        return pace.images / pace.seconds if pace.seconds else 0.0

    def seconds_left(self, train_batches: int, validation_batches: int) -> float:
        """Seconds for this many batches at the speed so far.

        A validation batch counts as half a training batch until one has been measured.
        """
        train, validation = self._pace["train"], self._pace["validate"]
        each = train.seconds / max(train.batches, 1)
        scored = validation.seconds / validation.batches if validation.batches else each / 2
        return each * train_batches + scored * validation_batches


def epoch_line(news: Progress) -> str:
    """One line for a finished epoch."""
    record, measures = news.record or {}, news.measures
    parts = [
        f"epoch {news.epoch}/{news.epochs}",
        f"loss {record['train_loss']:.4f}",
        f"{measures.train_title} {record[f'train_{measures.train}']:.2%}",
    ]
    if record[f"val_{measures.score}"] is not None:
        parts += [f"val loss {record['val_loss']:.4f}"]
        parts += [f"val {measures.score_title} {record[f'val_{measures.score}']:.2%}"]
        if measures.second_title:
            parts += [f"val {measures.second_title} {record[f'val_{measures.second}']:.2%}"]
    parts += [f"lr {record['lr']:.2e}", f"{record['images_per_second']:.0f} images/s"]
    if news.epoch < news.epochs:
        parts.append(f"{duration(news.seconds_left)} left")
    return "  ".join(parts) + ("  *" if news.best else "")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


class Display:
    """Prints a run's news: a live bar for the epoch on a terminal or in a notebook, and a line per epoch.

    Use it as a context manager.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self.console = console
        # a notebook needs ipywidgets for a live bar, and shows only the lines without it
        notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        self._live = console.is_terminal or notebook
        self._task: TaskID | None = None
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}  {task.fields[figures]}"),
            console=console,
            transient=True,
            expand=True,
        )

    def __enter__(self) -> Display:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bars.stop()

    def __call__(self, news: Progress) -> None:
        """Show one piece of news."""
        if news.phase == "note":
            self._print(news.text)
        elif news.phase == "epoch":
            self._print(epoch_line(news))
        elif self._live:
            self._bar(news)

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _bar(self, news: Progress) -> None:
        if self._task is None:
            self._task = self._bars.add_task("", figures="")
        figures = (
            f"loss {news.loss:.4f}  {news.measures.train_title} {news.accuracy:.1%}  " if news.phase == "train" else ""
        )
        figures += f"{news.images_per_second:.0f} images/s  {duration(news.seconds_left)} left"
        word = "epoch" if news.phase == "train" else "validation"
        reading = READING.get(news.phase)
        self._bars.update(
            self._task,
            description=reading or f"{word} {news.epoch}/{news.epochs}",
            completed=news.step,
            total=news.steps,
            figures="" if reading else figures,
        )
