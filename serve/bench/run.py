"""Measurement of an engine: latency, throughput, memory, added and switched tasks, next to other sides."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from prompttune.errors import EngineError, UsageError
from prompttune.export.build import tool_versions
from prompttune.export.folder import EngineFolder
from prompttune.export.runtimes import RuntimeOptions
from prompttune.serve.bench.machine import hardware_name
from prompttune.serve.bench.memory import memory_growth
from prompttune.serve.bench.report import BenchReport, FanOut, Measurement, Mixing, SubjectReport
from prompttune.serve.bench.runtimes import remember_quickest, runtimes_of
from prompttune.serve.bench.settings import ALL, ONE, BenchSettings
from prompttune.serve.bench.subjects import (
    BACKBONE,
    ENGINE,
    BenchSubject,
    OpenSubject,
    assignments,
    engine_subject,
    noise,
    subject_of,
)
from prompttune.serve.bench.task_costs import measure_adding, measure_switching
from prompttune.serve.bench.timing import Latency, Ratio, interleaved


def bench_engine(
    engine: str | Path,
    settings: BenchSettings | None = None,
    options: RuntimeOptions | None = None,
    on_progress: Callable[[str, float], None] = lambda _words, _share: None,
) -> BenchReport:
    """Measure an engine and the sides it is compared with. The engine folder is not changed, but for the quickest
    runtime if runtimes are compared.

    Args:
        engine: the engine folder.
        settings: what is measured, and how often.
        options: device, CPU threads of every side (None for PyTorch's own number) and so on.
        on_progress: called with a description of the next step and the finished share of all steps.

    Raises:
        UsageError: an engine does not have tasks, or the other side does not exist.
        EngineError: an engine is missing or damaged, or the loaded weights are not its own.
    """
    settings, options = settings or BenchSettings(), options or RuntimeOptions()
    folder = EngineFolder(engine, verify=False)
    manifest = folder.manifest
    manifest.task_type.refuse("bench", EngineError)
    threads, device = options.threads or torch.get_num_threads(), options.device
    options = options.or_threads(threads)
    with ExitStack() as stack, _torch_threads(threads):
        subjects = [engine_subject(ENGINE, engine, options, settings.tasks)]
        runtimes = () if settings.runtimes is None else runtimes_of(manifest, options)
        for one in (*settings.against, *(name for name in runtimes if name not in settings.against)):
            taken = [subject.name for subject in subjects]
            subjects.append(subject_of(one, folder, options, settings.weights, settings.tasks, stack, taken))
        steps, done = len(subjects) + len(settings.batch_sizes) + 2 * settings.task_costs, itertools.count()

        def step(words: str) -> None:
            on_progress(words, next(done) / steps)

        sides: dict[str, OpenSubject] = {}
        reports = []
        for subject in subjects:
            step(f"opening {subject.name}")
            sides[subject.name], report = _open(subject, device, max(settings.batch_sizes), settings.seed)
            reports.append(report)
        measurements: list[Measurement] = []
        mixing: list[Mixing] = []
        fan_out: list[FanOut] = []
        if (most := max(settings.tasks_per_image, default=0)) > len(subjects[0].tasks):
            raise UsageError(f"{most} tasks for an image are more than the engine's {len(subjects[0].tasks)}")
        for size in settings.batch_sizes:
            step(f"batch size {size}")
            timed, mixed, fanned = _measure(subjects, sides, size, settings)
            measurements += timed
            mixing += mixed
            fan_out += fanned
        opened = sides[ENGINE].engine
        assert opened is not None, "the first subject is an engine"
        bytes_per_task = opened.bank.row_bytes  # before a task is added
        switching, adding = None, None
        if settings.task_costs:
            step("switching tasks")
            switching = measure_switching(opened, subjects[0].tasks, settings.rounds, settings.seed)
            step("adding tasks")
            adding = measure_adding(opened, settings.rounds, settings.checkpoint, settings.weights)
        quickest = remember_quickest(folder, measurements, options, settings.weights) if runtimes else None
    on_progress("done", 1.0)
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
        warmup=settings.rounds.warmup,
        repeats=settings.rounds.repeats if settings.rounds.seconds is None else None,
        seconds=settings.rounds.seconds,
        seed=settings.seed,
        resident_tasks=len(folder.tasks()),
        bytes_per_task=bytes_per_task,
        subjects=tuple(reports),
        measurements=tuple(measurements),
        mixing=tuple(mixing),
        fan_out=tuple(fan_out),
        switching=switching,
        adding=adding,
        quickest=quickest,
    )


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open(subject: BenchSubject, device: str, largest: int, seed: int) -> tuple[OpenSubject, SubjectReport]:
    """Open a subject and let it answer a batch of ``largest`` images once."""
    load = subject.prepare()
    images = noise(largest, subject.image_size, seed)
    with memory_growth(device) as growth:
        began = time.perf_counter()
        opened = load()
        load_s = time.perf_counter() - began
        opened.call(images, assignments(subject.tasks, largest, ALL))()
    report = SubjectReport(subject.name, opened.description, load_s, growth.resident, growth.peak, growth.device)
    return opened, report


def _measure(
    subjects: list[BenchSubject], sides: Mapping[str, OpenSubject], batch_size: int, settings: BenchSettings
) -> tuple[list[Measurement], list[Mixing], list[FanOut]]:
    """Every subject and mix at one batch size, all in the same rounds."""
    # The mixes are the outer loop, so that a subject does not follow itself and find its weights in the caches.
    pairs = list(itertools.product(settings.mix, subjects))
    calls = {
        (subject.name, mix): sides[subject.name].call(
            noise(batch_size, subject.image_size, settings.seed), assignments(subject.tasks, batch_size, mix)
        )
        for mix, subject in pairs
    }
    opened, tasks = sides[ENGINE].engine, subjects[0].tasks
    assert opened is not None, "the first subject is an engine"
    images = noise(batch_size, subjects[0].image_size, settings.seed)
    for count in settings.tasks_per_image:
        calls[ENGINE, str(count)] = partial(opened.logits, images, [tasks[:count]])
    seconds = interleaved(calls, settings.rounds)
    measurements = []
    for mix, subject in pairs:
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
    fan_out = []
    for count in settings.tasks_per_image:
        taken = seconds[ENGINE, str(count)]
        plain = Ratio.of(taken, seconds[BACKBONE, ONE]) if BACKBONE in sides else None
        fan_out.append(FanOut(batch_size, count, Latency.of(taken), Ratio.of(taken, seconds[ENGINE, ONE]), plain))
    if not {ONE, ALL} <= {*settings.mix}:
        return measurements, [], fan_out
    mixed = Ratio.of(seconds[ENGINE, ALL], seconds[ENGINE, ONE])
    return measurements, [Mixing(batch_size, len(tasks), mixed)], fan_out
