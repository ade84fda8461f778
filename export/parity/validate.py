"""Proof of an existing engine: against PyTorch, or against another engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from prompttune.errors import EngineError, UsageError, choose, some_names
from prompttune.export.folder import EngineFolder, EngineTask, read_record
from prompttune.export.options import OnStage, Thresholds
from prompttune.export.parity.bisection import bisect, check_probes
from prompttune.export.parity.compare import (
    ENGINE,
    STATE,
    Reference,
    Runner,
    runner_reference,
    state_reference,
)
from prompttune.export.parity.gate import NOISE, Gate, engine_precision, loosest
from prompttune.export.parity.proof import compare_engine, open_runner
from prompttune.export.parity.report import ParityReport, torch_description
from prompttune.export.parity.samples import Data, Samples
from prompttune.export.runtimes import RuntimeOptions
from prompttune.export.tasks import engine_backbone, engine_model
from prompttune.model import PromptModel

MOST_TASKS = 32
"""Largest number of an engine's tasks that are compared if none are named."""


def validate_engine(
    engine: str | Path,
    data: Data = None,
    *,
    against: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    split: str | None = None,
    weights: str | Path | None = None,
    debug: bool = False,
    runner: Runner | None = None,
    options: RuntimeOptions | None = None,
    on_stage: OnStage = lambda _: None,
    **thresholds: Unpack[Thresholds],
) -> ParityReport:
    """Compare an engine with PyTorch on its stored states, or with another engine.

    It compares each task alone, all of them in mixed batches, at several batch sizes, and each one again after another
    one; images alone, among others and in another order. With data, the images of each task (see ``split``) are also
    run through both sides once, and both are evaluated: accuracy, precision and recall of each class, confusion,
    calibration. A data set for all tasks is evaluated only for the tasks that have its classes.

    Args:
        engine: the engine folder.
        data: a data set for all tasks, or data sets by task name; None uses seeded noise.
        against: another engine folder. Its tasks of the same names are the reference; PyTorch and the backbone's
            weights are then not needed. The thresholds are those of the less strict precision.
        tasks: tasks to compare; None for all, or :data:`MOST_TASKS` evenly spread ones if there are more.
        limit: largest number of images of each task for the accuracy.
        split: split of the data sets to score: ``val``, ``test``, ``train`` or ``all``; None uses ``val``, else
            ``test``, else the whole data set.
        weights: source of the backbone's weights, if it differs from that of the export.
        debug: whether to compare intermediate results of the most different task too, and name the first that diverges.
        runner: engine to compare; None opens the engine's file. An open ``Engine`` works.
        options: options for opening the engines' files.
        on_stage: called with each stage.
        thresholds: amounts and thresholds of :class:`~prompttune.export.options.GateOptions`; None and by default those
            of the engine's precision, see :meth:`Gate.for_precision`.

    Returns:
        The report; ``passed`` says whether it is within the gate.

    Raises:
        UsageError: a task is unknown, a threshold is invalid, or ``debug`` is not possible for the engine.
        EngineError: an engine is damaged or empty, or the two do not have comparable tasks.
        BackboneError: the backbone's weights cannot be found.
        DataError: a data set cannot be read or lacks the split, or a task shares no class with its own data set.
    """
    folder = EngineFolder(engine, verify=runner is None)
    other = None if against is None else EngineFolder(against)
    if debug:
        if other is not None:
            raise UsageError("debugging compares with PyTorch: leave out the other engine")
        check_probes(folder.manifest)
    held, note = _tasks(folder, other, tasks)
    gate = Gate.for_precision(
        loosest(*(engine_precision(one.manifest) for one in (folder, other) if one is not None)), **thresholds
    )
    gate = gate.suiting(folder.manifest.task_type)
    if isinstance(data, str) and len(held) == 1:
        data = dict.fromkeys(held, data)  # the data can only be meant for these tasks
    samples = Samples(data, folder.manifest.task_type, split=split, strict=True)
    samples.check(held)
    if other is None:
        on_stage("loading the backbone")
        side = _torch_side(folder, held, weights)
    else:
        on_stage(f"opening {other.path}")
        side = _engine_side(folder, other, held, gate, options)
    runner = runner or open_runner(folder.path, folder.manifest, held, options)
    on_stage(f"comparing with {side.description}")
    report = compare_engine(
        runner,
        {side.name: side.answer},
        held,
        samples,
        gate,
        limit=limit,
        on_stage=on_stage,
        reference=side.description,
        notes=(*note, *side.notes),
        versions=folder.manifest.tools,
    )
    if debug and side.model is not None:
        name = _furthest(report, held)
        on_stage(f"comparing intermediate results of {name}")
        shown, _ = samples.draw(name, held[name], gate.images)
        tolerance = NOISE[gate.precision]
        found = bisect(folder.path, folder.manifest, side.model, name, held[name], shown, tolerance, options)
        report = dataclasses.replace(report, bisection=found)
    return report


def _tasks(
    folder: EngineFolder, other: EngineFolder | None, wanted: Sequence[str] | None
) -> tuple[dict[str, EngineTask], list[str]]:
    """The tasks to compare, read from ``folder``, with remarks; ``other`` must have comparable ones."""
    present = folder.tasks()
    if not present:
        raise EngineError(f"the engine {folder.path} has no tasks to validate")
    if other is not None:
        sizes = folder.manifest.image_size, other.manifest.image_size
        if sizes[0] != sizes[1]:
            raise EngineError(
                f"the engines cannot be compared: {folder.path} takes images of {sizes[0]} pixels, "
                f"{other.path} of {sizes[1]}"
            )
        theirs = other.tasks()
        common = [name for name in present if name in theirs]
        if not common:
            raise EngineError(
                f"no task is in both engines: {folder.path} has {some_names(present)}; "
                f"{other.path} has {some_names(theirs)}"
            )
        present = common
    if wanted:
        chosen = dict.fromkeys(choose("task", one, present) for one in wanted)
        return {name: folder.read_task(name) for name in chosen}, []
    most = min(MOST_TASKS, len(present))
    while True:
        names = [present[number * len(present) // most] for number in range(most)]
        fit = min(_how_many(one, names) for one in (folder, other or folder))
        if fit == most:
            break
        most = fit
    bounded = most < len(present)
    note = [f"{most} of {len(present)} tasks, evenly spread; name others with --task"] if bounded else []
    return {name: folder.read_task(name) for name in names}, note


def _how_many(folder: EngineFolder, tasks: Sequence[str]) -> int:
    """Number of the first of these tasks that an engine takes together."""
    manifest = folder.manifest
    if manifest.baked is not None:
        return len(tasks)
    records = (read_record(folder.task_folder(name)) for name in tasks)
    return manifest.form.how_many(manifest.sizes, (manifest.axes_of(one.shapes, one.name) for one in records))


@dataclass(frozen=True)
class _Side:
    """The reference of an engine."""

    name: str
    """Name of the reference, as in :class:`Comparison`."""
    answer: Reference
    description: str
    notes: tuple[str, ...] = ()
    model: PromptModel | None = None
    """The model, if the reference is PyTorch."""


def _torch_side(folder: EngineFolder, tasks: Mapping[str, EngineTask], weights: str | Path | None) -> _Side:
    model = engine_model(folder.manifest, engine_backbone(folder.manifest, weights))
    return _Side(STATE, state_reference(model, tasks), torch_description(), model=model)


def _engine_side(
    folder: EngineFolder,
    other: EngineFolder,
    tasks: Mapping[str, EngineTask],
    gate: Gate,
    options: RuntimeOptions | None,
) -> _Side:
    theirs = {name: other.read_task(name) for name in tasks}
    for name, task in tasks.items():
        if task.labels != theirs[name].labels:
            raise EngineError(
                f"task {name!r} has other labels in {other.path} ({theirs[name].num_classes}) than in {folder.path} "
                f"({task.num_classes}): leave it out with --task"
            )
    precisions = engine_precision(folder.manifest), engine_precision(other.manifest)
    same = precisions[0] == precisions[1]
    which = "the precision of both" if same else f"the looser of {precisions[0]} and {precisions[1]}"
    notes = [f"thresholds of {gate.precision}, {which}"]
    changed = [name for name, task in tasks.items() if task.version != theirs[name].version]
    if changed:
        notes.append(f"not the same versions on both sides: {', '.join(changed)}")
    runner = open_runner(other.path, other.manifest, theirs, options)
    answer = runner_reference(runner, theirs, max(gate.batch_sizes))
    manifest = other.manifest
    words = f"{other.path} ({manifest.format} {manifest.precision}, {runner.description})"
    return _Side(ENGINE, answer, words, tuple(notes))


def _furthest(report: ParityReport, tasks: Mapping[str, EngineTask]) -> str:
    """The task with the largest difference from the reference; one that is not finite comes first."""
    own = [one for one in report.comparisons if one.task in tasks]
    return max(own, key=lambda one: one.max_rel if math.isfinite(one.max_rel) else math.inf).task
