"""``prompttune infer``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prompttune.cli.engine_options import runtime_options
from prompttune.cli.sections import SectionedCommand, SectionOption
from prompttune.errors import UsageError
from prompttune.serve.infer.sources.names import INPUT_FORMATS, STDIN_FORMS

if TYPE_CHECKING:
    from prompttune.serve.infer.cluster import RaySettings
    from prompttune.serve.infer.job import Job, Summary
    from prompttune.serve.infer.running import InferSettings, Prepared

EXAMPLES = r"""
prompttune infer engine photos/ --task digits -o predictions.jsonl
prompttune infer engine 'photos/**/*.jpg' --task digits --task shapes -o rows.parquet -o sheet.png
prompttune infer engine images.parquet --task-column task --labels label -o rows.csv --report report/
prompttune infer engine 'shards/train-{0000..0099}.tar' --task digits -o part-3.jsonl --shards 3/8 --resume
prompttune infer engine match.mp4 --task players --fps 5 --smooth 0.5 -o rows.jsonl -o annotated.mp4
prompttune infer engine rtsp://camera/stream --task parts --drop oldest -o parts.csv
prompttune infer engine inbox/ --watch --task digits -o rows.jsonl
prompttune infer engine-seg photos/ --task streets -o rows.jsonl -o overlays/
find photos -name '*.png' | prompttune infer engine - --task digits | jq .label
prompttune infer engine list.txt --task digits --engine ray --ray-address auto -o rows.jsonl
"""
NOTES = {
    "Inputs": "Files, folders, quoted globs, lists (.txt), tables (.csv .tsv .parquet .arrow .feather), WebDataset "
    "shards (.tar), videos; or one stream (rtsp: http: udp: camera:0), a watched folder, or - for standard input.",
    "Outputs": "By their names: - or csv:- for standard output, .jsonl, .csv, a folder of Parquet files by task "
    "(.parquet or ending in /), .mp4 .mkv .mov .webm for an annotated video, .png .jpg for contact sheets. Of a "
    "segmentation: JSON lines, and a folder (ending in /) of overlays and masks.",
}
INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Exit codes of a process that a signal ended."""


def _option(section: str, *names: str, **attrs: Any) -> Callable[[Any], Any]:
    return click.option(*names, cls=SectionOption, section=section, **attrs)


def _tasks(command: Any) -> Any:
    for option in reversed([
        _option("Tasks", "--task", "tasks", multiple=True,
                help="Task to answer for; may be repeated, the image is decoded once.  [default: the only one]"),
        _option("Tasks", "--task-column",
                help="Column of a table, key of JSON lines or member of a shard that names each image's task."),
        _option("Tasks", "--top-k", type=click.IntRange(1), default=5, show_default=True,
                help="Classes of a row at most."),
        _option("Tasks", "--labels",
                help="True labels: folder (the name of an image's folder), a .csv of path,label, or a column, key or "
                "member; prints accuracy and calibration."),
        _option("Tasks", "--report", type=click.Path(file_okay=False, path_type=Path),
                help="Folder for the evaluation: a page, confusion matrices, reliability plots, JSON."),
    ]):  # fmt: skip
        command = option(command)
    return command


def _inputs(command: Any) -> Any:
    for option in reversed([
        _option("Inputs", "--input-format", type=click.Choice(INPUT_FORMATS), default="auto",
                show_default=True, help="What the inputs are, where their names do not say."),
        _option("Inputs", "--image-column",
                help="Column of paths, bytes or structs of them.  [default: the one that looks like it]"),
        _option("Inputs", "--stdin", type=click.Choice(STDIN_FORMS), default="list", show_default=True,
                help="What - reads: a path a line, JSON lines, or raw frames."),
        _option("Inputs", "--frame-size", metavar="WIDTHxHEIGHT", callback=_size, help="Size of raw frames."),
        _option("Inputs", "--watch", is_flag=True, help="Follow a folder: go on with the images that come."),
        _option("Inputs", "--limit", type=click.IntRange(1), help="Take so many inputs at most."),
        _option("Inputs", "--shards", "shard", metavar="I/N",
                help="Take the I-th of N parts of the inputs, I from 0: one part a machine or array job."),
        _option("Video and streams", "--fps", type=click.FloatRange(0, min_open=True), help="Frames a second at most."),
        _option("Video and streams", "--stride", type=click.IntRange(1), default=1, show_default=True,
                help="Take each so-many-th frame."),
        _option("Video and streams", "--drop", type=click.Choice(["oldest", "none"]),
                help="What happens to frames that wait too long: the oldest leaves, or the sender waits.  "
                "[default: oldest for streams and cameras]"),
        _option("Video and streams", "--buffer", type=click.IntRange(1), default=8, show_default=True,
                help="Frames of a stream that wait at most."),
        _option("Video and streams", "--reconnects", type=click.IntRange(0), default=10, show_default=True,
                help="Attempts in a row to reach a stream that broke off, half a second to half a minute apart."),
        _option("Video and streams", "--smooth", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
                help="Average probabilities over time; the weight of the past halves in so many seconds."),
    ]):  # fmt: skip
        command = option(command)
    return command


def _outputs(command: Any) -> Any:
    for option in reversed([
        _option("Outputs", "--output", "-o", "outputs", multiple=True, default=("-",), show_default=True,
                help="Where the rows go; may be repeated."),
        _option("Outputs", "--overwrite", is_flag=True, help="Replace outputs of an earlier run."),
        _option("Outputs", "--resume", is_flag=True,
                help="Go on with an interrupted run, or answer inputs that came at the end of a finished one.  Refused "
                "where an answered input or an output has changed."),
        _option("Outputs", "--csv-bom", is_flag=True,
                help="Begin CSV with a byte order mark, by which Excel knows that it is UTF-8."),
        _option("Outputs", "--max-errors", type=click.IntRange(0),
                help="Stop, exit code 1, after more inputs with errors.  [default: any number]"),
        _option("Outputs", "--json", "as_json", is_flag=True,
                help="Print the summary as JSON; on standard error where rows go to standard output."),
        _option("Speed", "--batch-size", type=click.IntRange(1), default=32, show_default=True,
                help="Rows of one call."),
        _option("Speed", "--workers", type=click.IntRange(1),
                help="Number of decoding workers.  [default: one a core]"),
        _option("Speed", "--decode", type=click.Choice(["threads", "processes"]), default="threads", show_default=True,
                help="Kind of decoding workers; processes help many cores to feed a quick device."),
        _option("Speed", "--threads", type=click.IntRange(1), help="Threads of the model.  [default: one a core]"),
    ]):  # fmt: skip
        command = option(command)
    return command


def _cluster(command: Any) -> Any:
    for option in reversed([
        _option("Cluster", "--engine", "executor", type=click.Choice(["local", "ray"]), default="local",
                show_default=True, help="Answer here, or with Ray Data on a cluster."),
        _option("Cluster", "--ray-address", help="HOST:PORT, or auto.  [default: RAY_ADDRESS, else one started here]"),
        _option("Cluster", "--ray-engines", metavar="N or MIN,MAX", callback=_pool,
                help="Engines, each in a process of its own.  [default: as many as there is room for]"),
        _option("Cluster", "--ray-cpus", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
                help="CPUs that an engine books; also its threads."),
        _option("Cluster", "--ray-gpus", type=click.FloatRange(0), help="GPUs that it books.  [default: 1 on cuda]"),
    ]):  # fmt: skip
        command = option(command)
    return command


def _size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is not a size such as 640x480")
    return int(found[1]), int(found[2])


def _pool(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int | None]:
    if value is None:
        return 1, None
    found = re.fullmatch(r"(\d+)(?:,(\d+))?", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is neither a number nor two such as 1,8")
    return int(found[1]), int(found[2] or found[1])


@click.command(cls=SectionedCommand, examples=EXAMPLES, notes=NOTES)
@click.argument("engine", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, metavar="INPUTS...")
@_tasks
@_inputs
@_outputs
@_cluster
@runtime_options
@click.pass_context
def infer(ctx: click.Context, /, **options: Any) -> None:
    """Classify INPUTS with tasks of ENGINE.

    Each input and task gives one row, in order: an image that cannot be read too, whose row has an error, and the exit
    code stays 0. Rows are committed every two seconds; a run that was killed goes on with --resume and ends in the
    same bytes.
    """
    from prompttune.cli.infer_progress import Display
    from prompttune.serve.infer.running import prepared
    from prompttune.serve.infer.sources.stdin import standard_input

    settings = _settings(options)
    if options["report"] is not None and options["labels"] is None:
        raise UsageError("--report shows an evaluation: say with --labels where the true labels are")
    signals: list[int] = []
    try:
        with (
            Display() as display,
            prepared(
                settings,
                stdin=standard_input,
                stdout=sys.stdout,
                on_progress=display.advance,
                on_check=display.check,
            ) as ready,
        ):
            if ready.job is None:
                click.echo(f"nothing left to do: all {ready.before.inputs} inputs are answered", err=True)
                return
            display.begin(ready.before, ready.total)
            with _stopped_by_signals(ready.job, signals):
                summary = ready.job.run()
    except BrokenPipeError:
        # The reader has seen enough. Python would complain once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    _report(summary, ready, settings, options)
    if signals and not ready.live:
        ctx.exit(INTERRUPTED[signal.Signals(signals[0])])


def _settings(options: dict[str, Any]) -> InferSettings:
    from prompttune.export.runtimes import RuntimeOptions
    from prompttune.serve.infer.local import Decoding
    from prompttune.serve.infer.plan import Shard
    from prompttune.serve.infer.running import InferSettings
    from prompttune.serve.infer.sources.opening import SourceSettings

    taken = ("input_format", "stdin", "frame_size", "image_column", "task_column", "labels", "watch")
    frames = ("stride", "fps", "drop", "buffer", "reconnects", "limit")
    runtime = ("device", "threads", "cuda_graph", "provider", "cache")
    return InferSettings(
        engine=options["engine"],
        inputs=options["inputs"],
        outputs=options["outputs"],
        tasks=options["tasks"],
        source=SourceSettings(**{name: options[name] for name in (*taken, *frames)}),
        options=RuntimeOptions(**{name: options[name] for name in runtime}, spin=False),
        decoding=Decoding(options["workers"], options["decode"]),
        ray=_ray(options) if options["executor"] == "ray" else None,
        top_k=options["top_k"],
        batch_size=options["batch_size"],
        shard=Shard() if options["shard"] is None else Shard.parse(options["shard"]),
        smooth=options["smooth"],
        max_errors=options["max_errors"],
        overwrite=options["overwrite"],
        resume=options["resume"],
        csv_bom=options["csv_bom"],
    )


def _ray(options: dict[str, Any]) -> RaySettings:
    from prompttune.serve.infer.cluster import RaySettings

    return RaySettings(options["ray_address"], options["ray_engines"], options["ray_cpus"], options["ray_gpus"])


@contextlib.contextmanager
def _stopped_by_signals(job: Job, seen: list[int]) -> Iterator[None]:
    """Ctrl-C and SIGTERM let the job end what is under way; a second one ends the process."""

    def stop(number: int, _frame: Any) -> None:
        seen.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)
        click.echo("ending: what is under way is written, press Ctrl-C again to leave at once", err=True)
        job.stop()

    before = {one: signal.signal(one, stop) for one in INTERRUPTED}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _report(summary: Summary, ready: Prepared, settings: InferSettings, options: dict[str, Any]) -> None:
    from prompttune.cli.infer_progress import evaluation_table, in_words

    if options["report"] is not None:
        from prompttune.evaluation import write_report

        about = {"engine": str(settings.engine), "inputs": ", ".join(settings.inputs)}
        write_report(summary.evaluation, options["report"], title="prompttune infer", about=about)
    rows_on_stdout = any(output.endswith("-") for output in settings.outputs)
    if options["as_json"]:
        click.echo(json.dumps(summary.to_dict(), ensure_ascii=False), err=rows_on_stdout)
        return
    click.echo(in_words(summary, ready.before.inputs, ready.tasks, settings.outputs), err=True)
    if summary.evaluation:
        evaluation_table(summary.evaluation)
