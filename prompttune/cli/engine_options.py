"""Shared options and tables of the commands for engines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from prompttune.errors import UsageError

SHOWN_FAILURES = 5
WIDTH = 120
"""Number of columns of a table that is written to a file or a pipe."""


data_option = click.option(
    "--data",
    multiple=True,
    metavar="[TASK=]DATA",
    help="Images to compare on: a data set for every task, or TASK=DATA for one. May be repeated.  "
    "[default: seeded noise]",
)

no_parity_option = click.option("--no-parity", is_flag=True, help="Do not compare with PyTorch.")

weights_option = click.option(
    "--weights", help="Source of the backbone's weights, if it differs from that of training and export."
)


def named_checkpoints(runs: Iterable[str]) -> dict[str, Path]:
    """Folders by task name, from arguments ``PATH`` or ``NAME=PATH``; an existing folder with ``=`` is a path."""
    from prompttune.export.tasks import name_checkpoints

    named: dict[str, Path] = {}
    for run in runs:
        name, equals, path = run.partition("=")
        split = bool(equals) and not Path(run).exists()
        for task, folder in name_checkpoints({name: path} if split else [run]).items():
            if task in named:
                raise UsageError(f"two tasks are called {task!r}: {named[task]} and {folder}; name one with NAME=PATH")
            named[task] = folder
    return named


def named_data(data: Iterable[str], tasks: Collection[str]) -> str | dict[str, str] | None:
    """One data set for all tasks, or data sets by task, from the values of ``--data``.

    Raises:
        UsageError: two data sets are given for the same task.
    """
    common: str | None = None
    named: dict[str, str] = {}
    for value in data:
        task, equals, spec = value.partition("=")
        if equals and task in tasks:
            if task in named:
                raise UsageError(f"--data gives two data sets for the task {task!r}")
            named[task] = spec
        elif common is None:
            common = value
        else:
            raise UsageError(f"--data gives two data sets for every task, {common} and {value}; write TASK=DATA")
    if not named:
        return common
    return {**({} if common is None else dict.fromkeys(tasks, common)), **named}


def parity_tables(console: Console, report: Mapping[str, Any]) -> None:
    """Print the worst figures of each task in a report of :meth:`prompttune.export.ParityReport.to_dict`."""

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    say(f"{report['runtime']} against {report['reference']}")
    for note in report["notes"]:
        say(note)
    console.print(_comparison_table(report["comparisons"]))
    sizes = ", ".join(str(size) for size in sorted({one["batch_size"] for one in report["comparisons"]}))
    for task, words in report["images"].items():
        say(f"{task}: {words}, batch sizes {sizes}")
    if report["mixed_vs_single"] is not None:
        say(f"mixed batches against single runs: max |Δ| {_number(report['mixed_vs_single'], '.2e')}")
    if report["swaps"]:
        exact = sum(one["exact"] for one in report["swaps"])
        say(f"swaps A, B, A: {exact} of {len(report['swaps'])} gave A's first answer bit for bit")
    if report["neighbours"]:
        apart, changed = (
            _worst(report["neighbours"], *figure) for figure in (("max_rel", max, ".2e"), ("changed", max, ""))
        )
        say(f"images in batches against the same alone: max rel {apart}, another top class for up to {changed}")
    if report["accuracy"]:
        console.print(_accuracy_table(report["accuracy"], report["reference"]))
        for one in report["accuracy"]:
            for note in one.get("notes", ()):
                say(f"{one['task']}: {note}")
    if report["bisection"] is not None:
        console.print(_probe_table(report["bisection"]))
        say(report["bisection"]["verdict"])
    for line in report["warnings"]:
        console.print(f"warning: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    failures = report["failures"]
    more = [f"and {len(failures) - SHOWN_FAILURES} more"] if len(failures) > SHOWN_FAILURES else []
    for line in [*failures[:SHOWN_FAILURES], *more]:
        console.print(f"FAILED: {line}", style="bold red", highlight=False, markup=False, soft_wrap=True)


def _comparison_table(comparisons: Iterable[Mapping[str, Any]]) -> Table:
    """One row per task and reference, with the worst of its batch sizes."""
    figures: list[tuple[str, str, Callable[..., Any], str]] = [
        ("max |Δ|", "max_abs", max, ".2e"),
        ("mean |Δ|", "mean_abs", max, ".2e"),
        ("median", "median_abs", max, ".2e"),
        ("max rel", "max_rel", max, ".2e"),
        ("max KL", "kl_max", max, ".2e"),
        ("cosine", "cosine", min, ".6f"),
        ("top-1", "agreement", min, ".2%"),
        ("ties", "ties", max, "d"),
        ("top-5", "top5_agreement", min, ".2%"),
    ]
    table = make_table(("task", "against"), ("images", *(title for title, *_ in figures)))
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for one in comparisons:
        rows.setdefault((one["task"], one["reference"]), []).append(one)
    for (task, reference), parts in rows.items():
        images = str(max(one["images"] for one in parts))
        table.add_row(task, reference, images, *(_worst(parts, name, worst, form) for _, name, worst, form in figures))
    return table


def _probe_table(bisection: Mapping[str, Any]) -> Table:
    """Intermediate results in the order of the computation; the first divergent one is red."""
    table = make_table(("result",), ("max |Δ|", "relative", "cosine"))
    for one in bisection["probes"]:
        style = "bold red" if one["name"] == bisection["first"] else None
        forms = (("max_abs", ".2e"), ("relative", ".2e"), ("cosine", ".6f"))
        table.add_row(one["name"], *(_number(one[name], form) for name, form in forms), style=style)
    return table


def make_table(left: Iterable[str], right: Iterable[str]) -> Table:
    """A table whose columns are never shortened."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in left:
        table.add_column(title, no_wrap=True)
    for title in right:
        table.add_column(title, no_wrap=True, justify="right")
    return table


def _worst(parts: Iterable[Mapping[str, Any]], figure: str, worst: Callable[..., Any], form: str) -> str:
    """The worst of some figures; a figure that is not finite, a string, is worst of all."""
    values = [one[figure] for one in parts if one[figure] is not None]
    strings = [value for value in values if isinstance(value, str)]
    return strings[0] if strings else _number(worst(values, default=None), form)


def _accuracy_table(rows: Sequence[Mapping[str, Any]], reference: str) -> Table:
    """The score of both sides, and the calibration error if the sides were evaluated and have one."""
    names = {"engine": "engine", "reference": "PyTorch" if reference.startswith("PyTorch") else "reference"}
    calibrated = names if any("ece" in (one["evaluation"] or {}).get("engine", ()) for one in rows) else {}
    titles = [f"{names[side]} {rows[0]['metric']}" for side in names] + [f"{names[side]} ECE" for side in calibrated]
    table = make_table(("task", "data"), ("images", *titles))
    for one in rows:
        figures = [_number(one[side], ".2%") for side in names]
        evaluated = one["evaluation"] or {}
        figures += [_number(evaluated[side]["ece"] if evaluated else None, ".2%") for side in calibrated]
        table.add_row(one["task"], one["data"], str(one["images"]), *figures)
        if one["skipped"]:
            table.add_row("", one["skipped"], *[""] * (1 + len(figures)))
    return table


def wide_console() -> Console:
    """Standard output, wide enough for the tables if it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _number(value: float | str | None, form: str) -> str:
    return "-" if value is None else value if isinstance(value, str) else format(value, form)
