"""``prompttune infer``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prompttune.cli.options import given_settings, options_of
from prompttune.cli.sections import SectionedCommand, SectionOption
from prompttune.errors import UsageError
from prompttune.serve.infer.settings import (
    CLUSTER,
    FRAMES,
    INPUTS,
    OUTPUTS,
    SPEED,
    TASKS,
    InferSettings,
    RaySettings,
)
from prompttune.settings import make

if TYPE_CHECKING:
    from prompttune.serve.infer.job import InferJob, InferSummary
    from prompttune.serve.infer.running import Prepared

EXAMPLES = r"""
prompttune infer engine photos/ --task digits -o predictions.jsonl
prompttune infer engine 'photos/**/*.jpg' --task digits --task shapes -o rows.parquet
prompttune infer engine images.parquet --task-column task --labels label -o rows.csv --report report/
prompttune infer engine 'shards/train-{0000..0099}.tar' --task digits -o part-3.jsonl --shards 3/8 --resume
prompttune infer engine match.mp4 --task players --fps 5 --smooth 0.5 -o rows.jsonl -o annotated.mp4
prompttune infer engine rtsp://camera/stream --task parts --drop oldest -o parts.csv
prompttune infer engine inbox/ --watch --task digits -o rows.jsonl
prompttune infer engine-seg photos/ --task streets -o rows.jsonl -o overlays/
find photos -name '*.png' | prompttune infer engine - --task digits | jq .label
prompttune infer engine list.txt --task digits --executor ray --ray-address auto -o rows.jsonl
"""
NOTES = {
    "Inputs": "Files, folders, quoted globs, lists (.txt), tables (.csv .tsv .parquet .arrow .feather), WebDataset "
    "shards (.tar), videos; or one stream (rtsp: http: udp: camera:0), a watched folder, or - for standard input.",
    "Outputs": "By their names: - or csv:- for standard output, .jsonl, .csv, a folder of Parquet files by task "
    "(.parquet or ending in /), .mp4 .mkv .mov .webm for an annotated video. Of a "
    "segmentation: JSON lines, and a folder (ending in /) of overlays and masks.",
}
SECTIONS = (TASKS, INPUTS, FRAMES, OUTPUTS, SPEED, CLUSTER)
INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Exit codes of a process that was ended by a signal."""


def _option(section: str, *names: str, **attrs: Any) -> Callable[[Any], Any]:
    return click.option(*names, cls=SectionOption, section=section, **attrs)


def _options() -> list[click.Parameter]:
    return options_of(InferSettings, RaySettings)


@click.command(cls=SectionedCommand, examples=EXAMPLES, notes=NOTES, sections=SECTIONS, settings=_options)
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, metavar="INPUTS...")
@_option(TASKS, "--report", type=click.Path(file_okay=False, path_type=Path),
         help="Folder for the evaluation: a page, confusion matrices, reliability plots, JSON.")  # fmt: skip
@_option(OUTPUTS, "--json", "as_json", is_flag=True,
         help="Print the summary as JSON; on standard error if rows go to standard output.")  # fmt: skip
@_option(CLUSTER, "--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True,
         help="Place of the work: this machine, or a Ray cluster.")  # fmt: skip
@click.pass_context
def infer(
    ctx: click.Context,
    /,
    engine: Path,
    inputs: tuple[str, ...],
    report: Path | None,
    as_json: bool,
    executor: str,
    **_settings: Any,
) -> None:
    """Classify INPUTS with tasks of ENGINE.

    Each input and task gives one row, in order. An image that cannot be read gives a row with an error, and the exit
    code stays 0. Rows are committed every two seconds; an interrupted run continues with --resume and ends in the same
    bytes.
    """
    from prompttune.cli.infer_progress import InferDisplay
    from prompttune.serve.infer.running import prepared
    from prompttune.serve.infer.sources.stdin import standard_input

    given = given_settings(ctx)
    ray = make(RaySettings, given) if executor == "ray" else None
    settings = make(InferSettings, {**given, "engine": engine, "inputs": inputs, "ray": ray})
    if report is not None and settings.source.labels is None:
        raise UsageError("--report shows an evaluation: give the true labels with --labels")
    signals: list[int] = []
    try:
        with (
            InferDisplay() as display,
            prepared(
                settings,
                stdin=standard_input,
                stdout=sys.stdout,
                on_progress=display.advance,
                on_check=display.check,
            ) as ready,
        ):
            if ready.job is None:
                click.echo(f"nothing to do: all {ready.before.inputs} inputs are answered", err=True)
                return
            display.begin(ready.before, ready.total)
            with _stopped_by_signals(ready.job, signals):
                summary = ready.job.run()
    except BrokenPipeError:
        # The reader has left. Otherwise Python would complain again when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    _report(summary, ready, settings, report, as_json)
    if signals and not ready.live:
        ctx.exit(INTERRUPTED[signal.Signals(signals[0])])


@contextlib.contextmanager
def _stopped_by_signals(job: InferJob, seen: list[int]) -> Iterator[None]:
    """Let the job finish running inputs on Ctrl-C and SIGTERM; a second signal ends the process."""

    def stop(number: int, _frame: Any) -> None:
        seen.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)
        click.echo("stopping: running inputs are written, press Ctrl-C again to stop at once", err=True)
        job.stop()

    before = {one: signal.signal(one, stop) for one in INTERRUPTED}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _report(
    summary: InferSummary, ready: Prepared, settings: InferSettings, report: Path | None, as_json: bool
) -> None:
    from prompttune.cli.infer_progress import evaluation_table, in_words

    if report is not None:
        from prompttune.evaluation import write_report

        about = {"engine": str(settings.engine), "inputs": ", ".join(settings.inputs)}
        write_report(summary.evaluation, report, title="prompttune infer", about=about)
    rows_on_stdout = any(output.endswith("-") for output in settings.outputs)
    if as_json:
        click.echo(json.dumps(summary.to_dict(), ensure_ascii=False), err=rows_on_stdout)
        return
    click.echo(in_words(summary, ready, settings.outputs), err=True)
    if summary.evaluation:
        evaluation_table(summary.evaluation)
