"""From settings to a job that has run."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from prompttune.errors import EngineError, UsageError, some_names
from prompttune.evaluation import RowScores
from prompttune.export.folder import EngineFolder
from prompttune.export.runtimes import RuntimeOptions
from prompttune.export.runtimes.choice import ONNXRUNTIME, runtime_of
from prompttune.files import locked
from prompttune.serve.decode_threads import usable_cores
from prompttune.serve.engine import Engine
from prompttune.serve.infer.answering import open_engine
from prompttune.serve.infer.cluster import run_on_ray
from prompttune.serve.infer.job import Answering, InferJob, InferSummary
from prompttune.serve.infer.local import run_locally
from prompttune.serve.infer.plan import ChunkPlan
from prompttune.serve.infer.prefetch import Prefetch
from prompttune.serve.infer.row_log import RowLog, RunProgress
from prompttune.serve.infer.settings import STANDARD_OUTPUTS, InferSettings, row_log_path
from prompttune.serve.infer.sinks import Sink, SinkSettings
from prompttune.serve.infer.sinks.opening import check_outputs, open_sinks
from prompttune.serve.infer.smoothing import Smoother
from prompttune.serve.infer.sources.live import masked
from prompttune.serve.infer.sources.opening import STANDARD_INPUT, Opened, open_source
from prompttune.serve.infer.sources.stdin import standard_input
from prompttune.serve.infer.traces import Trace, check
from prompttune.serve.infer.work import Work, facts_of
from prompttune.settings import resume_values
from prompttune.task_types import ClassificationConfig, TaskType

EVERY = "all"
"""Stands for all tasks of an engine, unless one of them has this name."""
MOST_CALLS = 4
"""Largest number of concurrent calls: each has its own activations, some hundred MiB for a large backbone."""


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to run."""

    job: InferJob | None
    """The job; None if an earlier run has finished it."""
    total: int | None = None
    """Number of inputs, including those of earlier runs; None if it is unknown."""
    before: RunProgress = field(default_factory=RunProgress)
    """RunProgress committed by earlier runs."""
    live: bool = False
    """Whether the inputs are endless, so that ending them is not an interruption."""
    tasks: tuple[str, ...] = ()
    """Tasks of every input."""
    resumable: bool = False
    """Whether ``resume`` can continue the job if it is interrupted."""


@contextmanager
def prepared(
    settings: InferSettings,
    *,
    stdin: Callable[[], BinaryIO],
    stdout: TextIO,
    engine: Engine | None = None,
    on_progress: Callable[[RunProgress], None] = lambda _: None,
    on_check: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[Prepared]:
    """Open everything that a job needs, and lock its outputs until the block ends.

    Args:
        settings: settings of the job.
        stdin: opens standard input.
        stdout: standard output.
        engine: an open engine to use, one call at a time; None opens that of the folder.
        on_progress: called after every chunk, in the thread that runs the job.
        on_check: called with the compared and the total amount of an earlier run's work.

    Raises:
        UsageError: settings contradict each other, an input is missing, or an output is in the way.
        PrompttuneError: the engine cannot be opened, the inputs cannot be read.
    """
    task_type = _task_type(settings)
    check_outputs(settings.outputs, task_type, overwrite=settings.overwrite, resume=settings.resume)
    answered: dict[str, Trace] = {}
    opened = open_source(
        settings.inputs,
        settings.source,
        stdin=stdin,
        done=lambda item: (trace := answered.get(Trace.of(item).name)) is not None and trace.same(item),
    )
    with ExitStack() as stack:
        stack.callback(opened.source.close)
        _check_source(settings, opened)
        folder = EngineFolder(settings.engine, verify=engine is None)
        work = _work(settings, folder, opened)
        files = [Path(output) for output in settings.outputs if output not in STANDARD_OUTPUTS]
        for file in files:
            stack.enter_context(locked(file))
        path = row_log_path(settings.outputs)
        log = None if path is None else RowLog(path)
        values = _recorded(settings, folder, work, opened)
        before = log.read(values) if log is not None and settings.resume else RunProgress()
        plan = ChunkPlan(
            opened.source,
            work.chunk_inputs,
            shard=settings.shard,
            limit=settings.source.limit if opened.source.bounded else None,
            answered=before.inputs,
        )
        if log is not None and settings.resume:
            if plan.items is not None:
                done = count(1)
                check(log.traces(), plan.items, lambda: on_check(next(done), before.inputs))
                if before.finished and not plan.more() and all(file.exists() for file in files):
                    yield Prepared(None, before=before)
                    return
            if settings.source.watch:
                answered.update((trace.name, trace) for trace in log.traces())
        calls = 1
        if engine is None and settings.ray is None:
            calls, threads = calls_at_once(settings.options, folder)
            engine = open_engine(replace(work, options=replace(settings.options, threads=threads)))
        told = SinkSettings(
            labelled=work.labelled,
            rate=opened.rate,
            tasks=work.known,
            csv_bom=settings.csv_bom,
            rows=(lambda: iter(())) if log is None else log.rows,
        )
        sinks, printed = open_sinks(settings.outputs, task_type, told, stdout=stdout, resume=settings.resume)
        for sink in sinks:
            stack.callback(sink.close)
        scores = RowScores({name: facts.labels for name, facts in work.known.items()}) if work.labelled else None
        if log is not None and settings.resume:
            log.resume()
            _write_again(log, sinks, scores)
        elif log is not None:
            log.begin(values)
        resumable = log is not None and settings.inputs[0] != STANDARD_INPUT and all(one.resumable for one in sinks)
        sinks += printed
        work = replace(work, picture_side=_picture_side(sinks))
        job = InferJob(
            opened.source,
            plan,
            _answering(settings, work, engine, calls, before),
            sinks,
            log=log,
            scores=scores,
            resumable=resumable,
            max_errors=settings.max_errors,
            on_progress=on_progress,
        )
        yield Prepared(job, plan.total, before, not opened.source.bounded, work.tasks, resumable)


def _write_again(log: RowLog, sinks: Sequence[Sink], scores: RowScores | None) -> None:
    """Write the answers of earlier runs to new sinks."""
    for answer in log.answers():
        for sink in sinks:
            sink.write(answer)
        if scores is not None:
            for row in answer.rows:
                scores.add(row)


def infer(
    settings: InferSettings, engine: Engine | None = None, on_progress: Callable[[RunProgress], None] = lambda _: None
) -> InferSummary:
    """Run a job to its end in this thread.

    Args:
        settings: settings of the job.
        engine: an open engine to use, one call at a time; None opens that of the folder.
        on_progress: called after every chunk.

    Returns:
        The result; that of the earlier run if ``resume`` finds nothing to do.

    Raises:
        UsageError: settings contradict each other, an input is missing, or an output is in the way.
        PrompttuneError: the engine cannot be opened, or inputs or outputs fail; committed rows are kept.

    Example:
        >>> from prompttune.serve.infer import InferSettings, infer
        >>> infer(InferSettings("engine", ("photos",), ("rows.jsonl",), ("digits",))).inputs
        5
    """
    with prepared(settings, stdin=standard_input, stdout=sys.stdout, engine=engine, on_progress=on_progress) as ready:
        if ready.job is not None:
            return ready.job.run()
        before = ready.before
        return InferSummary(before.inputs, before.rows, before.errors, 0.0, 0.0, finished=True, counts=before.counts)


def calls_at_once(options: RuntimeOptions, folder: EngineFolder) -> tuple[int, int | None]:
    """Number of concurrent calls for a job with its own engine, and the threads of each call.

    Together they have the requested threads, or one per core.
    """
    if options.cuda_index is not None or runtime_of(folder.path, folder.manifest, options) != ONNXRUNTIME:
        return 1, options.threads
    threads = options.threads or usable_cores()
    calls = min(MOST_CALLS, threads)
    return calls, threads // calls


def _task_type(settings: InferSettings) -> TaskType:
    """Type of the engine's tasks. A damaged engine is refused later, when it is opened.

    Raises:
        UsageError: the type has no answers for images, or does not take a setting.
    """
    try:
        kind = EngineFolder(settings.engine, verify=False).manifest.task_type
    except EngineError:
        return ClassificationConfig()
    if not kind.takes("segment"):
        kind.refuse("predict")
    for given, what in ((settings.source.labels, "labels"), (settings.smooth, "smooth"), (settings.ray, "ray")):
        if given is not None:
            kind.refuse(what)
    return kind


def _check_source(settings: InferSettings, opened: Opened) -> None:
    bounded = opened.source.bounded
    name = settings.inputs[0]
    if settings.smooth is not None and not opened.source.frames:
        raise UsageError("--smooth needs frames: a video or a stream")
    if not bounded and settings.shard.count > 1:
        raise UsageError(f"--shards cannot divide {name}: it can only be read once")
    if not bounded and settings.ray is not None:
        raise UsageError(f"--executor ray cannot read {name}: a stream must be answered where it arrives")
    if settings.resume and name == STANDARD_INPUT:
        raise UsageError("--resume cannot read standard input again: write the list to a file and name that")
    if settings.source.drop == "oldest" and bounded:
        raise UsageError(f"--drop oldest is for streams: {name} waits for its frames to be answered")


def _work(settings: InferSettings, folder: EngineFolder, opened: Opened) -> Work:
    by_input = settings.source.task_column is not None or settings.source.stdin == "jsonl"
    tasks = tuple(dict.fromkeys(settings.tasks))
    if tasks == (EVERY,) and EVERY not in (present := folder.tasks()):
        tasks = tuple(present)
    if settings.source.task_column is not None and tasks:
        raise UsageError("--task and --task-column contradict each other: give one")
    if not tasks and not by_input:
        present = folder.tasks()
        if len(present) != 1:
            raise UsageError(f"name a task with --task; the engine has: {some_names(present)}")
        tasks = tuple(present)
    labelled = settings.source.labels is not None
    if labelled and len(tasks) > 1:
        raise UsageError("--labels belong to one task: give one --task, or a --task-column")
    return Work(
        engine=folder.path,
        tasks=tasks,
        known=facts_of(folder, None if by_input else tasks),
        image_size=folder.manifest.image_size,
        options=settings.options,
        batch_size=settings.batch_size,
        top_k=settings.top_k,
        labelled=labelled,
        label_is_index=opened.label_is_index,
        task_type=folder.manifest.task_type,
        only_reads=folder.manifest.only_reads,
    )


def _recorded(settings: InferSettings, folder: EngineFolder, work: Work, opened: Opened) -> dict[str, Any]:
    """Values that a resumed run must share, so that its rows are those of an uninterrupted run."""
    files = {name: file.sha256 for name, file in sorted(folder.manifest.files.items())}
    versions = {name: facts.version for name, facts in sorted(work.known.items())}
    return {
        **resume_values(settings),
        "engine": _digest(files),
        "task": list(work.tasks),
        "task versions": _digest(versions),
        # inputs that can be read again are compared one by one
        "inputs": None if opened.source.bounded else [masked(one) for one in settings.inputs],
    }


def _digest(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _answering(
    settings: InferSettings, work: Work, engine: Engine | None, calls: int, before: RunProgress
) -> Answering:
    if engine is None:
        return lambda chunks: Prefetch(run_on_ray(chunks, work, settings.ray), 1, "infer-cluster")
    smoother = None if settings.smooth is None else Smoother(settings.smooth, before.smoothing)
    return lambda chunks: run_locally(chunks, engine, work, settings.decoding, calls, smoother)


def _picture_side(sinks: Sequence[Sink]) -> int | None:
    sides = [sink.picture_side for sink in sinks if sink.picture_side is not None]
    return None if not sides else 0 if 0 in sides else max(sides)
