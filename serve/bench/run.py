"""Measurement of an engine: latency, throughput, memory, added and switched tasks, next to other sides."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from prompttune.errors import EngineError, UsageError, choose
from prompttune.export.build import tool_versions
from prompttune.export.folder import EngineFolder
from prompttune.export.runtimes import RuntimeOptions
from prompttune.serve.bench.machine import hardware_name
from prompttune.serve.bench.memory import memory_growth
from prompttune.serve.bench.report import BenchReport, Measurement, Mixing, SubjectReport
from prompttune.serve.bench.subjects import (
    ALL,
    ENGINE,
    MIXES,
    ONE,
    Call,
    EngineSubject,
    Subject,
    assignments,
    noise,
    subject_of,
)
from prompttune.serve.bench.task_costs import measure_adding, measure_switching, resident_task_bytes
from prompttune.serve.bench.timing import Latency, Ratio, Rounds, interleaved

OnProgress = Callable[[str, float], None]
"""Called with a description of the current step and the finished share of all steps."""


class _Progress:
    """Turns shares of one step into shares of all steps."""

    def __init__(self, steps: int, on_progress: OnProgress) -> None:
        self._steps, self._done, self._on_progress, self._words = steps, -1, on_progress, ""

    def step(self, words: str) -> None:
        self._done, self._words = self._done + 1, words
        self.share(0.0)

    def share(self, share: float) -> None:
        self._on_progress(self._words, (self._done + share) / self._steps)


def bench_engine(
    engine: str | Path,
    *,
    against: Sequence[str] = (),
    batch_sizes: Sequence[int] = (1, 8),
    mixes: Sequence[str] = MIXES,
    tasks: int | None = None,
    options: RuntimeOptions | None = None,
    rounds: Rounds | None = None,
    task_costs: bool = True,
    checkpoint: str | Path | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    on_progress: OnProgress = lambda _words, _share: None,
) -> BenchReport:
    """Measure an engine and the sides it is compared with. The engine folder is not changed.

    Args:
        engine: the engine folder.
        against: ``backbone`` (the plain backbone in the engine's format), ``torch`` (the same tasks in eager PyTorch),
            or paths of other engines.
        batch_sizes: numbers of images per call.
        mixes: ``one`` (all rows for one task), ``all`` (rows alternate between the tasks).
        tasks: largest number of tasks that mixed rows alternate between; None for all tasks of the folder.
        options: device, CPU threads of every side (None for PyTorch's own number) and so on.
        rounds: numbers of rounds.
        task_costs: whether to also time adding tasks and switching between them.
        checkpoint: checkpoint whose adding is timed too, with ``task_costs``.
        weights: source of the backbone's weights, if it differs from that of the export.
        seed: seed of the images, which are normal noise.
        on_progress: called with the progress.

    Raises:
        UsageError: a value is invalid, an engine does not have tasks, or a comparison is given twice.
        EngineError: an engine is missing or damaged, or the loaded weights are not its own.
    """
    rounds = rounds or Rounds()
    _check(batch_sizes, mixes, against, tasks)
    folder = EngineFolder(engine, verify=False)
    folder.manifest.task_type.refuse("bench", EngineError)
    options = options or RuntimeOptions()
    threads, device = options.threads or torch.get_num_threads(), options.device
    options = options.or_threads(threads)
    with ExitStack() as stack, _torch_threads(threads):
        measured = EngineSubject(ENGINE, engine, options, tasks)
        subjects: list[Subject] = [measured]
        for one in against:
            taken = [subject.name for subject in subjects]
            subjects.append(subject_of(one, folder, options, weights, tasks, stack, taken))
        progress = _Progress(len(subjects) + len(batch_sizes) + 2 * task_costs, on_progress)
        bench = _Bench(subjects, rounds, seed, progress)
        reports = [bench.open(subject, device, max(batch_sizes)) for subject in subjects]
        measurements: list[Measurement] = []
        mixing: list[Mixing] = []
        for size in batch_sizes:
            timed, mixed = bench.measure(size, mixes)
            measurements += timed
            mixing += mixed
        bytes_per_task = resident_task_bytes(measured.engine)
        switching, adding = None, None
        if task_costs:
            progress.step("switching tasks")
            switching = measure_switching(measured.engine, measured.tasks, rounds, seed, progress.share)
            progress.step("adding tasks")
            adding = measure_adding(measured.engine, rounds, checkpoint, weights, progress.share)
    on_progress("done", 1.0)
    manifest = folder.manifest
    return BenchReport(
        engine=str(engine),
        backbone=manifest.backbone["name"],
        image_size=manifest.image_size,
        method=manifest.method["name"],
        format=manifest.format,
        precision=manifest.precision,
        bank_precision=manifest.bank_precision,
        device=device,
        threads=threads,
        hardware=hardware_name(device),
        versions=tool_versions(),
        warmup=rounds.warmup,
        repeats=rounds.repeats if rounds.seconds is None else None,
        seconds=rounds.seconds,
        seed=seed,
        resident_tasks=len(folder.tasks()),
        bytes_per_task=bytes_per_task,
        subjects=tuple(reports),
        measurements=tuple(measurements),
        mixing=tuple(mixing),
        switching=switching,
        adding=adding,
    )


def _check(batch_sizes: Sequence[int], mixes: Sequence[str], against: Sequence[str], tasks: int | None) -> None:
    if not batch_sizes or min(batch_sizes) < 1:
        raise UsageError("batch sizes must be at least 1")
    if tasks is not None and tasks < 1:
        raise UsageError(f"tasks must be at least 1, not {tasks}")
    if not mixes:
        raise UsageError(f"give at least one mix of {', '.join(MIXES)}")
    for mix in mixes:
        choose("mix", mix, MIXES)
    for what, values in (("batch size", batch_sizes), ("mix", mixes), ("comparison", against)):
        twice = [value for value in values if list(values).count(value) > 1]
        if twice:
            raise UsageError(f"the {what} {twice[0]!r} is given twice")


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Bench:
    """The subjects of one run, the engine first, and their timing."""

    def __init__(self, subjects: Sequence[Subject], rounds: Rounds, seed: int, progress: _Progress) -> None:
        self._subjects, self._rounds, self._seed, self._progress = subjects, rounds, seed, progress

    def open(self, subject: Subject, device: str, largest: int) -> SubjectReport:
        """Open a subject and let it answer a batch of ``largest`` images once."""
        self._progress.step(f"opening {subject.name}")
        subject.prepare()
        images = noise(largest, subject.image_size, self._seed)
        with memory_growth(device) as growth:
            began = time.perf_counter()
            subject.open()
            load_s = time.perf_counter() - began
            subject.call(images, assignments(subject.tasks, largest, ALL))()
        return SubjectReport(subject.name, subject.description, load_s, growth.resident, growth.peak, growth.device)

    def measure(self, batch_size: int, mixes: Sequence[str]) -> tuple[list[Measurement], list[Mixing]]:
        """Every subject and mix at one batch size, all in the same rounds."""
        self._progress.step(f"batch size {batch_size}")
        calls: dict[tuple[str, str], Call] = {}
        # The mixes are the outer loop, so that a subject does not follow itself and find its weights in the caches.
        for mix, subject in itertools.product(mixes, self._subjects):
            images = noise(batch_size, subject.image_size, self._seed)
            calls[subject.name, mix] = subject.call(images, assignments(subject.tasks, batch_size, mix))
        seconds = interleaved(calls, self._rounds, on_share=self._progress.share)
        measurements = []
        for mix, subject in itertools.product(mixes, self._subjects):
            values = seconds[subject.name, mix]
            latency, count = Latency.of(values), len(subject.tasks)
            over = None if subject.name == ENGINE else Ratio.of(seconds[ENGINE, mix], values)
            measurements.append(
                Measurement(
                    subject=subject.name,
                    batch_size=batch_size,
                    mix=mix,
                    tasks=count if mix == ALL else min(1, count),
                    latency=latency,
                    images_per_s=latency.per(batch_size),
                    engine_over=over,
                )
            )
        if not {ONE, ALL} <= {*mixes}:
            return measurements, []
        mixed = Ratio.of(seconds[ENGINE, ALL], seconds[ENGINE, ONE])
        return measurements, [Mixing(batch_size, len(self._subjects[0].tasks), mixed)]
