"""Display of ``prompttune benchmark`` during training: one line per run, and one bar for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn

from prompttune.training.progress import duration

if TYPE_CHECKING:
    from rich.console import Console

    from prompttune.benchmark.runner import Pace, RunResult


class Board:
    """A listener of :func:`prompttune.benchmark.runner.execute` and a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.fields[figures]}"), BarColumn(bar_width=None), TextColumn("{task.percentage:.0f} %"),
            console=console, transient=True, expand=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=1.0, figures="starting")

    def __enter__(self) -> Board:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, pace: Pace) -> None:
        """See :class:`prompttune.benchmark.runner.Listener`."""
        kept = f", {pace.kept} finished before" if pace.kept else ""
        self._print(f"{pace.total} runs{kept}, {pace.jobs} at once")

    def update(self, pace: Pace) -> None:
        """See :class:`prompttune.benchmark.runner.Listener`."""
        names = ", ".join(spec.name for spec in pace.running)
        self._bar.update(self._task, completed=pace.share(), figures=f"{pace.done}/{pace.total}  {_left(pace)}{names}")

    def ended(self, outcome: RunResult, pace: Pace) -> None:
        """See :class:`prompttune.benchmark.runner.Listener`."""
        if outcome.row is not None:
            figures = f"top-1 {outcome.row['accuracy']:.2%}  {outcome.row['seconds']:.0f} s"
        else:
            figures = str(outcome.error) if outcome.diverged else f"failed: {outcome.error}"
        self._print(f"{pace.done}/{pace.total}  {outcome.spec.name}  {figures}  {_left(pace)}".rstrip())
        self.update(pace)

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _left(pace: Pace) -> str:
    left = pace.seconds_left()
    return "" if left is None or not (pace.waiting or pace.running) else f"{duration(left)} left  "
