"""From settings to a job that has run."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from prompttune.errors import EngineError, UsageError, some_names
from prompttune.evaluation import RowScores
from prompttune.export.folder import EngineFolder
from prompttune.export.runtimes import RuntimeOptions
from prompttune.files import locked
from prompttune.serve.decode_threads import usable_cores
from prompttune.serve.engine import Engine
from prompttune.serve.infer.executors import Executor, Here, OnRay
from prompttune.serve.infer.job import Job, Summary
from prompttune.serve.infer.journal import Journal, Progress
from prompttune.serve.infer.ledger import Trace, check, traces
from prompttune.serve.infer.plan import Plan
from prompttune.serve.infer.rows import Row
from prompttune.serve.infer.settings import STANDARD_OUTPUTS, InferSettings, journal_path
from prompttune.serve.infer.sinks.base import Sink
from prompttune.serve.infer.sinks.opening import check_outputs, check_unfinished, open_sinks
from prompttune.serve.infer.smoothing import Smoother
from prompttune.serve.infer.sources.live import masked
from prompttune.serve.infer.sources.opening import STANDARD_INPUT, Opened, open_source
from prompttune.serve.infer.sources.stdin import standard_input
from prompttune.serve.infer.work import Work, facts_of
from prompttune.settings import resume_values

MOST_CALLS = 4
"""Each has activations of its own: some hundred MiB for a batch of a large backbone."""


@dataclass(frozen=True)
class Prepared:
    """What is ready to run."""

    job: Job | None
    """None where an earlier run has finished it."""
    total: int | None = None
    """Inputs, those of earlier runs included; None where that is not known."""
    before: Progress = field(default_factory=Progress)
    """What earlier runs have committed."""
    live: bool = False
    """The inputs have no end of their own, so that ending them is no interruption."""
    tasks: tuple[str, ...] = ()
    """That every input is asked for."""


@contextmanager
def prepared(
    settings: InferSettings,
    *,
    stdin: Callable[[], BinaryIO],
    stdout: TextIO,
    engine: Engine | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_check: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[Prepared]:
    """Open everything that a job needs, and hold its journal until the block ends.

    Args:
        settings: what to do.
        stdin: opens standard input.
        stdout: standard output.
        engine: an open engine to use, one call at a time; None opens the folder's.
        on_progress: told after every chunk, in the thread that runs the job.
        on_check: told how much of what an earlier run has done is compared with what is there, and of how much.

    Raises:
        UsageError: a setting means nothing, an input is missing, an output is in the way.
        PrompttuneError: the engine cannot be opened, the inputs cannot be read.
    """
    segments = _segments(settings)
    check_outputs(settings.outputs, overwrite=settings.overwrite, resume=settings.resume, segments=segments)
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
        path, record = journal_path(settings.outputs), None
        journal = None if path is None else stack.enter_context(Journal(path))
        for output in [one for one in settings.outputs if one not in STANDARD_OUTPUTS][1:]:
            stack.enter_context(locked(Path(output)))
        values = _recorded(settings, folder, work, opened)
        if journal is not None and settings.resume:
            record = journal.resume(values)
        before = Progress() if record is None else record.progress
        plan = Plan(
            opened.source,
            work.chunk_inputs,
            shard=settings.shard,
            limit=settings.source.limit if opened.source.bounded else None,
            after=before,
        )
        if journal is not None and record is not None:
            size = before.ledger if before.ended is None else before.ended
            check(journal.ledger, size, plan.items, before.ended is not None, on_check)
            if record.finished and opened.source.bounded and not plan.more():
                yield Prepared(None, before=before)
                return
            check_unfinished(settings.outputs, before.sinks)
            if settings.source.watch:
                answered.update((trace.name, trace) for trace in traces(journal.ledger, before.ledger))
        calls = 1
        if engine is None and settings.ray is None:
            calls, threads = calls_at_once(settings.options, folder)
            engine = open_engine(replace(settings.options, threads=threads), folder, work)
        if journal is not None and record is not None:
            journal.go_on()
        sinks = open_sinks(
            settings.outputs,
            labelled=work.labelled,
            overwrite=settings.overwrite,
            states=None if record is None else before.sinks,
            stdout=stdout,
            rate=opened.rate,
            tasks=work.known if work.segments else None,
            csv_bom=settings.csv_bom,
        )
        for sink in sinks:
            stack.callback(sink.close)
        if journal is not None and record is None:
            journal.begin(values)
        work = replace(work, picture_side=_picture_side(sinks))
        job = Job(
            opened.source,
            plan,
            _executor(settings, work, engine, calls, before),
            sinks,
            journal=journal,
            before=before,
            scores=_scores(work, sinks, before),
            max_errors=settings.max_errors,
            on_progress=on_progress,
        )
        yield Prepared(job, plan.total, before, not opened.source.bounded, work.tasks)


def infer(
    settings: InferSettings, engine: Engine | None = None, on_progress: Callable[[Progress], None] = lambda _: None
) -> Summary:
    """Run a job to its end in this thread.

    Args:
        settings: what to do.
        engine: an open engine to use, one call at a time; None opens the folder's.
        on_progress: told after every chunk.

    Returns:
        What it did; that of the earlier run where ``resume`` finds nothing left to do.

    Raises:
        UsageError: a setting means nothing, an input is missing, an output is in the way.
        PrompttuneError: the engine cannot be opened, inputs or outputs fail; what was committed is kept.

    Example:
        >>> from prompttune.serve.infer import InferSettings, infer
        >>> infer(InferSettings("engine", ("photos",), ("rows.jsonl",), ("digits",))).inputs
        5
    """
    with prepared(settings, stdin=standard_input, stdout=sys.stdout, engine=engine, on_progress=on_progress) as ready:
        if ready.job is not None:
            return ready.job.run()
        before = ready.before
        return Summary(before.inputs, before.rows, before.errors, 0.0, 0.0, finished=True, counts=before.counts)


def calls_at_once(options: RuntimeOptions, folder: EngineFolder) -> tuple[int, int | None]:
    """How many calls of an engine of its own a job makes at once, and the threads of each.

    Together they have the threads that were asked for, or one for each core.
    """
    if options.cuda_index is not None or folder.manifest.format != "onnx":
        return 1, options.threads
    threads = options.threads or usable_cores()
    calls = min(MOST_CALLS, threads)
    return calls, threads // calls


def open_engine(options: RuntimeOptions, folder: EngineFolder, work: Work) -> Engine:
    """The engine of a job, with the tasks alone that it asks for."""
    # verified when the folder was opened
    return Engine(folder.path, **asdict(options), verify=False, tasks=list(work.known))


def _segments(settings: InferSettings) -> bool:
    """Whether the engine's tasks are segmentations; it is opened, and refused, only later if it is damaged.

    Raises:
        UsageError: a setting that goes with classifications alone.
    """
    try:
        manifest = EngineFolder(settings.engine, verify=False).manifest
    except EngineError:
        return False
    if manifest.segmentation is None:
        return False
    for given, option in (
        (settings.source.labels, "--labels"),
        (settings.smooth, "--smooth"),
        (settings.ray, "--engine ray"),
    ):
        if given is not None:
            raise UsageError(f"{option} is for classifications: the engine's tasks are segmentations")
    return True


def _check_source(settings: InferSettings, opened: Opened) -> None:
    bounded = opened.source.bounded
    name = settings.inputs[0]
    if settings.smooth is not None and not opened.frames:
        raise UsageError("--smooth needs frames: a video, a stream or raw frames")
    if not bounded and settings.shard.count > 1:
        raise UsageError(f"--shards cannot share {name} out: it can be read once only")
    if not bounded and settings.ray is not None:
        raise UsageError(f"--engine ray cannot read {name}: a stream is answered where it arrives")
    if settings.resume and name == STANDARD_INPUT:
        raise UsageError("--resume cannot read standard input again: write the list to a file and name that")
    if settings.source.drop == "oldest" and bounded:
        raise UsageError(f"--drop oldest is for streams: {name} waits for its frames to be answered")


def _work(settings: InferSettings, folder: EngineFolder, opened: Opened) -> Work:
    by_input = settings.source.task_column is not None or settings.source.stdin == "jsonl"
    tasks = tuple(dict.fromkeys(settings.tasks))
    if settings.source.task_column is not None and tasks:
        raise UsageError("--task and --task-column contradict each other: give one")
    if not tasks and not by_input:
        present = folder.tasks()
        if len(present) != 1:
            raise UsageError(f"name a task with --task; the engine has: {some_names(present)}")
        tasks = tuple(present)
    labelled = settings.source.labels is not None
    if labelled and len(tasks) > 1:
        raise UsageError("--labels are those of one task: give one --task, or a --task-column")
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
        segments=folder.manifest.segmentation is not None,
    )


def _recorded(settings: InferSettings, folder: EngineFolder, work: Work, opened: Opened) -> dict[str, Any]:
    """What a resumed run must share, so that its rows are those of a run that was never interrupted."""
    files = {name: file.sha256 for name, file in sorted(folder.manifest.files.items())}
    versions = {name: facts.version for name, facts in sorted(work.known.items())}
    return {
        **resume_values(settings),
        "engine": _digest(files),
        "task": list(work.tasks),
        "task versions": _digest(versions),
        # those that can be read again are compared one by one
        "inputs": None if opened.source.bounded else [masked(one) for one in settings.inputs],
    }


def _digest(values: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _executor(settings: InferSettings, work: Work, engine: Engine | None, calls: int, before: Progress) -> Executor:
    if settings.ray is not None:
        return OnRay(work, settings.ray)
    if engine is None:
        raise RuntimeError("an engine was to be opened")
    smoother = None if settings.smooth is None else Smoother(settings.smooth, before.smoothing)
    return Here(engine, work, settings.decoding, smoother, calls)


def _picture_side(sinks: Sequence[Sink]) -> int | None:
    sides = [sink.picture_side for sink in sinks if sink.picture_side is not None]
    return None if not sides else 0 if 0 in sides else max(sides)


def _scores(work: Work, sinks: Sequence[Sink], before: Progress) -> RowScores | None:
    if not work.labelled:
        return None
    scores = RowScores({name: facts.labels for name, facts in work.known.items()})
    for row in _earlier_rows(sinks, before):
        scores.add(row)
    return scores


def _earlier_rows(sinks: Sequence[Sink], before: Progress) -> Iterator[Row]:
    """Rows that earlier runs have written."""
    if not before.rows:
        return
    for sink in sinks:
        read = getattr(sink, "rows", None)
        if read is not None:
            yield from read()
            return
    raise UsageError("none of the outputs holds the rows of the interrupted run: begin again with --overwrite")
