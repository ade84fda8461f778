"""``prompttune infer``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prompttune.cli.engine_options import runtime_options
from prompttune.errors import UsageError

STDOUT = "-"


@click.command()
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--task", "tasks", multiple=True, help="Task to answer for; may be repeated.")
@click.option("--output", "-o", default=STDOUT, show_default=True, help="JSON lines file; - is standard output.")
@click.option("--overwrite", is_flag=True, help="Replace an output that is already there.")
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True, help="Classes of a row at most.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Rows of one call.")
@click.option("--workers", type=click.IntRange(1), help="Threads that decode.  [default: one a core, at most 4]")
@click.option("--threads", type=click.IntRange(1), help="Threads of the model.  [default: one a core]")
@runtime_options
def infer(
    engine: Path,
    images: tuple[str, ...],
    tasks: tuple[str, ...],
    output: str,
    overwrite: bool,
    top_k: int,
    batch_size: int,
    workers: int | None,
    threads: int | None,
    **runtime: Any,
) -> None:
    """Classify IMAGES (files, folders, quoted globs) with tasks of ENGINE.

    Writes one JSON line for each image and task, in order. An image that cannot be read becomes a row with an error
    and is counted; the exit code stays 0.

    \b
    prompttune infer engine --task digits photos/ --output predictions.jsonl
    prompttune infer engine --task digits --task shapes 'photos/**/*.jpg' -o - | head
    """
    from prompttune.serve import Engine
    from prompttune.serve.batch import WORKERS, classify_files, find_images

    _check_output(output, overwrite)
    paths = find_images(images)
    opened = Engine(engine, threads=threads, **runtime)
    chosen = list(dict.fromkeys(tasks)) or opened.tasks
    if not tasks and len(chosen) != 1:
        raise UsageError(f"name a task with --task; the engine has: {', '.join(chosen) or 'none'}")
    results = classify_files(opened, paths, chosen, batch_size=batch_size, top_k=top_k, workers=workers or WORKERS)
    errors, started = 0, time.perf_counter()
    try:
        with _opened(output) as stream, _progress(len(paths)) as advance:
            for row, result in enumerate(results, 1):
                stream.write(json.dumps(result.to_dict(), ensure_ascii=False) + "\n")
                stream.flush()
                if row % len(chosen) == 0:
                    errors += result.error is not None
                    advance(errors)
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    finally:
        results.close()
    seconds = time.perf_counter() - started
    where = "" if output == STDOUT else f"; wrote {output}"
    click.echo(
        f"{len(paths)} images, {len(chosen)} task{'s' if len(chosen) > 1 else ''}, {errors} could not be read, "
        f"{seconds:.1f} s ({len(paths) / seconds:.1f} images/s){where}",
        err=True,
    )


def _check_output(output: str, overwrite: bool) -> None:
    if output != STDOUT and Path(output).exists() and not overwrite:
        raise UsageError(f"{output} exists: choose another output or give --overwrite")


@contextlib.contextmanager
def _opened(output: str) -> Iterator[TextIO]:
    if output == STDOUT:
        yield sys.stdout
        return
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with Path(output).open("w", encoding="utf-8") as stream:
        yield stream


class _Advance:
    """Moves the bar by one image."""

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("classifying", total=total, speed=0.0, errors=0)
        self._started = time.perf_counter()
        self._done = 0

    def __call__(self, errors: int) -> None:
        self._done += 1
        speed = self._done / (time.perf_counter() - self._started)
        self._bar.update(self._task, completed=self._done, speed=speed, errors=errors)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[_Advance]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} images/s, {task.fields[errors]} errors"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Advance(bar, total)
